"""Held-out quality of every slice: each rank is one pass over the texts, which gives all exits."""

import dataclasses
import itertools
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float

from mlembed_jax.config_fields import Config
from mlembed_jax.data.tokenizer import Tokenizer
from mlembed_jax.eval.tasks import ByLanguage, Task
from mlembed_jax.matryoshka import Slice, plan, slice_config, slice_params
from mlembed_jax.models.states import states
from mlembed_jax.parallel import processes
from mlembed_jax.parallel.sharding import batch_sharding
from mlembed_jax.quantize import rounded, unit

Record = dict[str, Any]
Ids = Sequence[Sequence[int]]


@dataclasses.dataclass(frozen=True)
class Axes:
  """The slices to score: all combinations."""

  ranks: tuple[int, ...]  # 0: the token table as it is
  exits: tuple[int, ...]
  dims: tuple[int, ...]
  precisions: tuple[str, ...] = ("float32",)


def evaluate(
  config: Config, params: Any, tasks: Sequence[Task], tokenizer: Tokenizer, mesh: Mesh
) -> list[Record]:
  """Returns the records of all trained slices of parameters on a mesh, on every process."""
  trained = plan(config.model, config.matryoshka)
  axes = Axes(trained.ranks or (0,), trained.exits, trained.dims)

  def encode(ids: Ids, rank: int) -> Float[np.ndarray, "E N D"]:
    cut = Slice(rank=rank or None)
    return states(
      slice_config(config.model, cut),
      slice_params(params, cut),
      ids,
      exits=axes.exits,
      lengths=config.data.lengths,
      rows=lambda _: config.eval.batch_size,
      sharding=batch_sharding(mesh),
    )

  def ids(task: Task) -> Ids:
    return tokenizer.encode(task.texts, config.data.lengths[-1])

  return [record for task in tasks for record in score(task, ids(task), axes, encode)]


def score(
  task: Task, ids: Ids, axes: Axes, encode: Callable[[Ids, int], Float[np.ndarray, "E N D"]]
) -> list[Record]:
  """Returns one record per rank, exit, dim and precision, on every process.

  A record holds task, metric, rank, exit, dim, precision, score (mean over languages),
  by_language, and others: the means of the other scores. `encode` gives the final-norm states of
  all exits at a rank; each process of a run scores its part of them.
  """
  records = []
  for rank in axes.ranks:
    states_END = encode(ids, rank)
    slices = list(itertools.product(range(len(axes.exits)), axes.dims, axes.precisions))
    records += processes.shared(
      slices, lambda s, rank=rank, states=states_END: _record(task, axes, rank, states, *s)
    )
  return records


def _record(
  task: Task, axes: Axes, rank: int, states_END: np.ndarray, exit: int, dim: int, precision: str
) -> Record:
  cut = {"rank": rank, "exit": axes.exits[exit], "dim": dim, "precision": precision}
  return {"task": task.name, "metric": task.metric, **cut} | summary(
    task.metric, task.score(vectors(states_END[exit], dim, precision))
  )


def summary(metric: str, by_language: ByLanguage) -> dict[str, Any]:
  """Returns the scores of a record: the mean of the main one, that by language, other means."""
  names = next(iter(by_language.values())).keys()
  means = {name: statistics.fmean(found[name] for found in by_language.values()) for name in names}
  return {
    "score": means.pop(metric),
    "by_language": {lang: found[metric] for lang, found in by_language.items()},
    "others": means,
  }


def vectors(states_ND: np.ndarray, dim: int, precision: str) -> Float[np.ndarray, "N M"]:
  """Returns the unit vectors of states that a slice gives, after rounding to a precision."""
  return unit(rounded(unit(states_ND[:, :dim]), precision))


def table(before: list[Record], after: list[Record], task: str) -> str:
  """Returns one task's scores before -> after training in percent: depth x dim, then rank x dim.

  The first table is at the full rank, the second at the full depth.
  """
  old, new = (
    {(r["rank"], r["exit"], r["dim"]): r["score"] for r in records if r["task"] == task}
    for records in (before, after)
  )
  ranks, exits, dims = (sorted({key[i] for key in new}) for i in range(3))

  def percent(score: float | None) -> str:
    return "–" if score is None else f"{100 * score:.0f}"

  def line(name: str, rank: int, depth: int) -> str:
    keys = [(rank, depth, dim) for dim in dims]
    cells = (f"{percent(old.get(key))} → {percent(new[key])}" for key in keys)
    return f"| {name} | " + " | ".join(cells) + " |"

  header = " | ".join(f"dim {dim}" for dim in dims)
  lines = [f"| depth | {header} |", "|" + " --- |" * (len(dims) + 1)]
  lines += [line(str(depth), ranks[-1], depth) for depth in exits]
  if len(ranks) > 1:
    lines += ["", f"| rank | {header} |", "|" + " --- |" * (len(dims) + 1)]
    lines += [line(str(rank), rank, exits[-1]) for rank in ranks]
  return "\n".join(lines)
