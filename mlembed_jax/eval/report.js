"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const AXES = {depth: "depth", dim: "dimension", rank: "rank", precision: "precision"};
const full = data.slices[data.full];
const byId = id => document.getElementById(id);
const key = size => [size.rank, size.depth, size.dim, size.precision].join();
const slices = new Map(data.slices.map((slice, i) => [key(slice), Object.assign(slice, {i})]));
const one = data.slices.length === 1;
const state = {view: 0, size: {...data.slices[data.chosen]}, sort: "chosen", down: false};
document.documentElement.classList.add("js");

function add(parent, name, attributes = {}, text) {
  const child = document.createElementNS(parent.namespaceURI, name);
  for (const [key, value] of Object.entries(attributes)) child.setAttribute(key, value);
  if (text !== undefined) child.textContent = text;
  return parent.appendChild(child);
}

const chosen = () => slices.get(key(state.size));
const scoreOf = slice => slice?.scores[state.view] ?? null;
const percent = x => x === null ? "–" : (100 * x).toFixed(1).replace("-", "−");
const change = x => x === null ? "–" : (x > 0 ? "+" : "") + percent(x);
const minus = (a, b) => a === null || b === null ? null : a - b;
const rankName = rank => rank || "full";

function shown(cost, x) {
  if (cost === "bytes") return x.toLocaleString("en") + " B";
  if (cost === "latency") return Number(x.toPrecision(3)) + " ms";
  const [unit, prefix] = [[1e12, " T"], [1e9, " G"], [1e6, " M"], [1e3, " k"], [1, ""]]
    .find(([unit]) => x >= .9995 * unit) ?? [1, ""];
  return Number((x / unit).toPrecision(3)) + prefix;
}

function nameOf(slice) {
  const parts = {depth: `depth ${slice.depth}`, dim: `dim ${slice.dim}`,
    rank: `rank ${rankName(slice.rank)}`, precision: slice.precision};
  return Object.keys(parts).filter(axis => data.axes[axis].length > 1)
    .map(axis => parts[axis]).join(", ");
}

function choose(size) {
  for (const axis of Object.keys(AXES)) state.size[axis] = size[axis];
  render();
}

// Cividis, which people with any colour vision read in the same order.
const COLOURS = ["00224e", "123570", "3b496c", "575d6d", "707173", "8a8678", "a59c74", "c3b369",
  "e1cc55", "fee838"].map(hex => [0, 2, 4].map(i => parseInt(hex.slice(i, i + 2), 16)));

function colour(share) {
  const at = share * (COLOURS.length - 1), i = Math.min(Math.floor(at), COLOURS.length - 2);
  return COLOURS[i].map((low, c) => Math.round(low + (at - i) * (COLOURS[i + 1][c] - low)));
}

function inkOn(rgb) {
  const [r, g, b] = rgb.map(c => (c / 255) ** 2.2);
  return .2126 * r + .7152 * g + .0722 * b > .18 ? "#000" : "#fff";
}

function rangeOf(slices) {
  const scores = slices.map(scoreOf).filter(score => score !== null);
  return scores.length ? [Math.min(...scores), Math.max(...scores)] : [0, 1];
}

function heatmap(id, axis, at, [low, high]) {
  const box = byId(id).querySelector(".scroll");
  box.replaceChildren();
  const table = add(box, "table", {class: "heat"}), head = add(add(table, "thead"), "tr");
  add(head, "th", {scope: "col"}, AXES[axis]);
  for (const dim of data.axes.dim) add(head, "th", {scope: "col"}, dim);
  const body = add(table, "tbody");
  for (const value of data.axes[axis].toReversed()) {
    const row = add(body, "tr");
    add(row, "th", {scope: "row"}, rankName(value));
    for (const dim of data.axes.dim) {
      const slice = slices.get(key({...at, [axis]: value, dim})), score = scoreOf(slice);
      const cell = add(row, "td");
      if (score === null) { cell.textContent = "–"; continue; }
      const button = add(cell, "button", {type: "button", tabindex: -1, "data-slice": slice.i,
        "data-focus": `${id} ${slice.i}`, "aria-pressed": slice === chosen(),
        title: nameOf(slice)}, percent(score));
      const rgb = colour((score - low) / (high - low || 1));
      button.style.background = `rgb(${rgb})`;
      button.style.color = inkOn(rgb);
    }
  }
  const first = table.querySelector("[aria-pressed=true]") ?? table.querySelector("button");
  first?.setAttribute("tabindex", 0);
  table.addEventListener("keydown", event => move(event, table));
}

function move(event, table) {
  const step = {ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0]};
  const cell = event.target.closest("td");
  if (!step[event.key] || !cell) return;
  const [down, right] = step[event.key];
  const to = table.rows[cell.parentNode.rowIndex + down]?.cells[cell.cellIndex + right];
  to?.querySelector("button")?.focus();
  event.preventDefault();
}

function heatmaps() {
  const {rank, precision} = state.size, named = [];
  if (data.axes.rank.length > 1) named.push(`rank ${rankName(rank)}`);
  byId("depths").querySelector("small").textContent = [...named, precision].join(", ");
  byId("ranks").querySelector("small").textContent = `depth ${full.depth}, ${precision}`;
  const range = rangeOf(data.slices.filter(slice => slice.precision === precision
    && (slice.rank === rank || slice.depth === full.depth)));  // the cells of both
  heatmap("depths", "depth", state.size, range);
  heatmap("ranks", "rank", {...state.size, depth: full.depth}, range);
  const [low, bar, high] = byId("scale").children;
  [low.textContent, high.textContent] = range.map(percent);
  bar.style.background = `linear-gradient(90deg,${COLOURS.map(rgb => `rgb(${rgb})`)})`;
}

// Per cost, the axis that lines are drawn by, and the one that runs along them.
const LINES = {bytes: ["precision", "dim"], flops: ["dim", "depth"], parameters: ["rank", "depth"],
  latency: ["precision", "depth"]};
const MARKS = ["M-3.5,0a3.5,3.5 0 1,0 7,0a3.5,3.5 0 1,0 -7,0", "M-3,-3h6v6h-6z", "M0,-4l4,7h-8z",
  "M0,-4.5l4.5,4.5l-4.5,4.5l-4.5,-4.5z"];
const DASHES = ["none", "7 3", "2 3", "9 3 2 3"];

function some(values, count) {
  if (values.length <= count) return values;
  return [...Array(count).keys()].map(i =>
    values[Math.round(i * (values.length - 1) / (count - 1))]);
}

function linearTicks(low, high, count) {
  const raw = (high - low) / count, power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map(m => m * power).find(step => step >= raw);
  const first = Math.ceil(low / step - 1e-9);
  return Array.from({length: Math.floor(high / step + 1e-9) - first + 1}, (_, i) =>
    (first + i) * step);
}

// Returns the most round numbers whose places, by x, leave room for their labels.
function logTicks(low, high, x, bytes) {
  const powers = [...Array(30).keys()];
  const sets = bytes
    ? [1, 2, 3, 4].map(step => powers.map(n => 2 ** (n * step)))
    : [[1, 1.5, 2, 3, 4, 5, 6, 7, 8], [1, 1.5, 2, 3, 5, 7], [1, 2, 3, 5], [1, 2, 5], [1, 3], [1]]
      .map(set => powers.flatMap(n => set.map(m => Number(`${m}e${n - 6}`))));
  const within = sets.map(set => set.filter(value => value >= low && value <= high));
  const loose = ticks => ticks.every((value, i) => !i || x(value) - x(ticks[i - 1]) >= 52);
  return within.find(loose) ?? some(within.at(-1), 3);
}

function chart(figure) {
  const cost = figure.dataset.cost, caption = figure.firstElementChild;
  figure.replaceChildren(caption);
  const known = data.slices.filter(slice => cost in slice.costs && scoreOf(slice) !== null);
  const lines = linesOf(cost, known);
  const front = data.views[state.view].fronts[cost].map(i => data.slices[i]);
  const width = Math.max(figure.clientWidth, 280), height = Math.round(Math.min(360, width * .75));
  const costs = known.map(slice => slice.costs[cost]);
  const [bottom, top] = rangeOf([...front, ...lines.flatMap(line => line.slices)]);
  const [low, high] = [Math.min(...costs), Math.max(...costs)], pad = (top - bottom || .01) * .05;
  const logX = x => Math.log(x / low) / Math.log(high / low || 2);
  const x = value => 54 + logX(value) * (width - 80);
  const unit = (height - 52) / (top - bottom + 2 * pad);
  const y = score => height - 42 - (score - bottom + pad) * unit;
  const svg = add(add(figure, "div"), "div");
  svg.innerHTML = "<svg role='group'></svg>";
  const plot = {svg: svg.firstChild, x, y, cost, width, height};
  plot.svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  plot.svg.setAttribute("aria-label", `Score by ${data.costs[cost]}`);
  axesOf(plot, [low, high], [bottom - pad, top + pad]);
  const drawn = known.filter(slice => scoreOf(slice) >= bottom - pad);  // worse ones say little
  for (const slice of drawn) mark(plot, slice, MARKS[0], {class: "dot", transform: .6});
  const keys = add(figure, "div", {class: "keys"});
  for (const [n, line] of lines.entries()) drawLine(plot, keys, line, n);
  legend(keys, "every slice", {class: "dot"}, MARKS[0]);
  drawFront(plot, keys, front);
  list(figure, cost, front);
  if (drawn.includes(chosen())) {
    mark(plot, chosen(), MARKS[3], {class: "picked", transform: 2.2});
    legend(keys, "chosen slice", {class: "picked"}, MARKS[3]);
  }
}

function axesOf({svg, x, y, cost, width, height}, [low, high], [bottom, top]) {
  for (const score of linearTicks(bottom, top, 6)) {
    add(svg, "path", {class: "axis", d: `M44,${y(score)}H${width - 10}`});
    add(svg, "text", {x: 38, y: y(score) + 4, "text-anchor": "end"},
      String(Number((100 * score).toFixed(2))));
  }
  add(svg, "path", {class: "axis", d: `M44,${height - 36}H${width - 10}`});
  for (const value of logTicks(low, high, x, cost === "bytes")) {
    add(svg, "path", {class: "axis", d: `M${x(value)},${height - 36}v5`});
    add(svg, "text", {x: x(value), y: height - 18, "text-anchor": "middle"}, shown(cost, value));
  }
  add(svg, "text", {x: width - 10, y: height - 2, "text-anchor": "end"},
    `${data.costs[cost]}, log scale`);
}

function mark({svg, x, y, cost}, slice, d, attributes) {
  const place = `translate(${x(slice.costs[cost]).toFixed(1)},${y(scoreOf(slice)).toFixed(1)})`;
  const transform = `${place} scale(${attributes.transform ?? 1})`;
  const point = add(svg, "path", {d, "vector-effect": "non-scaling-stroke", ...attributes,
    transform, "data-slice": slice.i});
  add(point, "title", {},
    `${nameOf(slice)}: ${percent(scoreOf(slice))} at ${shown(cost, slice.costs[cost])}`);
  return point;
}

function legend(keys, text, style, d) {
  const key = add(keys, "span");
  key.innerHTML = "<svg viewBox='0 0 30 12' aria-hidden='true'></svg> ";
  if (!["picked", "dot"].includes(style.class))
    add(key.firstChild, "path", {...style, d: "M1,6h28"});
  add(key.firstChild, "path", {...style, ...style.point, d, transform: "translate(15,6)"});
  key.append(text);
}

function linesOf(cost, known) {
  const [by, along] = LINES[cost];
  return some(data.axes[by], 4).map(value => ({
    name: {precision: value, rank: `rank ${rankName(value)}`, dim: `dim ${value}`}[by],
    slices: data.axes[along].map(step => slices.get(key({...full, [by]: value, [along]: step})))
      .filter(slice => known.includes(slice)),
  })).filter(line => line.slices.length);
}

function path({x, y, cost}, slices) {
  return "M" + slices.map(slice => `${x(slice.costs[cost])},${y(scoreOf(slice))}`).join("L");
}

function drawLine(plot, keys, line, n) {
  const style = {class: "series", stroke: `var(--s${n})`, "stroke-dasharray": DASHES[n]};
  const point = {fill: `var(--s${n})`, stroke: "none", class: ""};
  add(plot.svg, "path", {...style, d: path(plot, line.slices)});
  for (const slice of line.slices) mark(plot, slice, MARKS[n], point);
  legend(keys, line.name, {...style, point}, MARKS[n]);
}

function drawFront(plot, keys, front) {
  add(plot.svg, "path", {class: "front", d: path(plot, front)});
  for (const slice of front)
    mark(plot, slice, MARKS[0], {class: "on-front", transform: 1.5, tabindex: 0, role: "button",
      "data-focus": `${plot.cost} ${slice.i}`});
  legend(keys, "Pareto front", {class: "front", point: {class: "on-front"}}, MARKS[0]);
}

function list(figure, cost, front) {
  const details = add(figure, "details");
  details.open = figure.dataset.open === "true";
  details.addEventListener("toggle", () => { figure.dataset.open = details.open; });
  add(details, "summary", {}, `The ${front.length} slices of the front`);
  const body = add(add(details, "table"), "tbody");
  for (const slice of front) {
    const row = add(body, "tr");
    add(row, "td", {}, shown(cost, slice.costs[cost]));
    add(row, "td", {}, percent(scoreOf(slice)));
    add(add(row, "th"), "button", {type: "button", class: "text", "data-slice": slice.i,
      "data-focus": `list ${cost} ${slice.i}`}, nameOf(slice));
  }
}

let names = null;
try { names = new Intl.DisplayNames(["en"], {type: "language", fallback: "none"}); } catch {}
function languageName(code) {
  try {
    // "German" is enough for deu-Latn, but not for deu-Hebr.
    const {baseName, language, script} = new Intl.Locale(code.replaceAll("_", "-"));
    const usual = new Intl.Locale(language).maximize().script;
    return names?.of(script === usual ? baseName.replace(`-${script}`, "") : baseName) ?? "";
  } catch { return ""; }
}

function languages() {
  const view = data.views[state.view], whole = full.languages[state.view];
  const part = chosen()?.languages[state.view] ?? [];
  const rows = view.languages.map(([code, tasks], i) => ({language: code, name: languageName(code),
    tasks, full: whole[i], chosen: part[i] ?? null, change: minus(part[i] ?? null, whole[i])}));
  const wanted = byId("filter").value.trim().toLowerCase();
  const kept = rows.filter(row => `${row.language} ${row.name}`.toLowerCase().includes(wanted));
  const less = (a, b) => a === null ? 1 : b === null ? -1 : a < b ? -1 : a > b ? 1 : 0;
  const by = one && state.sort === "chosen" ? "full" : state.sort;
  kept.sort((a, b) => (state.down ? less(b[by], a[by]) : less(a[by], b[by]))
    || less(a.language, b.language));
  const columns = {language: "language", tasks: "tasks", full: one ? "score" : "full model",
    chosen: "chosen slice", change: "change"};
  for (const extra of one ? ["chosen", "change"] : []) delete columns[extra];
  if (!view.languages.some(([, tasks]) => tasks > 1)) delete columns.tasks;
  languageTable(columns, kept, by);
  byId("found").textContent = wanted ? `${kept.length} of ${rows.length}` : `${rows.length} in all`;
}

function languageTable(columns, rows, by) {
  const [head, body] = byId("languages").children;
  head.replaceChildren();
  const header = add(head, "tr");
  for (const [column, label] of Object.entries(columns)) {
    const cell = add(header, "th", {scope: "col"});
    if (column === by) cell.setAttribute("aria-sort", state.down ? "descending" : "ascending");
    add(cell, "button", {type: "button", "data-sort": column, "data-focus": `sort ${column}`},
      label);
  }
  body.replaceChildren();
  for (const row of rows) {
    const line = add(body, "tr"), name = add(line, "th", {scope: "row"}, row.language);
    if (row.name) add(name, "span", {class: "note"}, ` ${row.name}`);
    if (columns.tasks) add(line, "td", {}, row.tasks);
    add(line, "td", {}, percent(row.full));
    if (columns.chosen) add(line, "td", {}, percent(row.chosen));
    if (columns.change) add(line, "td", {}, change(row.change));
  }
}

function status() {
  const slice = chosen(), score = scoreOf(slice), whole = scoreOf(full), text = byId("chosen");
  text.textContent = "";
  add(text, "strong", {}, nameOf(state.size));
  if (score === null) return text.append(": not measured");
  const costs = Object.keys(data.costs).filter(cost => cost in slice.costs)
    .map(cost => `${shown(cost, slice.costs[cost])} ${data.units[cost]}`);
  text.append(`: ${percent(score)} (full model ${percent(whole)}); ${costs.join(", ")}`);
}

function tasks() {
  for (const cell of document.querySelectorAll("td.chosen")) {
    const view = data.views.findIndex((view, i) =>
      view.name === cell.dataset.task && (i || data.views.length === 1));
    cell.textContent = percent(chosen()?.scores[view] ?? null);
  }
}

function controls() {
  const box = byId("controls").firstElementChild;
  const select = (label, options, value, set) => {
    const field = add(add(box, "label", {}, label), "select");
    for (const [value, text] of options) add(field, "option", {value}, text);
    field.value = value;
    field.addEventListener("change", () => { set(options[field.selectedIndex][0]); render(); });
    field.parentNode.hidden = options.length === 1;
    return field;
  };
  select("Score of", data.views.map((view, i) => [i, view.name]), 0, i => { state.view = i; });
  return Object.entries(AXES).map(([axis, label]) => [axis, select(label[0].toUpperCase()
    + label.slice(1), data.axes[axis].map(value => [value, rankName(value)]), state.size[axis],
    value => { state.size[axis] = value; })]);
}

function charts() {
  for (const figure of document.querySelectorAll(".chart")) chart(figure);
}

function render() {
  const focused = document.activeElement?.dataset.focus;
  for (const [axis, field] of fields) field.value = state.size[axis];
  for (const part of [status, heatmaps, charts, languages, tasks]) part();
  if (focused) document.querySelector(`[data-focus="${CSS.escape(focused)}"]`)?.focus();
}

const fields = controls();
if (one) for (const cell of document.querySelectorAll(".chosen")) cell.hidden = true;
for (const span of document.querySelectorAll("span[data-slice]")) {
  const button = add(span, "button", {type: "button", class: "text"}, span.textContent);
  span.replaceChildren(button);
}
document.addEventListener("click", event => {
  const slice = event.target.closest("[data-slice]"), sort = event.target.closest("[data-sort]");
  if (slice) choose(data.slices[slice.dataset.slice]);
  if (!sort) return;
  state.down = sort.parentNode.getAttribute("aria-sort") === "ascending";
  state.sort = sort.dataset.sort;
  render();
});
document.addEventListener("keydown", event => {
  if (!event.target.matches("path[data-slice]") || !["Enter", " "].includes(event.key)) return;
  choose(data.slices[event.target.dataset.slice]);
  event.preventDefault();
});
byId("filter").addEventListener("input", languages);
byId("controls").addEventListener("submit", event => event.preventDefault());
let width = innerWidth;
addEventListener("resize", () => { if (innerWidth !== width) charts(); width = innerWidth; });
render();
