"""Means, the cheapest good slices and Pareto fronts: by hand, and against brute force."""

import dataclasses
import itertools
import math

import pytest

from mlembed_jax.eval import summary
from mlembed_jax.eval.evaluation import BodyCost, Costs, Evaluation, Latency, TaskSummary
from mlembed_jax.slice_scores import SliceScore
from tests.eval import made_up


def small(values, tasks=("a",), latency=True):
  """Returns an evaluation of (rank, depth, dim, precision) -> a score per task."""
  costs = Costs(
    parameters=[
      BodyCost(rank, depth, count=10 * rank + depth, flops_per_token=rank + 100 * depth)
      for rank, depth in {size[:2] for size in values}
    ],
    latency_ms=[Latency(depth, 2.0 * depth, 32) for depth in (1, 2)] if latency else [],
    device="cpu",
  )
  scores = [
    SliceScore(task, "f1", *size, score, {"de": score})
    for size, of_tasks in values.items()
    for task, score in zip(tasks, of_tasks, strict=True)
  ]
  about = [TaskSummary(task, "bitext", "f1", texts=9, languages=1) for task in tasks]
  return Evaluation("m", ["float32"], about, scores, costs, {})


BY_HAND = {
  (8, 1, 16, "float32"): [0.76],
  (8, 1, 64, "int8"): [0.77],
  (8, 2, 16, "float32"): [0.79],
  (8, 2, 64, "float32"): [0.8],
  (4, 2, 64, "int8"): [0.795],
  (4, 2, 64, "binary"): [0.5],
}


def test_the_cheapest_of_a_hand_made_table():
  found = summary.cheapest(small(BY_HAND), 0.01)
  assert {cost: point.size for cost, point in found.items()} == {
    "bytes": (4, 2, 64, "int8"),  # 64 bytes like 16 floats, but fewer FLOPs
    "flops": (4, 2, 64, "int8"),
    "parameters": (4, 2, 64, "int8"),
    "latency": (4, 2, 64, "int8"),
  }


def test_a_score_on_the_threshold_counts():
  found = summary.cheapest(small(BY_HAND), 0.05)
  assert found["latency"].size == (8, 1, 64, "int8")  # as cheap in all, and better than 0.76
  assert found["bytes"].costs == {"bytes": 64, "flops": 108, "parameters": 81, "latency": 2.0}
  alone = {size: of for size, of in BY_HAND.items() if size != (8, 1, 64, "int8")}
  assert summary.cheapest(small(alone), 0.05)["flops"].score == 0.76


def test_bytes_of_a_vector():
  expected = {"float32": 400, "int8": 100, "uint8": 100, "binary": 13, "ubinary": 13}
  assert {name: summary.vector_bytes(100, name) for name in expected} == expected


def test_the_mean_needs_every_task():
  scores = {
    (8, 1, 16, "int8"): [0.5, 0.7],
    (8, 1, 64, "int8"): [0.9, math.nan],
  }
  evaluation = small(scores, ("a", "b"))
  assert [point.score for point in summary.points(evaluation)] == [pytest.approx(0.6)]
  assert [point.score for point in summary.points(evaluation, "a")] == [0.5, 0.9]


def test_no_slice_is_an_error():
  with pytest.raises(ValueError, match="no slice has a score in every task"):
    summary.points(small({}))


def test_a_full_table_is_the_largest_rank():
  points = summary.points(small({(0, 1, 8, "int8"): [0.1], (64, 1, 8, "int8"): [0.2]}))
  assert summary.axis(points, "rank") == [64, 0]
  assert summary.full(points).rank == 0
  assert summary.best(points).rank == 64


def test_a_negative_best_score():
  scores = {(8, 1, 8, "int8"): [-0.104], (8, 1, 16, "int8"): [-0.1], (8, 1, 4, "int8"): [-0.2]}
  assert summary.cheapest(small(scores), 0.05)["bytes"].dim == 8


@pytest.fixture(scope="module")
def evaluation():
  return made_up.evaluation()


def by_brute_force(points, share, cost):
  order = [cost, *(c for c in ("bytes", "flops", "parameters", "latency") if c != cost)]
  top, kept = max(p.score for p in points), None
  for point in points:
    if point.score < (1 - share) * top:
      continue
    price = [*(point.costs[c] for c in order), -point.score]
    if kept is None or price < kept[0]:
      kept = price, point
  return kept[1]


@pytest.mark.parametrize("share", [0.0, 0.01, 0.05, 0.3])
def test_the_cheapest_is_that_of_brute_force(evaluation, share):
  points = summary.points(evaluation)
  assert len(points) == 7 * 8 * 4 * 3
  for cost, point in summary.cheapest(evaluation, share).items():
    assert point == by_brute_force(points, share, cost)


@pytest.mark.parametrize("cost", summary.COSTS)
def test_the_front_has_all_that_nothing_beats(evaluation, cost):
  points = summary.points(evaluation)
  front = summary.front(points, cost)
  values = {
    (p.costs[cost], p.score)
    for p in points
    if not any(
      q.costs[cost] <= p.costs[cost]
      and q.score >= p.score
      and (q.costs[cost], q.score) != (p.costs[cost], p.score)
      for q in points
    )
  }
  assert {(p.costs[cost], p.score) for p in front} == values
  assert len(front) == len(values)
  for cheap, dear in itertools.pairwise(front):
    assert cheap.costs[cost] < dear.costs[cost] and cheap.score < dear.score


def test_without_latency():
  evaluation = small(BY_HAND, latency=False)
  assert list(summary.cheapest(evaluation, 0.01)) == ["bytes", "flops", "parameters"]
  assert summary.front(summary.points(evaluation), "latency") == []
  assert "latency" not in summary.text_table(evaluation)


def test_without_any_costs_bytes_remain():
  evaluation = dataclasses.replace(small(BY_HAND), costs=Costs())
  assert list(summary.cheapest(evaluation, 0.05)) == ["bytes"]


@pytest.mark.parametrize(
  ("cost", "value", "text"),
  [
    ("bytes", 4096, "4,096 B"),
    ("flops", 8.8e8, "880 M"),
    ("flops", 1.389e10, "13.9 G"),
    ("parameters", 518782976, "519 M"),
    ("parameters", 999_600, "1.00 M"),
    ("parameters", 950, "950"),
    ("latency", 41.23, "41.2 ms"),
  ],
)
def test_costs_are_shown_to_three_digits(cost, value, text):
  assert summary.shown(cost, value) == text


def test_the_text_of_a_grid(evaluation):
  lines = summary.text_table(evaluation).splitlines()
  headings = [line for line in lines if line.endswith(":")]
  tasks = [task.name for task in evaluation.tasks]
  pairs = "queries at one depth, documents at another (mean of 4 tasks)"
  assert headings == [f"{name}:" for name in [*tasks, "mean", "mean at full depth", pairs]]
  top = summary.full(summary.points(evaluation)).score
  full_depth = next(line for line in lines[lines.index("mean:") :] if line.startswith("| 28 |"))
  assert full_depth.endswith(f"| {summary.percent(top)} |")
  half = lines[lines.index(f"{pairs}:") :][7]  # after depths 4, 8 and 12
  assert half.startswith("| 16 |") and half.endswith(f"| {16 + 2 * 28}.0 |")
  assert half.split(" | ")[4] == next(
    summary.percent(p.score)
    for p in summary.points(evaluation)
    if p.size == summary.full(summary.points(evaluation)).size._replace(depth=16)
  )
  assert sum(line.startswith("| latency |") for line in lines) == 2


def test_the_text_of_one_slice():
  text = summary.text_table(small({(0, 2, 64, "float32"): [0.5, 0.7]}, ("a", "b")))
  assert text == ("| task | float32 |\n| --- | --- |\n| a | 50.0 |\n| b | 70.0 |\n| mean | 60.0 |")
