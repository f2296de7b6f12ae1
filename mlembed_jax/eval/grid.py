"""Held-out quality of every slice: each rank is one pass over the texts, which gives all exits."""

import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from mlembed_jax.config_fields import Config
from mlembed_jax.data.tokenizer import Tokenizer
from mlembed_jax.eval.tasks import Task
from mlembed_jax.matryoshka import Slice, plan, slice_config, slice_params
from mlembed_jax.sharding import batch_sharding
from mlembed_jax.states import states


def evaluate(
  config: Config,
  params: Any,
  tasks: Sequence[Task],
  tokenizer: Tokenizer,
  mesh: Mesh,
) -> list[dict[str, Any]]:
  """Returns one record per task, rank, exit and dim.

  A record holds task, metric, rank (0: full table), exit, dim, score (mean over languages) and
  by_language.
  """
  axes = plan(config.model, config.matryoshka)
  ids = {task.name: tokenizer.encode(task.texts, config.data.lengths[-1]) for task in tasks}
  records = []
  for rank in axes.ranks or (0,):
    cut = Slice(rank=rank or None)
    model, cut_params = slice_config(config.model, cut), slice_params(params, cut)
    for task in tasks:
      states_END = states(
        model,
        cut_params,
        ids[task.name],
        exits=axes.exits,
        lengths=config.data.lengths,
        rows=lambda _: config.eval.batch_size,
        sharding=batch_sharding(mesh),
      )
      records += [
        _record(task, rank, depth, dim, states_ND)
        for depth, states_ND in zip(axes.exits, states_END, strict=True)
        for dim in axes.dims
      ]
  return records


def _record(task: Task, rank: int, depth: int, dim: int, states_ND: np.ndarray) -> dict[str, Any]:
  vectors = states_ND[:, :dim]
  vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
  by_language = task.score(vectors)
  return {
    "task": task.name,
    "metric": task.metric,
    "rank": rank,
    "exit": depth,
    "dim": dim,
    "score": statistics.fmean(by_language.values()),
    "by_language": by_language,
  }


def table(before: list[dict[str, Any]], after: list[dict[str, Any]], task: str) -> str:
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
