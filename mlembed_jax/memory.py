"""How many tokens fit the devices at a time, by the compiler's own account of memory."""

import dataclasses
import math
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from mlembed_jax import hosts, optimizer, train_state, train_step
from mlembed_jax.config_fields import Config, ConfigError
from mlembed_jax.data import packing
from mlembed_jax.data.batching import Kind
from mlembed_jax.losses import Task
from mlembed_jax.models import attention
from mlembed_jax.sharding import abstract_batch, replicas, smallest_micro_batch
from mlembed_jax.teacher import Teacher

# Of a device's memory; the rest is for batches on their way, and for fragmentation.
USABLE = 0.9
PADDING = 0.02  # of a step's tokens
# Of a block, on each chip that holds a part of the weights: enough that gathering them, once per
# block, hides behind its products on all TPUs.
BLOCK_TOKENS = 4096
CGROUP = pathlib.Path("/sys/fs/cgroup/memory.max")


def check_attention(config: Config, platform: str) -> None:
  """Raises ConfigError where `model.attention` cannot compute sheets of `data.lengths`."""
  m = config.model
  for length in config.data.lengths:
    attention.choose(m.attention, platform, length, m.head_dim, m.dtype)


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


def sizes(config: Config, tokens_per_step: float, mesh: Mesh) -> list[int]:
  """Returns the micro-batches to choose from, ascending: the smallest one, doubled and doubled.

  A step pads the last block of each width, by half of it on average; larger ones would make this
  more than the share PADDING of its tokens. Where chips gather weights, waiting for them would cost
  more than padding does: there, blocks go up to BLOCK_TOKENS per chip if a step fills them.
  """
  size = smallest_micro_batch(config, mesh.shape)
  tokens = tokens_per_step / len(config.data.lengths)
  largest = 2 * PADDING * tokens
  if mesh.shape["fsdp"] > 1 and mesh.devices.flat[0].platform != "cpu":
    largest = max(largest, min(tokens, BLOCK_TOKENS * replicas(mesh.shape)))
  doublings = math.log2(max(1.0, largest / size))
  return [size * 2**i for i in range(int(doublings) + 1)]


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
      f"data.micro_batch: not even {sizes[0]:,} tokens at a time fit {available / 2**30:.1f} GiB "
      "per device; use more devices, mesh.tensor, shorter data.lengths or fewer negatives"
    )
  while high - low > 1:
    middle = (low + high) // 2
    low, high = (middle, high) if fits(sizes[middle]) else (low, middle)
  return sizes[low]


def with_micro_batch(
  config: Config,
  chosen: int,
  kinds: Sequence[Kind],
  tokens_per_step: float,
  steps: int,
  mesh: Mesh,
  teacher: Teacher | None,
) -> Config:
  """Returns the configuration with `data.micro_batch` chosen where it is 0.

  The largest of `sizes` with which every kind of batch fits. `chosen` is the choice of the run that
  is continued, 0 for a new one; it stays unless the mesh cannot split it.

  Raises:
    ConfigError: not even one sheet per device fits.
  """
  if config.data.micro_batch:
    return config
  if chosen >= smallest_micro_batch(config, mesh.shape):
    return sized(config, chosen)
  # All processes must compile the same programs, and choose the same.
  available, kind = min(hosts.gather(device_bytes())), widest(config, kinds)
  needed: dict[int, int | None] = {}

  def compiled_bytes(size: int) -> int | None:
    found = hosts.gather(_step_bytes(sized(config, size), kind, steps, mesh, teacher))
    needed[size] = None if None in found else max(found)
    return needed[size]

  chosen = largest_micro_batch(sizes(config, tokens_per_step, mesh), compiled_bytes, available)
  print(
    f"data.micro_batch: {chosen:,} tokens at a time, with which a step takes "
    f"{(needed[chosen] or 0) / 2**30:.1f} of {available / 2**30:.1f} GiB per device",
    flush=True,
  )
  return sized(config, chosen)


def sized(config: Config, micro_batch: int) -> Config:
  """Returns `config` with this `data.micro_batch`."""
  return dataclasses.replace(config, data=dataclasses.replace(config.data, micro_batch=micro_batch))


def widest(config: Config, kinds: Sequence[Kind]) -> Kind:
  """Returns a kind that needs as much as any of `kinds`.

  Of those with most texts per row the one with most beside them (other rows, both directions, a
  teacher's vectors), with the longest texts of all kinds.
  """

  def demand(kind: Kind) -> tuple[int, bool, bool, int]:
    task = config.losses.task(kind.task_type)
    width = kind.vectors[1] if kind.vectors else 0
    return kind.texts, bool(task and task.inbatch), bool(task and task.symmetric), width

  longest = max(kind.longest for kind in kinds)
  return dataclasses.replace(max(kinds, key=demand), longest=longest)


def kind_layout(config: Config, kind: Kind, shards: int) -> packing.Layout:
  """Returns the shapes of the sheets of this kind's batches."""
  return packing.layout(
    rows=config.data.global_batch,
    texts_per_row=kind.texts,
    longest=kind.longest,
    widths=config.data.lengths,
    block_tokens=config.data.micro_batch,
    shards=shards,
    packed=config.data.packing,
  )


def batch_shapes(config: Config, kind: Kind, shards: int) -> dict[str, Any]:
  """Returns this kind's batches as shapes."""
  rows = config.data.global_batch
  sheets = kind_layout(config, kind, shards).shapes()
  shapes: dict[str, Any] = {
    "sheets": tuple({k: jax.ShapeDtypeStruct(v, jnp.int32) for k, v in s.items()} for s in sheets),
    "hashes": jax.ShapeDtypeStruct((rows, kind.texts, 2), jnp.uint32),
  }
  if not config.losses.task(kind.task_type):
    shapes["scores"] = jax.ShapeDtypeStruct((rows,), jnp.float32)
  if kind.vectors:
    shapes["teacher"] = jax.ShapeDtypeStruct((rows, *kind.vectors), jnp.float32)
  return shapes


def lowered_step(
  config: Config, kind: Kind, steps: int, mesh: Mesh, teacher: Teacher | None = None
) -> Any:
  """Returns the update for batches of this kind, ready to be compiled."""
  state = train_state.abstract(config, optimizer.make(config.optimizer, steps), mesh)
  step: Any = train_step.make(config, steps, mesh, teacher.shape if teacher else None)
  batch = abstract_batch(batch_shapes(config, kind, replicas(mesh.shape)), mesh)
  params = teacher.abstract(mesh) if teacher else None
  return step.lower(state, batch, params, task=Task(kind.task_type, kind.positives))


def _step_bytes(
  config: Config, kind: Kind, steps: int, mesh: Mesh, teacher: Teacher | None
) -> int | None:
  """Returns what the update takes per device; None where the compiler runs out of memory."""
  lowered = lowered_step(config, kind, steps, mesh, teacher)
  try:
    return needed_bytes(lowered.compile())
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    return None
