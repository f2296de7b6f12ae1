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
from mlembed_jax.training import frozen, train_state
from mlembed_jax.training.teacher import Teacher

TABLE = ("table", "up")  # a full table has no second factor


def description(
  config: Config, tx: optax.GradientTransformation, mesh: Mesh, teacher: Teacher | None
) -> str:
  """Returns the lines: devices and mesh, number formats and attention, parameters, memory."""
  m, state = config.model, train_state.abstract(config, tx, mesh)
  frozen_params = frozen.abstract(config, mesh)
  platform = mesh.devices.flat[0].platform
  kernels = Counter(
    attention.choose(m.attention, platform, length, m.head_dim, m.dtype)
    for length in config.data.lengths
  )
  axes = ", ".join(f"{name} {size}" for name, size in mesh.shape.items())
  return "\n".join(
    (
      f"devices: {mesh.size} x {mesh.devices.flat[0].device_kind}, mesh {axes}",
      f"computes in {m.dtype}, trained weights in float32; attention: {' and '.join(kernels)}",
      _parameters(state.params, frozen_params),
      _memory(state, frozen_params, teacher.abstract(mesh) if teacher else None),
    )
  )


def _parameters(trained: Any, frozen_params: Any) -> str:
  size = lambda tree: sum(math.prod(x.shape) for x in jax.tree.leaves(tree))  # noqa: E731
  params = frozen.whole(trained, frozen_params)
  table = size([params[name] for name in TABLE if name in params])
  said = f"{size(params):,} parameters, {table / size(params):.0%} of them in the token table"
  return said + (f"; {size(trained):,} are trained" if frozen_params else "")


def _memory(state: train_state.TrainState, frozen_params: Any, teacher: Any) -> str:
  """Returns what stays on each device between steps; activations come and go beside it."""
  held = f"{readable_size(_device_bytes((state.params, state.head)))} of weights and "
  held += f"{readable_size(_device_bytes(state.opt_state))} of optimiser moments"
  if frozen_params:
    held += f" and {readable_size(_device_bytes(frozen_params))} of frozen weights"
  if teacher:
    held += f" and {readable_size(_device_bytes(teacher))} of the teacher's weights"
  return f"each device holds {held}"


def _device_bytes(tree: Any) -> int:
  """Returns the bytes of a tree of shapes with shardings on the device that holds most of it."""
  leaves = jax.tree.leaves(tree)
  return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)
