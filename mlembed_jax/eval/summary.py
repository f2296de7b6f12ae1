"""What the scores of all slices say: means over tasks, the cheapest good slices, Pareto fronts.

Pure functions of an `Evaluation`, the content of scores.json; no arrays, no HTML.
"""

import dataclasses
import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from mlembed_jax.eval.evaluation import Evaluation
from mlembed_jax.slice_scores import Size, SliceScore

AXES = Size._fields
COSTS = {
  "bytes": "bytes per vector",
  "flops": "FLOPs per token",
  "parameters": "parameters",
  "latency": "latency",
}
UNITS = {  # as they follow `shown`
  "bytes": "per vector",
  "flops": "FLOPs per token",
  "parameters": "parameters",
  "latency": "per text",
}
SHARES = (0.01, 0.05)  # a cheaper slice may lose this much of the best score
ROUNDING = 1e-12  # 0.95 * 0.8 and 0.76 are the same score


@dataclasses.dataclass(frozen=True)
class Point:
  """One slice of the model."""

  rank: int  # 0: one full table
  depth: int
  dim: int
  precision: str
  score: float  # higher is better
  costs: dict[str, float]  # those of COSTS that are known

  @property
  def size(self) -> Size:
    """The place of the slice on the four axes."""
    return Size(self.rank, self.depth, self.dim, self.precision)


def task_names(evaluation: Evaluation) -> list[str]:
  """Returns the tasks that have a score, in order."""
  return list(dict.fromkeys(s.task for s in evaluation.scores if math.isfinite(s.score)))


def points(evaluation: Evaluation, task: str | None = None) -> list[Point]:
  """Returns the slices with their score in one task, or the mean over all; smallest sizes first.

  A slice without a (finite) score in each of these tasks is left out: its mean is not comparable.

  Raises:
    ValueError: no slice is left.
  """
  names = task_names(evaluation) if task is None else [task]
  scores: dict[Size, dict[str, float]] = defaultdict(dict)
  for found in evaluation.scores:
    if found.task in names and math.isfinite(found.score):
      scores[found.size][found.task] = found.score
  costs = _costs(evaluation)
  whole = [size for size, by_name in scores.items() if len(by_name) == len(names)]
  if not whole:
    raise ValueError(f"no slice has a score in {task or 'every task'}")
  return [
    Point(*size, statistics.fmean(scores[size].values()), costs(size))
    for size in sorted(whole, key=by_size)
  ]


def by_size(size: Size) -> tuple[float, ...]:
  """Returns the sort key that puts small slices first; a full table is the largest rank."""
  return size.rank or math.inf, size.depth, size.dim, vector_bytes(size.dim, size.precision)


def vector_bytes(dim: int, precision: str) -> int:
  """Returns the bytes of one stored vector."""
  if precision in ("binary", "ubinary"):
    return -(-dim // 8)
  return dim if precision in ("int8", "uint8") else 4 * dim


def _costs(evaluation: Evaluation) -> Callable[[Size], dict[str, float]]:
  """Returns the function from a slice to its known costs."""
  bodies = {(cost.rank, cost.depth): cost for cost in evaluation.costs.parameters}
  latency = {cost.depth: cost.ms for cost in evaluation.costs.latency_ms}

  def of_size(size: Size) -> dict[str, float]:
    body = bodies.get((size.rank, size.depth))
    known = {
      "bytes": vector_bytes(size.dim, size.precision),
      "flops": body.flops_per_token if body else None,
      "parameters": body.count if body else None,
      "latency": latency.get(size.depth),
    }
    return {name: value for name, value in known.items() if value is not None}

  return of_size


AnySlice = TypeVar("AnySlice", Point, SliceScore)


def axis(slices: Sequence[AnySlice], name: str) -> list[Any]:
  """Returns the values of one axis, smallest first."""
  ordered = sorted(slices, key=lambda s: by_size(s.size)[AXES.index(name)])
  return list(dict.fromkeys(getattr(s, name) for s in ordered))


def full(slices: Sequence[AnySlice]) -> AnySlice:
  """Returns the largest slice."""
  return max(slices, key=lambda s: by_size(s.size))


def best(points: Sequence[Point]) -> Point:
  """Returns the slice of the highest score, the cheapest of several."""
  return min(points, key=lambda point: (-point.score, *_price(point, "bytes")))


def cheapest(evaluation: Evaluation, share: float) -> dict[str, Point]:
  """Returns per cost the slice of least cost whose mean score is near that of the best.

  Near: at most `share` of the best score is lost. Equal costs are decided by the other costs in the
  order of COSTS, then by the score. Costs that are not known are left out.
  """
  all_points = points(evaluation)
  top = best(all_points).score
  least = top - share * abs(top) - ROUNDING  # scores of STS may be negative
  good = [point for point in all_points if point.score >= least]
  return {
    cost: min((p for p in good if cost in p.costs), key=lambda p, cost=cost: _price(p, cost))
    for cost in COSTS
    if any(cost in point.costs for point in good)
  }


def _price(point: Point, cost: str) -> tuple[float, ...]:
  order = [cost, *(other for other in COSTS if other != cost)]
  return (*(point.costs.get(name, math.inf) for name in order), -point.score)


def front(points: Sequence[Point], cost: str) -> list[Point]:
  """Returns the Pareto front, cheapest first: no other slice is as cheap and better."""
  kept: list[Point] = []
  known = [point for point in points if cost in point.costs]
  for point in sorted(known, key=lambda p: (p.costs[cost], -p.score, *_price(p, cost))):
    if not kept or point.score > kept[-1].score:
      kept.append(point)
  return kept


def varying(points: Sequence[Point]) -> list[str]:
  """Returns the costs in which slices differ: with one value there is nothing to choose."""
  return [
    cost
    for cost in COSTS
    if len({point.costs[cost] for point in points if cost in point.costs}) > 1
  ]


def saving(point: Point, whole: Point, cost: str) -> float | None:
  """Returns how many times cheaper a slice is than the whole model; None: not known."""
  return whole.costs[cost] / point.costs[cost] if cost in whole.costs else None


def percent(score: float | None, digits: int = 1) -> str:
  """Returns a score times 100, a dash for none."""
  return "–" if score is None or not math.isfinite(score) else f"{100 * score:.{digits}f}"


def name(point: Point, among: Sequence[Point]) -> str:
  """Returns what tells a slice from the others; axes with one value are not named."""
  parts = {
    "depth": f"depth {point.depth}",
    "dim": f"dim {point.dim}",
    "rank": f"rank {point.rank or 'full'}",
    "precision": point.precision,
  }
  return ", ".join(text for key, text in parts.items() if len(axis(among, key)) > 1) or "the model"


def shown(cost: str, value: float) -> str:
  """Returns a cost to three digits."""
  if cost == "bytes":
    return f"{value:,.0f} B"
  if cost == "latency":
    return f"{value:.3g} ms"
  for unit, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
    if value >= 0.9995 * unit:
      return f"{value / unit:.{2 - int(math.log10(value / unit))}f} {prefix}"
  return f"{value:.0f}"


def times(factor: float | None) -> str:
  """Returns a factor of cost as text, a dash where it is not known."""
  return "–" if factor is None else f"{factor:.1f} x" if factor < 9.95 else f"{factor:.0f} x"


@dataclasses.dataclass(frozen=True)
class PairTable:
  """Mean scores of queries at one size against documents at another, along one axis."""

  axis: str  # depth or rank
  sizes: list[int]  # smallest first
  tasks: int  # whose mean it is
  cells: dict[tuple[int, int], float]  # (size of the queries, size of the documents)

  @property
  def title(self) -> str:
    """What the table shows."""
    tasks = f"mean of {self.tasks} tasks" if self.tasks > 1 else "one task"
    return f"queries at one {self.axis}, documents at another ({tasks})"


def pair_tables(evaluation: Evaluation) -> list[PairTable]:
  """Returns the table of depths at full rank and that of ranks at full depth, where there are any.

  Tasks without documents, and those of MTEB, are no part of the means.
  """
  having = {found.task for found in evaluation.asymmetric}
  tasks = [name for name in task_names(evaluation) if name in having]
  found = [_pair_table(evaluation, tasks, axis) for axis in ("depth", "rank")] if tasks else []
  return [table for table in found if any(query != size for query, size in table.cells)]


def _pair_table(evaluation: Evaluation, tasks: list[str], name: str) -> PairTable:
  same = [s for s in evaluation.scores if s.task in tasks]
  whole = full(same)
  other = "rank" if name == "depth" else "depth"
  scores: dict[tuple[int, int], list[float]] = defaultdict(list)
  for s in same:
    if s.size == whole.size._replace(**{name: getattr(s, name)}):
      scores[getattr(s, name), getattr(s, name)].append(s.score)
  for pair in (pair for pair in evaluation.asymmetric if pair.task in tasks):
    if getattr(pair, other) == getattr(pair, f"query_{other}") == getattr(whole, other):
      scores[getattr(pair, f"query_{name}"), getattr(pair, name)].append(pair.score)
  cells = {pair: statistics.fmean(found) for pair, found in scores.items()}
  return PairTable(name, axis(same, name), len(tasks), cells)


def _pairs_text(table: PairTable) -> str:
  rows = [
    [str(query or "full"), *(percent(table.cells.get((query, size))) for size in table.sizes)]
    for query in table.sizes
  ]
  header = [f"queries \\ documents, {table.axis}", *(str(size or "full") for size in table.sizes)]
  return f"{table.title}:\n\n{markdown(header, rows)}"


def text_table(evaluation: Evaluation) -> str:
  """Returns the scores in percent and the cheapest slices as markdown tables.

  Depth x dim of each task and of their mean at full rank and precision, then rank x dim of the mean
  at full depth, and queries at one size against documents at another; of a single slice, its tasks
  by precision.
  """
  tasks = task_names(evaluation)
  by_task = {task: points(evaluation, task) for task in tasks}
  if len(tasks) > 1:
    by_task["mean"] = points(evaluation)
  means = points(evaluation)
  if len(axis(means, "depth")) == len(axis(means, "dim")) == len(axis(means, "rank")) == 1:
    parts = [_by_precision(by_task)]
  else:
    parts = [
      f"{task}:\n\n{_by_dim(task_points, 'depth', _cell)}" for task, task_points in by_task.items()
    ]
    if len(axis(means, "rank")) > 1:
      parts.append(f"mean at full depth:\n\n{_by_dim(means, 'rank', _cell)}")
    parts += map(_pairs_text, pair_tables(evaluation))
  return "\n\n".join([*parts, *_cheapest_table(evaluation, means)])


def _cell(point: Point) -> str:
  return percent(point.score)


def _by_precision(by_task: dict[str, list[Point]]) -> str:
  precisions = axis(
    [point for task_points in by_task.values() for point in task_points], "precision"
  )
  rows = []
  for task, task_points in by_task.items():
    scores = {point.precision: point.score for point in task_points}
    rows.append([task, *(percent(scores.get(precision)) for precision in precisions)])
  return markdown(["task", *precisions], rows)


def change_table(before: Sequence[SliceScore], after: Sequence[SliceScore]) -> str:
  """Returns the scores of one task before -> after training in percent, as markdown tables.

  Depth x dim at the full rank, then rank x dim at the full depth.
  """
  old = {s.size: s.score for s in before}

  def cell(found: SliceScore) -> str:
    return f"{percent(old.get(found.size), 0)} → {percent(found.score, 0)}"

  rows = ["depth", *(["rank"] if len(axis(after, "rank")) > 1 else [])]
  return "\n\n".join(_by_dim(after, name, cell) for name in rows)


def _by_dim(slices: Sequence[AnySlice], rows: str, cell: Callable[[AnySlice], str]) -> str:
  """Returns depths or ranks x dims; the two other axes are at their largest."""
  dims = axis(slices, "dim")
  found = grid(slices, rows, full(slices))
  lines = [
    [str(row or "full"), *(cell(found[row, dim]) if (row, dim) in found else "–" for dim in dims)]
    for row in axis(slices, rows)
  ]
  return markdown([rows, *(f"dim {dim}" for dim in dims)], lines)


def grid(slices: Sequence[AnySlice], rows: str, at: AnySlice) -> dict[tuple[int, int], AnySlice]:
  """Returns slices by (value of the axis `rows`, dim); the two other axes are as in `at`."""
  others = [key for key in AXES if key not in (rows, "dim")]
  return {
    (getattr(s, rows), s.dim): s
    for s in slices
    if all(getattr(s, key) == getattr(at, key) for key in others)
  }


def _cheapest_table(evaluation: Evaluation, points: Sequence[Point]) -> list[str]:
  costs, whole = varying(points), full(points)
  found = [(share, cheapest(evaluation, share)) for share in SHARES]
  rows = []
  for cost in costs:
    for share, point in ((share, by_cost[cost]) for share, by_cost in found if cost in by_cost):
      paid = [shown(cost, point.costs[cost]), times(saving(point, whole, cost))]
      rows.append([COSTS[cost], f"{share:.0%}", name(point, points), percent(point.score), *paid])
  header = ["cheapest by", "within", "slice", "score", "cost", "saves"]
  return [markdown(header, rows)] if rows else []


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  """Returns a markdown table."""
  lines = [header, ["---"] * len(header), *rows]
  return "\n".join("| " + " | ".join(line) + " |" for line in lines)
