"""What a run says of its devices, its model and its memory before the first step."""

import math
from collections import Counter
from typing import Any

import jax
import optax
from jax.sharding import Mesh

from mlembed_jax.config_fields import Config
from mlembed_jax.files import readable_size
from mlembed_jax.models import attention
from mlembed_jax.training import train_state
from mlembed_jax.training.teacher import Teacher

TABLE = ("table", "up")  # a full table has no second factor


def description(
  config: Config, tx: optax.GradientTransformation, mesh: Mesh, teacher: Teacher | None
) -> str:
  """Returns the lines: devices and mesh, number formats and attention, parameters, memory."""
  m, state = config.model, train_state.abstract(config, tx, mesh)
  platform = mesh.devices.flat[0].platform
  kernels = Counter(
    attention.choose(m.attention, platform, length, m.head_dim, m.dtype)
    for length in config.data.lengths
  )
  axes = ", ".join(f"{name} {size}" for name, size in mesh.shape.items())
  return "\n".join(
    (
      f"devices: {mesh.size} x {mesh.devices.flat[0].device_kind}, mesh {axes}",
      f"computes in {m.dtype}, weights in float32; attention: {' and '.join(kernels)}",
      _parameters(state.params),
      _memory(state, teacher.abstract(mesh) if teacher else None),
    )
  )


def _parameters(params: Any) -> str:
  size = lambda tree: sum(math.prod(x.shape) for x in jax.tree.leaves(tree))  # noqa: E731
  table = size([params[name] for name in TABLE if name in params])
  return f"{size(params):,} parameters, {table / size(params):.0%} of them in the token table"


def _memory(state: train_state.TrainState, teacher: Any) -> str:
  """Returns what stays on each device between steps; activations come and go beside it."""
  held = f"{readable_size(_device_bytes((state.params, state.head)))} of weights and "
  held += f"{readable_size(_device_bytes(state.opt_state))} of optimiser moments"
  if teacher:
    held += f" and {readable_size(_device_bytes(teacher))} of the teacher's weights"
  return f"each device holds {held}"


def _device_bytes(tree: Any) -> int:
  """Returns the bytes of a tree of shapes with shardings on the device that holds most of it."""
  leaves = jax.tree.leaves(tree)
  return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)
