"""How many rows fit the devices at a time, by the compiler's own account of memory."""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from mlembed_jax import optimizer, train_state, train_step
from mlembed_jax.config_fields import Config, ConfigError
from mlembed_jax.data.sources import Dataset
from mlembed_jax.losses import Task
from mlembed_jax.sharding import abstract_batch, replicas
from mlembed_jax.teacher import Teacher

# Of a device's memory; the rest is for batches on their way, and for fragmentation.
USABLE = 0.9
# Of a batch: {name: (shape, dtype)}.
Shapes = dict[str, tuple[tuple[int, ...], Any]]
CGROUP = pathlib.Path("/sys/fs/cgroup/memory.max")


def device_bytes() -> int:
  """Returns what one step may take on each device."""
  device = jax.local_devices()[0]
  stats = device.memory_stats() if device.platform != "cpu" else None
  if stats:
    return int(USABLE * stats["bytes_limit"])
  total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
  if CGROUP.is_file() and (limit := CGROUP.read_text().strip()).isdigit():
    total = min(total, int(limit))
  return int(USABLE * total) // jax.local_device_count()


def needed_bytes(compiled: Any) -> int:
  """Returns the bytes of one device that a compiled program takes: inputs, outputs, temporaries."""
  m = compiled.memory_analysis()
  donated = m.alias_size_in_bytes  # outputs in the place of inputs
  return m.argument_size_in_bytes + m.output_size_in_bytes + m.temp_size_in_bytes - donated


def sizes(global_batch: int, replicas: int) -> list[int]:
  """Returns the micro-batches that divide the batch and split over the devices, ascending."""
  return [n for n in range(replicas, global_batch + 1, replicas) if global_batch % n == 0]


def largest_micro_batch(
  sizes: list[int], needed: Callable[[int], int | None], available: int
) -> int:
  """Returns the largest of `sizes` (ascending) that fits; `needed` compiles, so few are tried.

  `needed` may return None where the compiler itself gives up.

  Raises:
    ConfigError: even the smallest does not fit.
  """

  def fits(size: int) -> bool:
    found = needed(size)
    return found is not None and found <= available

  if fits(sizes[-1]):
    return sizes[-1]
  low, high = 0, len(sizes) - 1  # sizes[high] does not fit
  if high == 0 or not fits(sizes[0]):
    raise ConfigError(
      f"data.micro_batch: not even {sizes[0]} rows at a time fit {available / 2**30:.1f} GiB per "
      "device; use more devices, mesh.tensor, shorter data.lengths or fewer negatives"
    )
  while high - low > 1:
    middle = (low + high) // 2
    low, high = (middle, high) if fits(sizes[middle]) else (low, middle)
  return sizes[low]


def with_micro_batch(
  config: Config,
  chosen: int,
  datasets: Sequence[Dataset],
  steps: int,
  mesh: Mesh,
  teacher: Teacher | None,
) -> Config:
  """Returns the configuration with `data.micro_batch` chosen where it is 0.

  The largest that fits the longest rows of the dataset with most texts per row (of several such,
  the one with most beside them: other rows, both directions, a teacher's vectors). `chosen` is the
  choice of the run that is continued, 0 for a new one; it stays unless the mesh cannot split it.

  Raises:
    ConfigError: not even one row per device fits.
  """
  if config.data.micro_batch:
    return config
  available, candidates = device_bytes(), sizes(config.data.global_batch, replicas(mesh.shape))
  if chosen in candidates:
    return _sized(config, chosen)
  widest = max(datasets, key=functools.partial(_demand, config))
  needed: dict[int, int | None] = {}

  def compiled_bytes(size: int) -> int | None:
    needed[size] = _step_bytes(_sized(config, size), widest, steps, mesh, teacher)
    return needed[size]

  chosen = largest_micro_batch(candidates, compiled_bytes, available)
  print(
    f"data.micro_batch: {chosen} of {config.data.global_batch} rows at a time, which take "
    f"{(needed[chosen] or 0) / 2**30:.1f} of {available / 2**30:.1f} GiB per device",
    flush=True,
  )
  return _sized(config, chosen)


def _sized(config: Config, micro_batch: int) -> Config:
  return dataclasses.replace(config, data=dataclasses.replace(config.data, micro_batch=micro_batch))


def _demand(config: Config, d: Dataset) -> tuple[int, bool, bool, int]:
  task = config.losses.task(d.task_type)
  width = d.vectors["query"].width if d.vectors else 0
  return texts_per_row(config, d), bool(task and task.inbatch), bool(task and task.symmetric), width


def texts_per_row(config: Config, d: Dataset) -> int:
  """Returns query, positives and hard negatives used per step."""
  task = config.losses.task(d.task_type)
  return 1 + d.positives + (min(d.negatives, task.negatives) if task else 0)


def batch_shapes(config: Config, texts: int) -> Shapes:
  """Returns {name: (shape, dtype)} of the arrays that every batch of the longest rows has."""
  rows = config.data.global_batch
  return {
    "tokens": ((rows, texts, config.data.lengths[-1]), jnp.int32),
    "lengths": ((rows, texts), jnp.int32),
    "hashes": ((rows, texts, 2), jnp.uint32),
  }


def lowered_step(
  config: Config,
  shapes: Shapes,
  task: Task,
  steps: int,
  mesh: Mesh,
  teacher: Teacher | None = None,
) -> Any:
  """Returns the update for batches of these shapes, ready to be compiled."""
  state = train_state.abstract(config, optimizer.make(config.optimizer, steps), mesh)
  step: Any = train_step.make(config, steps, mesh, teacher.shape if teacher else None)
  params = teacher.abstract(mesh) if teacher else None
  return step.lower(state, abstract_batch(shapes, mesh), params, task=task)


def _step_bytes(
  config: Config, d: Dataset, steps: int, mesh: Mesh, teacher: Teacher | None
) -> int | None:
  """Returns what the update takes per device; None where the compiler runs out of memory."""
  rows, texts = config.data.global_batch, texts_per_row(config, d)
  shapes = batch_shapes(config, texts)
  if d.scores is not None:
    shapes["scores"] = ((rows,), jnp.float32)
  if d.vectors:
    known = texts if "negatives" in d.vectors else 1 + d.positives
    shapes["teacher"] = ((rows, known, d.vectors["query"].width), jnp.float32)
  lowered = lowered_step(config, shapes, Task(d.task_type, d.positives), steps, mesh, teacher)
  try:
    return needed_bytes(lowered.compile())
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    return None
