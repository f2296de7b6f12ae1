"""The script of the page in a real browser: what it draws, and what its controls do."""

import functools
import http.server
import json
import math
import re
import statistics
import threading
from dataclasses import replace

import pytest
from lightpanda import Browser

from mlembed_jax.eval import report, summary
from tests.eval import made_up

# The fork that JAX warns of does no more than execute the browser.
pytestmark = pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning")

EXITS, DIMS, RANKS = (4, 12, 28), (8, 64, 1024), (64, 512)
SELECTS = ("Score of", "Depth", "Dimension", "Rank", "Precision")
HOSTILE = "<img src=x onerror=\"document.title = 'run'\">"
LISTEN = "addEventListener('error', event => console.error(event.message));"
COLD, WARM = "rgb(0,34,78)", "rgb(254,232,56)"  # the two ends of Cividis


class Page:
  """One page that is open in the browser."""

  def __init__(self, session):
    self.session = session
    self.click, self.fill, self.press = session.click, session.fill, session.press

  def each(self, selector, expression):
    """Returns the value of a JavaScript expression for every element `x` that matches."""
    found = f"[...document.querySelectorAll({json.dumps(selector)})]"
    return self.session.evaluate(script=f"{found}.map(x => ({expression}))")

  def texts(self, selector):
    """Returns the text of every element that matches."""
    return self.each(selector, "x.textContent")

  def text(self, selector):
    """Returns the text of the only element that matches."""
    (text,) = self.texts(selector)
    return text

  def rows(self, selector):
    """Returns the text of the cells of each row."""
    return self.each(f"{selector} tr", "[...x.cells].map(cell => cell.textContent)")

  def select(self, label, value):
    """Selects an option of a control."""
    place = SELECTS.index(label) + 1
    selector = f"#controls label:nth-child({place}) select"
    self.session.select_option(selector=selector, value=str(value))

  def pressed(self):
    """Returns the names of the cells of the heat maps that are marked as chosen."""
    return self.each("[aria-pressed=true]", "x.title")


@pytest.fixture(scope="module")
def evaluation():
  return made_up.evaluation(EXITS, DIMS, RANKS)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
  """A folder and the address that its files are served at; the browser opens no file by path."""
  folder = tmp_path_factory.mktemp("site")
  handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=folder)
  with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield folder, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture(scope="module")
def browser():
  with Browser(env={"LIGHTPANDA_DISABLE_TELEMETRY": "true"}, timeout=60) as started:
    yield started


@pytest.fixture
def load(site, browser):
  """A function that writes the report of an evaluation, opens it and returns its `Page`.

  No exception may be left uncaught after the page is loaded; `first` is put before all else in it.
  """
  folder, address = site
  sessions = []

  def opened(evaluation, first=""):
    path = folder / "report.html"
    report.write(path, evaluation)
    path.write_text(path.read_text("utf-8").replace("<head>", f"<head>{first}", 1), "utf-8")
    sessions.append(browser.new_session())
    assert sessions[-1].goto(url=f"{address}/report.html").http_status == 200
    sessions[-1].evaluate(script=f"{LISTEN} 1")
    return Page(sessions[-1])

  yield opened
  for session in sessions:
    assert session.console_logs() == "No console messages."
    session.close()


@pytest.fixture
def page(load, evaluation):
  return load(evaluation)


def point_of(evaluation, task=None, **size):
  """Returns the point of a slice; axes that are not named are those of the full model."""
  points = summary.points(evaluation, task)
  whole = summary.full(points)
  wanted = tuple(size.get(axis, getattr(whole, axis)) for axis in summary.AXES)
  return next(point for point in points if point.size == wanted)


def first_choice(evaluation):
  """Returns the slice that the page compares with at first."""
  data = report.payload(evaluation)
  return point_of(evaluation, **{k: data["slices"][data["chosen"]][k] for k in summary.AXES})


def name(evaluation, point):
  return summary.name(point, summary.points(evaluation))


def expected_rows(evaluation, axis, task=None, **size):
  """Returns the rows of a heat map, the largest value of the axis first."""
  rows = []
  for value in reversed({"depth": EXITS, "rank": RANKS}[axis]):
    cells = (point_of(evaluation, task, **{**size, axis: value, "dim": dim}) for dim in DIMS)
    rows.append([str(value), *(summary.percent(point.score) for point in cells)])
  return rows


def test_the_script_runs_to_its_end(load, evaluation):
  page = load(evaluation, first=f"<script>{LISTEN}</script>")
  assert page.session.console_logs() == "No console messages."
  assert page.each("html", "x.className") == ["js"]


def test_heat_maps_show_the_scores_and_mark_the_chosen_slice(page, evaluation):
  chosen = first_choice(evaluation)
  assert page.rows("#depths tbody") == expected_rows(evaluation, "depth")
  assert page.rows("#ranks tbody") == expected_rows(evaluation, "rank")
  assert page.texts("#depths thead th") == ["depth", *map(str, DIMS)]
  assert page.pressed() == [name(evaluation, chosen)]
  assert page.each("#controls select", "x.value") == [
    "0",
    *map(str, (chosen.depth, chosen.dim, chosen.rank, chosen.precision)),
  ]


def test_the_best_cell_is_brightest_and_the_worst_is_darkest(page):
  cells = page.each(".heat td button", "[Number(x.textContent), x.style.background]")
  assert (min(cells)[1], max(cells)[1]) == (COLD, WARM)
  assert page.texts("#scale span")[:2] == [f"{min(cells)[0]:.1f}", f"{max(cells)[0]:.1f}"]


def test_the_status_names_the_slice_its_score_and_its_costs(page, evaluation):
  chosen = first_choice(evaluation)
  score, whole = (summary.percent(p.score) for p in (chosen, point_of(evaluation)))
  said = page.text("#chosen")
  assert said.startswith(f"{name(evaluation, chosen)}: {score} (full model {whole}); ")
  costs = said.split("; ")[1].split(", ")
  assert costs == [
    f"{summary.shown(cost, paid)} {summary.UNITS[cost]}" for cost, paid in chosen.costs.items()
  ]


def test_a_cell_chooses_its_slice_everywhere(page, evaluation):
  page.click(selector="#depths tbody tr:last-child td:nth-of-type(2) button")
  wanted = point_of(evaluation, depth=4, dim=64)
  assert page.pressed() == [name(evaluation, wanted)]
  assert page.text("#chosen strong") == name(evaluation, wanted)
  assert page.each("#controls select", "x.value") == ["0", "4", "64", "512", "float32"]
  scores = [point_of(evaluation, task, depth=4, dim=64).score for task, *_ in made_up.TASKS]
  assert page.texts("td.chosen") == [summary.percent(score) for score in scores]
  whole = {code: score for score, code in worst_first(evaluation, point_of(evaluation))}
  rows = [[row[0].split()[0], *row[1:]] for row in page.rows("#languages tbody")]
  assert rows == [
    language_row(code, whole[code], score) for score, code in worst_first(evaluation, wanted)
  ]


def language_row(code, whole, chosen):
  """Returns the cells of a language that all tasks have."""
  change = f"{100 * (chosen - whole):+.1f}".replace("-", "−")
  return [code, str(len(made_up.TASKS)), summary.percent(whole), summary.percent(chosen), change]


def worst_first(evaluation, point):
  """Returns (score, language), where a score is the mean over all tasks."""
  found = [score.by_language for score in evaluation.scores if score.size == point.size]
  return sorted((statistics.fmean(of[code] for of in found), code) for code in made_up.LANGUAGES)


def test_controls_choose_task_and_slice(page, evaluation):
  task = made_up.TASKS[2][0]
  page.select("Score of", 3)
  page.select("Precision", "binary")
  page.select("Rank", 64)
  size = {"rank": 64, "precision": "binary"}
  assert page.rows("#depths tbody") == expected_rows(evaluation, "depth", task, **size)
  ranks = expected_rows(evaluation, "rank", task, precision="binary")
  assert page.rows("#ranks tbody") == ranks
  assert page.text("#depths small") == "rank 64, binary"
  assert page.text("#chosen strong").endswith("rank 64, binary")


@pytest.mark.parametrize("cost", summary.COSTS)
def test_a_chart_draws_every_slice_and_the_front(page, evaluation, cost):
  figure = f".chart[data-cost={cost}]"
  front = summary.front(summary.points(evaluation), cost)
  names = [name(evaluation, point) for point in front]
  marks = page.each(f"{figure} .on-front title", "x.textContent")
  assert [mark.split(": ")[0] for mark in marks] == names
  rows = page.rows(f"{figure} details tbody")
  assert rows == [
    [summary.shown(cost, point.costs[cost]), summary.percent(point.score), name]
    for point, name in zip(front, names, strict=True)
  ]
  assert page.text(f"{figure} summary") == f"The {len(front)} slices of the front"
  assert len(page.each(f"{figure} .picked[data-slice]", "1")) == 1


def places(page, selector):
  """Returns (x, y) of each mark."""
  moved = page.each(selector, "x.getAttribute('transform')")
  return [tuple(map(float, re.match(r"translate\((.*?),(.*?)\)", text).groups())) for text in moved]


@pytest.mark.parametrize("cost", summary.COSTS)
def test_marks_lie_in_the_plot_by_cost_and_score(page, cost):
  figure = f".chart[data-cost={cost}]"
  (box,) = page.each(f"{figure} svg[role=group]", "x.getAttribute('viewBox')")
  _, _, width, height = map(float, box.split())
  dots = places(page, f"{figure} path.dot[data-slice]")
  assert len(dots) > 20
  assert all(0 < x < width and 0 < y < height for x, y in dots)
  along = places(page, f"{figure} path.on-front[data-slice]")
  across, down = zip(*along, strict=True)
  assert list(across) == sorted(across) and list(down) == sorted(down, reverse=True)  # y grows down
  drawn = page.each(f"{figure} path", "x.getAttribute('d')")
  assert drawn and not any(word in d for d in drawn for word in ("NaN", "undefined", "Infinity"))


def test_a_point_and_a_name_in_a_list_choose_their_slice(page, evaluation):
  cheapest, second = summary.front(summary.points(evaluation), "latency")[:2]
  page.press(selector=".chart[data-cost=latency] .on-front", key="Enter")
  assert page.text("#chosen strong") == name(evaluation, cheapest)
  page.click(selector=".chart[data-cost=latency] details tr:nth-child(2) button")
  assert page.text("#chosen strong") == name(evaluation, second)


def test_a_name_in_the_answer_chooses_its_slice(page, evaluation):
  best = summary.best(summary.points(evaluation))
  page.click(selector=".lead button")
  assert page.text("#chosen strong") == name(evaluation, best)


def test_arrow_keys_move_between_the_cells(page, evaluation):
  start = "#depths tbody tr:first-child td:nth-of-type(1) button"
  page.session.evaluate(script=f"document.querySelector({json.dumps(start)}).focus(); 1")
  focused = []
  for key in ("ArrowRight", "ArrowDown", "ArrowLeft", "ArrowUp"):
    page.press(selector="#depths button:focus", key=key)
    focused += page.each("#depths button:focus", "x.title")
  steps = [(28, 64), (12, 64), (12, 8), (28, 8)]
  assert focused == [name(evaluation, point_of(evaluation, depth=e, dim=d)) for e, d in steps]


def test_the_filter_finds_codes_and_names_of_languages(page):
  assert page.text("#found") == "20 in all"
  page.fill(selector="#filter", value=" GERM ")
  assert [row[0] for row in page.rows("#languages tbody")] == ["de German"]
  assert page.text("#found") == "1 of 20"
  page.fill(selector="#filter", value="yo")
  assert [row[0] for row in page.rows("#languages tbody")] == ["yo Yoruba"]


def test_languages_are_sorted_by_any_column_both_ways(page):
  for column, place in (("language", 0), ("full", 2), ("change", 4)):
    orders = []
    for direction in ("ascending", "descending"):
      page.click(selector=f"[data-sort={column}]")
      assert page.each("[aria-sort]", "[x.firstChild.dataset.sort, x.ariaSort]") == [
        [column, direction]
      ]
      orders.append([row[place] for row in page.rows("#languages tbody")])
    key = str if column == "language" else lambda cell: float(cell.replace("−", "-"))
    assert list(map(key, orders[0])) == sorted(map(key, orders[0]))
    assert list(map(key, orders[1])) == sorted(map(key, orders[1]), reverse=True)


def test_one_slice_has_scores_and_no_comparison(load):
  page = load(made_up.evaluation((28,), (1024,), (0,), ("float32",)))
  assert page.texts("#languages thead th") == ["language", "tasks", "score"]
  assert page.each(".tasks .chosen", "x.hidden") == [True] * (1 + len(made_up.TASKS))
  assert page.each(".chart", "1") == []


def test_a_slice_without_a_score_is_a_dash(load, evaluation):
  lacking = [
    replace(score, score=math.nan) if score.size == (512, 4, 8, "float32") else score
    for score in evaluation.scores
  ]
  page = load(replace(evaluation, scores=lacking))
  assert page.rows("#depths tbody")[-1][:2] == ["4", "–"]
  page.select("Depth", 4)
  page.select("Dimension", 8)
  assert page.text("#chosen") == "depth 4, dim 8, rank 512, float32: not measured"
  assert page.texts("td.chosen") == ["–"] * len(made_up.TASKS)


def test_texts_of_the_data_stay_texts(load, evaluation):
  scores = [
    replace(of, task=HOSTILE + of.task, by_language={HOSTILE: 0.5, **of.by_language})
    for of in evaluation.scores
  ]
  tasks = [replace(task, name=HOSTILE + task.name) for task in evaluation.tasks]
  hostile = replace(evaluation, scores=scores, tasks=tasks)
  page = load(hostile)
  page.select("Score of", 1)
  assert HOSTILE in [row[0] for row in page.rows("#languages tbody")]
  assert page.each("img", "1") == []
  assert page.text("head title") == "mlembed-0.6b: scores by size"
  assert "–" not in page.texts("td.chosen")
