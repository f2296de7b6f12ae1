"""What code below the mesh may know of it: the platform, and where a logical axis lives.

Both come from the context that the caller sets (`jax.set_mesh`, `nn.logical_axis_rules`), so that
models and losses import no mesh.
"""

import math

import flax.linen as nn
import jax
from jax.sharding import PartitionSpec


def platform() -> str:
  """Returns what is compiled for, "cpu", "gpu" or "tpu"; the backend here may be another one."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  return device.platform if device else jax.default_backend()


def spec(*axes: str | None) -> PartitionSpec:
  """Returns where an array with these logical axes lives; () without mesh."""
  if jax.sharding.get_abstract_mesh().empty:
    return PartitionSpec()
  return nn.logical_to_mesh_axes(axes) or PartitionSpec()


def mesh_axes(axis: str) -> tuple[str, ...]:
  """Returns the mesh axes of more than one device that a logical axis is split over."""
  if not (found := tuple(spec(axis))) or not (names := found[0]):
    return ()
  names = (names,) if isinstance(names, str) else names
  shape = jax.sharding.get_abstract_mesh().shape
  return tuple(name for name in names if shape[name] > 1)


def shards(axis: str) -> int:
  """Returns how many shards a logical axis is split into; of "batch" they are `batch_shards`."""
  shape = jax.sharding.get_abstract_mesh().shape
  return math.prod(shape[name] for name in mesh_axes(axis))
