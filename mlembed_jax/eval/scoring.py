"""Scores of an encoder in many slices, kept by task, and what the slices cost."""

import dataclasses
import hashlib
import json
import pathlib
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from tqdm import tqdm

from mlembed_jax import __version__
from mlembed_jax.errors import ConfigError, DataError
from mlembed_jax.eval import grid
from mlembed_jax.eval.grid import Axes, Record
from mlembed_jax.eval.tasks import Task
from mlembed_jax.files import write_json
from mlembed_jax.inference import Encoder
from mlembed_jax.matryoshka import Slice
from mlembed_jax.models import flops
from mlembed_jax.models.encoder import parameter_count

GRID_PRECISIONS = ("float32", "int8", "binary")
TIMED_TOKENS, TIMED_RUNS = 32, 9  # of the text whose latency is measured


def trained_axes(encoder: Encoder) -> Axes:
  """Returns every trained depth, rank and dim, in all precisions that are scored."""
  trained = encoder.sizes
  return Axes(trained.ranks or (0,), trained.depths, trained.dims, GRID_PRECISIONS)


def one_slice(encoder: Encoder, cut: Slice, precision: str, untrained: bool) -> Axes:
  """Returns the axes of a single slice.

  Raises:
    ValueError: a size that the model lacks, or that was not trained unless `untrained` is True.
  """
  encoder.check(cut.depth, cut.rank, cut.dim, untrained)
  depth = cut.depth or encoder.config().layers
  return Axes((cut.rank or 0,), (depth,), (cut.dim or encoder.dim,), (precision,))


def score(encoder: Encoder, task: Task, axes: Axes) -> dict[str, Any]:
  """Returns the records of a task, and how many of its texts were cut.

  Raises:
    DataError: a vector is not finite.
  """
  before, bar = encoder.truncated, sys.stderr.isatty()
  # A single exit needs no layer above it.
  depth = axes.exits[-1] if len(axes.exits) == 1 else None

  def encode(ids: grid.Ids, rank: int) -> Any:
    return encoder.states(ids, axes.exits, depth, rank or None, show_progress_bar=bar)

  try:
    with warnings.catch_warnings(action="ignore"):  # texts that are cut are counted
      ids = encoder.ids(task.texts, "")
    records = grid.score(task, ids, axes, encode)
    return {"records": records, "truncated": encoder.truncated - before}
  except ValueError as error:
    raise DataError(f"{task.name}: {error}") from error


def kept(path: pathlib.Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
  """Returns the JSON object of a file, which is made if it is not there."""
  if not path.is_file():
    write_json(path, make())
  return json.loads(path.read_text(encoding="utf-8"))


def costs(encoder: Encoder, axes: Axes) -> dict[str, Any]:
  """Returns what slices cost: parameters and FLOPs by formula, the latency of a text measured."""
  sizes = [(rank, depth) for rank in axes.ranks for depth in axes.exits]
  configs = {size: encoder.config(size[1], size[0] or None) for size in sizes}
  return {
    "parameters": [
      {
        "rank": rank,
        "exit": depth,
        "count": parameter_count(config),
        "flops_per_token": flops.forward_flops(config, 1.0, 0.0),
      }
      for (rank, depth), config in configs.items()
    ],
    "latency_ms": [
      {"exit": depth, "ms": _latency_ms(encoder, depth), "tokens": TIMED_TOKENS}
      for depth in axes.exits
    ],
    "device": f"{jax.local_device_count()} x {jax.local_devices()[0].device_kind}",
  }


def _latency_ms(encoder: Encoder, depth: int) -> float:
  """Returns the median time to encode one text, the program being compiled."""
  times = []
  for _ in range(TIMED_RUNS + 1):
    start = time.perf_counter()
    encoder.states([[0] * TIMED_TOKENS], (depth,), depth)
    times.append(1000 * (time.perf_counter() - start))
  return statistics.median(times[1:])


def check_named(names: Sequence[str]) -> None:
  """Raises DataError where MTEB has no such task, ConfigError where it is not installed."""
  try:
    from mlembed_jax.eval import mteb  # an extra of the package
  except ImportError as error:
    raise ConfigError(f"--tasks: {error}") from error
  for name in names:
    mteb.find_task(name)


def _of_mteb(encoder: Encoder, names: Sequence[str], axes: Axes, out: pathlib.Path) -> list[Record]:
  from mlembed_jax.eval import mteb

  slices = [
    Slice(rank=rank or None, depth=depth, dim=dim)
    for rank in axes.ranks
    for depth in axes.exits
    for dim in axes.dims
  ]
  return mteb.evaluate(encoder, names, slices, out)


def evaluate(
  encoder: Encoder,
  tasks: Sequence[Task],
  named: Sequence[str],
  axes: Axes,
  out: pathlib.Path,
  pooled_token: str | None = None,
) -> dict[str, Any]:
  """Returns scores.json: what was scored, the records of every slice, and what slices cost.

  Args:
    encoder: the model.
    tasks: held-out tasks that are scored here.
    named: names of tasks of MTEB, scored by MTEB.
    axes: depths, ranks, dims and precisions to score.
    out: folder where the records of finished tasks are kept; those of the same settings are read.
    pooled_token: the token that was given to `Encoder.load`, if any.
  """
  settings = [__version__, encoder.fingerprint, encoder.config().dtype, encoder.max_seq_length]
  settings += [pooled_token, dataclasses.asdict(axes)]
  scored = []
  for task in tqdm(tasks, desc="tasks", disable=None):
    digest = hashlib.sha256(json.dumps([*settings, task.name, task.digest]).encode()).hexdigest()
    file = out / "tasks" / f"{digest[:24]}.json"
    scored.append(kept(file, lambda task=task: score(encoder, task, axes)))
  records = [record for task in scored for record in task["records"]]
  records += _of_mteb(encoder, named, axes, out / "mteb") if named else []
  texts = {task.name: {"type": task.type, "texts": len(task.texts)} for task in tasks}
  return {
    "model": encoder.name,
    "precisions": list(axes.precisions),
    "tasks": _described(records, texts),
    "scores": records,
    "costs": costs(encoder, axes),
    "skipped": {"texts_truncated": sum(task["truncated"] for task in scored)},
  }


def _described(records: Sequence[Record], texts: Mapping[str, Any]) -> list[dict[str, Any]]:
  """Returns what was scored; how many texts MTEB has is not known here."""
  first = {record["task"]: record for record in reversed(records)}
  return [
    {"name": name, "type": "mteb", "metric": record["metric"], "texts": None}
    | texts.get(name, {})
    | {"languages": len(record["by_language"])}
    for name, record in reversed(first.items())
  ]
