"""The scores of all slices as one HTML file that needs no network and no other file.

The answer and the tables are written here, so they are there without JavaScript, too; report.js,
put into report.html, draws the rest from the same numbers.
"""

import dataclasses
import html
import json
import math
import pathlib
import re
import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from mlembed_jax.eval import summary
from mlembed_jax.eval.evaluation import Evaluation, TaskSummary
from mlembed_jax.eval.summary import Point
from mlembed_jax.files import write_text
from mlembed_jax.slice_scores import Size, SliceScore

HERE = pathlib.Path(__file__).parent
DIGITS = 6  # a stored score has so many. The page shows three; four would round twice


def write_page(path: str | pathlib.Path, evaluation: Evaluation) -> None:
  """Writes the page about the content of scores.json.

  Raises:
    ValueError: no slice has a score in every task.
  """
  write_text(pathlib.Path(path), page(evaluation))


def page(evaluation: Evaluation) -> str:
  """Returns the HTML page about an evaluation."""
  points, pairs = summary.points(evaluation), summary.pair_tables(evaluation)
  data = payload(evaluation)
  costs = [cost for cost in summary.varying(points) if len(points) > 1]
  hidden = {
    "one": len(points) == 1,
    "no_depths": max(len(summary.axis(points, key)) for key in ("depth", "dim")) == 1,
    "no_ranks": len(summary.axis(points, "rank")) == 1,
    "no_curves": not costs,
    "no_pairs": not pairs,
  }
  parts = {
    "model": _escape(evaluation.model),
    "title": "Score" if len(points) == 1 else "What the smaller models give",
    "measured": _measured(evaluation, points),
    "answer": _answer(evaluation, points, data),
    "depths": _depths(points),
    "pairs": "\n".join(map(_pairs, pairs)),
    "charts": "\n".join(_chart(cost) for cost in costs),
    "languages": _languages(data),
    "tasks": _tasks(evaluation, summary.full(points)),
    "data": _script_json(data),
    "script": (HERE / "report.js").read_text(encoding="utf-8"),
    **{name: "hidden" if value else "" for name, value in hidden.items()},
  }
  template = (HERE / "report.html").read_text(encoding="utf-8")
  return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template)


def _escape(value: Any) -> str:
  return html.escape(str(value))


def _script_json(value: Any) -> str:
  """Returns JSON in which no text can end the script element around it."""
  text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
  return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def payload(evaluation: Evaluation) -> dict[str, Any]:
  """Returns what the script reads.

  views: the mean of all tasks and each task, with its languages and, per cost, the Pareto front.
  slices: with a score per view, null where there is none, and scores per view and language.
  full, chosen: places in slices.
  """
  tasks = summary.task_names(evaluation)
  by_view = {f"mean of {len(tasks)} tasks": tasks} if len(tasks) > 1 else {}
  by_view |= {task: [task] for task in tasks}
  points = [
    summary.points(evaluation, names[0] if len(names) == 1 else None) for names in by_view.values()
  ]
  union = {point.size: point for view in reversed(points) for point in view}
  sizes = sorted(union, key=summary.by_size)
  place = {size: i for i, size in enumerate(sizes)}
  languages = [_languages_of(evaluation, names) for names in by_view.values()]
  return {
    "axes": {name: summary.axis([*union.values()], name) for name in summary.AXES},
    "costs": summary.COSTS,
    "units": summary.UNITS,
    "views": [
      {"name": name, "languages": codes, "fronts": _fronts(view, place)}
      for name, view, (codes, _) in zip(by_view, points, languages, strict=True)
    ],
    "slices": _slices(sizes, union, points, [scores for _, scores in languages]),
    "full": place[summary.full(points[0]).size],
    "chosen": place[_chosen(evaluation, points[0])],
  }


def _fronts(points: Sequence[Point], place: dict[Size, int]) -> dict[str, list[int]]:
  return {
    cost: [place[point.size] for point in summary.front(points, cost)] for cost in summary.COSTS
  }


def _slices(
  sizes: Sequence[Size],
  points: dict[Size, Point],
  views: Sequence[Sequence[Point]],
  languages: Sequence[Callable[[Size], list[float | None]]],
) -> list[dict[str, Any]]:
  scores = [{point.size: point.score for point in view} for view in views]
  return [
    {
      **size._asdict(),
      "costs": points[size].costs,
      "scores": [_rounded(by_size.get(size)) for by_size in scores],
      "languages": [scores_of(size) for scores_of in languages],
    }
    for size in sizes
  ]


def _rounded(score: float | None) -> float | None:
  return None if score is None or not math.isfinite(score) else round(score, DIGITS)


def _languages_of(
  evaluation: Evaluation, tasks: Sequence[str]
) -> tuple[list[list[Any]], Callable[[Size], list[float | None]]]:
  """Returns [language, number of its tasks], and the function from a slice to their scores.

  The score of a language is the mean over the tasks that have it.
  """
  found: dict[Size, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
  having: dict[str, set[str]] = defaultdict(set)
  for of_slice in evaluation.scores:
    if of_slice.task in tasks:
      for language, score in of_slice.by_language.items():
        having[language].add(of_slice.task)
        found[of_slice.size][language].append(score)
  codes = sorted(having)

  def scores(size: Size) -> list[float | None]:
    by_language = found[size]
    complete = (len(by_language[code]) == len(having[code]) for code in codes)
    return [
      _rounded(statistics.fmean(by_language[code])) if whole else None
      for code, whole in zip(codes, complete, strict=True)
    ]

  return [[code, len(having[code])] for code in codes], scores


def _chosen(evaluation: Evaluation, points: Sequence[Point]) -> Size:
  """Returns the slice to compare with at first: the fastest good one at full rank and precision.

  If that is the full model, the good one of the smallest vectors.
  """
  whole = summary.full(points)
  near = [s for s in evaluation.scores if (s.rank, s.precision) == (whole.rank, whole.precision)]
  found = summary.cheapest(dataclasses.replace(evaluation, scores=near), max(summary.SHARES))
  fast = (found.get("flops") or found["bytes"]).size
  small = summary.cheapest(evaluation, max(summary.SHARES))["bytes"].size
  return small if fast == whole.size else fast


def _measured(evaluation: Evaluation, points: Sequence[Point]) -> str:
  """Returns a paragraph about tasks, slices and the machine."""
  languages = {code for s in evaluation.scores for code in s.by_language}
  # Of tasks of MTEB it is not known.
  texts = sum(task.texts or 0 for task in evaluation.tasks)
  names = {"depth": "depths", "dim": "dimensions", "rank": "ranks", "precision": "precisions"}
  counts = [(len(summary.axis(points, key)), plural) for key, plural in names.items()]
  axes = " × ".join(f"{count} {plural}" for count, plural in counts if count > 1)
  tasks = len(summary.task_names(evaluation))
  said = [
    ", ".join(
      _count(number, word)
      for number, word in ((tasks, "task"), (texts, "text"), (len(languages), "language"))
      if number
    )
    + ".",
    f"{len(points)} slices of one model: {axes}." if axes else "",
    _latency_note(evaluation),
    *(f"{key.replace('_', ' ')}: {n:,}." for key, n in evaluation.skipped.items() if n),
  ]
  return _escape(" ".join(filter(None, said)).replace("texts truncated", "Texts truncated"))


def _count(number: int, word: str) -> str:
  return f"{number:,} {word}{'' if number == 1 else 's'}"


def _latency_note(evaluation: Evaluation) -> str:
  costs = evaluation.costs
  if not costs.latency_ms:
    return ""
  tokens = costs.latency_ms[0].tokens
  return f"Latency: one text of {tokens} tokens at full rank, {costs.device}."


def _answer(evaluation: Evaluation, points: Sequence[Point], data: dict[str, Any]) -> str:
  """Returns the best slice, and per cost the cheapest that are nearly as good."""
  top, whole = summary.best(points), summary.full(points)
  score = f"<strong>{summary.percent(top.score)}</strong> ({_escape(data['views'][0]['name'])})"
  lead = (
    f"Best score {score}: {_slice(top, points, data)}." if len(points) > 1 else f"Score {score}."
  )
  return "\n".join(
    [
      f'<p class="lead">{lead}</p>',
      f"<p>{'Full model' if len(points) > 1 else 'The model'}: {_described(whole)}.</p>",
      _cheapest_table(evaluation, points, data),
    ]
  )


def _described(point: Point) -> str:
  rank = f"rank {point.rank}" if point.rank else "full token table"
  costs = [f"{summary.shown(c, paid)} {summary.UNITS[c]}" for c, paid in point.costs.items()]
  size = f"depth {point.depth}, dim {point.dim}, {rank}, {point.precision}"
  return _escape(f"{size}; {', '.join(costs)}")


def _cheapest_table(evaluation: Evaluation, points: Sequence[Point], data: dict[str, Any]) -> str:
  whole = summary.full(points)
  found = [(share, summary.cheapest(evaluation, share)) for share in summary.SHARES]
  bodies = []
  for cost in summary.varying(points):
    label = summary.COSTS[cost]
    rows = [
      f"<tr><td>{share:.0%}<td>{_slice(by_cost[cost], points, data)}"
      f"<td>{summary.percent(by_cost[cost].score)}"
      f"<td>{summary.shown(cost, by_cost[cost].costs[cost])}"
      f"<td>{summary.times(summary.saving(by_cost[cost], whole, cost)).replace(' x', ' ×')}"
      for share, by_cost in found
      if cost in by_cost
    ]
    head = f'<tr><th colspan="5" scope="rowgroup">{label[0].upper()}{label[1:]}'
    bodies.append("<tbody>" + "\n".join([head, *rows]) + "</tbody>")
  return _table("answer", ["within", "slice", "score", "cost", "saves"], bodies) if bodies else ""


def _slice(point: Point, points: Sequence[Point], data: dict[str, Any]) -> str:
  """Returns the name of a slice; the script makes it a button that chooses the slice."""
  sizes = [Size(*(cut[name] for name in summary.AXES)) for cut in data["slices"]]
  name = _escape(summary.name(point, points))
  return f'<span data-slice="{sizes.index(point.size)}">{name}</span>'


def _table(css: str, header: Sequence[str], bodies: Sequence[str]) -> str:
  cells = "".join(f'<th scope="col">{_escape(name)}' for name in header)
  return f'<table class="{css}"><thead><tr>{cells}</thead>{"".join(bodies)}</table>'


def _depths(points: Sequence[Point]) -> str:
  """Returns depth x dim of the mean at full rank and precision."""
  dims, whole = summary.axis(points, "dim"), summary.full(points)
  cells = summary.grid(points, "depth", whole)
  rows = [
    f'<tr><th scope="row">{depth}'
    + "".join(f"<td>{summary.percent(_score_of(cells.get((depth, dim))))}" for dim in dims)
    for depth in reversed(summary.axis(points, "depth"))
  ]
  return _table("heat", ["depth", *map(str, dims)], ["<tbody>", *rows, "</tbody>"])


def _pairs(table: summary.PairTable) -> str:
  """Returns queries x documents, with what it shows above."""
  sizes = [str(size or "full") for size in table.sizes]
  rows = [
    f'<tr><th scope="row">{query or "full"}'
    + "".join(f"<td>{summary.percent(table.cells.get((query, size)))}" for size in table.sizes)
    for query in reversed(table.sizes)
  ]
  cells = _table("heat", [table.axis, *sizes], ["<tbody>", *rows, "</tbody>"])
  return (
    f"<figure><figcaption>{_escape(table.title[0].upper() + table.title[1:])}</figcaption>"
    f'<div class="scroll">{cells}</div></figure>'
  )


def _score_of(found: Point | SliceScore | None) -> float | None:
  return found.score if found else None


def _chart(cost: str) -> str:
  label = summary.COSTS[cost]
  title = label[0].upper() + label[1:]
  return f'<figure class="chart" data-cost="{cost}"><figcaption>{title}</figcaption></figure>'


def _languages(data: dict[str, Any]) -> str:
  """Returns rows of the full model over all tasks, the worst language first."""
  scores = data["slices"][data["full"]]["languages"][0]
  rows = zip(data["views"][0]["languages"], scores, strict=True)
  ordered = sorted(rows, key=lambda row: (row[1] is None, row[1]))
  return "\n".join(
    f'<tr><th scope="row">{_escape(code)}<td>{tasks}<td>{summary.percent(score)}'
    for (code, tasks), score in ordered
  )


def _tasks(evaluation: Evaluation, whole: Point) -> str:
  """Returns rows of the full model; the script fills the cell of the chosen slice."""
  scores = {s.task: s for s in evaluation.scores if s.size == whole.size}
  return "\n".join(_task(task, scores.get(task.name)) for task in evaluation.tasks)


def _task(task: TaskSummary, found: SliceScore | None) -> str:
  means = found.others if found else {}
  others = ", ".join(f"{key} {summary.percent(score)}" for key, score in means.items())
  texts = "–" if task.texts is None else f"{task.texts:,}"
  cells = [task.type, task.metric, texts, task.languages, others or "–"]
  return (
    f'<tr><th scope="row">{_escape(task.name)}<td>{summary.percent(_score_of(found))}'
    f'<td class="live chosen" data-task="{_escape(task.name)}">'
    + "".join(f"<td>{_escape(cell)}" for cell in cells)
  )
