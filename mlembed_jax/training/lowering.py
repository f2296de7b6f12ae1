"""The update as a program that is ready to be compiled, its inputs as shapes, and its memory."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from mlembed_jax.batch import Arrays, Kind, Sheets
from mlembed_jax.config_fields import Config
from mlembed_jax.data import packing
from mlembed_jax.models import attention
from mlembed_jax.parallel.sharding import abstract_batch, batch_shards
from mlembed_jax.training import frozen, optimizer, train_state, train_step
from mlembed_jax.training.teacher import Teacher

VMEM = "memory space vmem"  # errors with it are about tiles of one operation, not the step's size


def check_attention(config: Config, platform: str) -> None:
  """Raises ConfigError where `model.attention` cannot compute sheets of `data.lengths`."""
  m = config.model
  for length in config.data.lengths:
    attention.choose(m.attention, platform, length, m.head_dim, m.dtype)


def kind_layout(config: Config, kind: Kind, batch_shards: int) -> packing.Layout:
  """Returns the shapes of the sheets of this kind's batches."""
  return packing.layout(
    rows=config.data.global_batch,
    texts_per_row=kind.texts,
    longest=kind.longest,
    widths=config.data.lengths,
    block_tokens=config.data.micro_batch,
    batch_shards=batch_shards,
    packed=config.data.packing,
  )


def batch_shapes(config: Config, kind: Kind, batch_shards: int) -> Arrays:
  """Returns this kind's batches as shapes."""
  rows, shape = config.data.global_batch, jax.ShapeDtypeStruct
  sheets = kind_layout(config, kind, batch_shards).shapes()
  return Arrays(
    hashes=shape((rows, kind.texts, 2), jnp.uint32),
    scores=shape((rows,), jnp.float32) if kind.is_scored else None,
    sheets=tuple(Sheets(*(shape(each, jnp.int32) for each in width)) for width in sheets),
    teacher=shape((rows, *kind.vectors), jnp.float32) if kind.vectors else None,
  )


def lowered_step(
  config: Config, kind: Kind, steps: int, mesh: Mesh, teacher: Teacher | None = None
) -> Any:
  """Returns the update for batches of this kind, ready to be compiled."""
  state = train_state.abstract(config, optimizer.make(config.optimizer, steps), mesh)
  step: Any = train_step.make(config, steps, mesh, teacher.shape if teacher else None)
  batch = abstract_batch(batch_shapes(config, kind, batch_shards(mesh.shape)), mesh)
  params = teacher.abstract(mesh) if teacher else None
  return step.lower(state, batch, params, frozen.abstract(config, mesh) or None, kind=kind)


def needed_bytes(compiled: Any) -> int:
  """Returns the bytes of one device that a compiled program takes, with its code."""
  m = compiled.memory_analysis()
  donated = m.alias_size_in_bytes  # outputs take the place of these inputs
  held = m.argument_size_in_bytes + m.output_size_in_bytes - donated
  return held + m.temp_size_in_bytes + m.generated_code_size_in_bytes


def step_bytes(
  config: Config, kind: Kind, steps: int, mesh: Mesh, teacher: Teacher | None
) -> int | None:
  """Returns what the update takes per device; None where the compiler runs out of memory."""
  lowered = lowered_step(config, kind, steps, mesh, teacher)
  try:
    return needed_bytes(lowered.compile())
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error) or VMEM in str(error):
      raise
    return None
