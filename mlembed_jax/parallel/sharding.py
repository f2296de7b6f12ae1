"""Device mesh, and where each parameter, optimiser moment and batch row lives on it."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mlembed_jax.batch import Arrays
from mlembed_jax.config_fields import Config, ModelConfig
from mlembed_jax.devices.start import start_devices
from mlembed_jax.errors import ConfigError

# Logical axis -> mesh axes; () leaves a dimension whole. fsdp splits every large weight once,
# tensor splits heads and MLP.
RULES: dict[str | None, tuple[str, ...]] = {
  "batch": ("data", "fsdp"),
  "token": (),
  "vocab": (),  # of any size: 151,936 rows are no multiple of 256 devices, columns are
  "rank": ("fsdp",),
  "embed": ("fsdp",),
  "heads": ("tensor",),
  "kv_heads": ("tensor",),
  "head_dim": (),
  "ffn": ("tensor",),
  "adapter": ("tensor", "fsdp"),  # names the long side of each of its factors
  "norm": (),  # vectors of one width or head: kilobytes
  "layer": (),  # the scan walks it
  None: (),
}


# Arrays of more bytes must be split. Norm scales, 0.6 MB in the 8B, are the largest that are not.
LARGEST_WHOLE = 4 * 2**20


def make_mesh(config: Config, devices: Sequence[Any] | None = None) -> Mesh:
  """Returns the mesh (data, fsdp, tensor) over the devices.

  Between the slices of a multi-slice TPU lies the slow data-centre network; only copies of the
  parameters, on `data`, are kept in step over it.

  Raises:
    ConfigError: no such mesh can be laid out.
  """
  devices = start_devices() if devices is None else devices
  shape = mesh_shape(config, len(devices))
  slices = len({getattr(device, "slice_index", 0) for device in devices})
  if shape["data"] % slices:
    raise ConfigError(
      f"mesh.data: {shape['data']} is not a multiple of the {slices} slices; parameters are split "
      "within a slice only"
    )
  inner = (shape["data"] // slices, shape["fsdp"], shape["tensor"])
  try:
    laid = _laid_out(inner, slices, devices)
  except NotImplementedError as error:
    raise ConfigError(
      f"mesh: the axes {dict(zip(shape, inner, strict=True))} cannot be laid along the torus of a "
      f"slice: {str(error).splitlines()[0]}"
    ) from error
  return Mesh(laid, tuple(shape), axis_types=(AxisType.Auto,) * 3)


def _laid_out(inner: tuple[int, ...], slices: int, devices: Sequence[Any]) -> Any:
  if slices == 1:
    return mesh_utils.create_device_mesh(inner, devices, allow_split_physical_axes=True)
  return mesh_utils.create_hybrid_device_mesh(
    inner, (slices, 1, 1), devices, allow_split_physical_axes=True
  )


def mesh_shape(config: Config, devices: int) -> dict[str, int]:
  """Returns the size of each mesh axis on `devices` devices.

  Raises:
    ConfigError: the axes do not multiply to `devices`, or the batch or a weight cannot be split.
  """
  shape = dataclasses.asdict(config.mesh)
  free = [axis for axis, size in shape.items() if size == -1]
  if len(free) > 1 or any(size == 0 or size < -1 for size in shape.values()):
    raise ConfigError(f"mesh: {shape} needs positive sizes and at most one -1")
  taken = 1
  for size in shape.values():
    taken *= 1 if size == -1 else size
  if free:
    shape[free[0]] = devices // taken
  if taken * (shape[free[0]] if free else 1) != devices:
    asked = " x ".join(f"{axis} {size}" for axis, size in dataclasses.asdict(config.mesh).items())
    raise ConfigError(
      f"mesh: {asked} does not cover {devices} devices; the sizes must multiply to it"
    )
  _check_split(config, shape)
  return shape


def batch_shards(shape: Mapping[str, int]) -> int:
  """Returns how many shards a mesh of this shape splits the rows of a batch into."""
  return shape["data"] * shape["fsdp"]


def rows_of(process: int, mesh: Mesh) -> tuple[int, int]:
  """Returns (part, parts): the rows of a batch that the devices of a process hold.

  Processes that share shards (mesh.tensor goes over several) hold the same part.

  Raises:
    ConfigError: the mesh deals shards of the batch to processes unevenly.
  """
  held: dict[int, set[int]] = {}
  for shard, devices in enumerate(mesh.devices.reshape(batch_shards(mesh.shape), -1)):
    for device in devices:
      held.setdefault(device.process_index, set()).add(shard)
  parts = sorted({tuple(sorted(shards)) for shards in held.values()})
  if sum(map(len, parts)) != batch_shards(mesh.shape) or len({len(part) for part in parts}) > 1:
    raise ConfigError(
      f"mesh: {dict(mesh.shape)} splits rows unevenly over {len(held)} processes; mesh.tensor must "
      "divide the devices of a process, or be a multiple of them"
    )
  return parts.index(tuple(sorted(held[process]))), len(parts)


def smallest_micro_batch(config: Config, shape: Mapping[str, int]) -> int:
  """Returns the tokens of one sheet of the longest texts on every shard of the batch."""
  return config.data.lengths[-1] * batch_shards(shape)


def _check_split(config: Config, shape: Mapping[str, int]) -> None:
  shards = batch_shards(shape)
  for name, size in (
    ("data.global_batch", config.data.global_batch),
    ("eval.batch_size", config.eval.batch_size),
  ):
    if size % shards:
      raise ConfigError(f"{name}: {size} is not a multiple of mesh.data x mesh.fsdp = {shards}")
  tokens = smallest_micro_batch(config, shape)
  if 0 < config.data.micro_batch < tokens:
    raise ConfigError(
      f"data.micro_batch: {config.data.micro_batch} tokens are less than a sheet of "
      f"{config.data.lengths[-1]} on each of mesh.data x mesh.fsdp = {shards} parts, {tokens}"
    )
  for field, axis in (("width", "fsdp"), ("rank", "fsdp"), ("ffn", "tensor")):
    _check_multiple(config.model, field, axis, shape)
  for field in ("heads", "kv_heads"):
    _check_multiple(config.model, field, "tensor", shape)
  _check_adapter(config.model, shape["tensor"] * shape["fsdp"])


def _check_adapter(model: ModelConfig, parts: int) -> None:
  for name, sides in model.products().items():
    if model.lora.adapts(name) and (whole := [side for side in sides if side % parts]):
      raise ConfigError(
        f"model.lora: the factors of {name} have a side of {whole[0]}, not a multiple of "
        f"mesh.tensor x mesh.fsdp = {parts}; give mesh.data more devices"
      )


def _check_multiple(model: ModelConfig, field: str, axis: str, shape: Mapping[str, int]) -> None:
  size = getattr(model, field)
  if size % shape[axis]:
    raise ConfigError(f"model.{field}: {size} is not a multiple of mesh.{axis} = {shape[axis]}")


def logical_rules() -> list[tuple[str, tuple[str, ...] | None]]:
  """Returns the table in the form that `nn.logical_axis_rules` takes, for activations."""
  return [(name, axes or None) for name, axes in RULES.items() if name is not None]


def partition_spec(
  path: str, shape: Sequence[int], axes: Sequence[str | None], mesh: Mesh
) -> PartitionSpec:
  """Returns the PartitionSpec of one array.

  Raises:
    ValueError: an axis without a rule, two dimensions on one mesh axis, or a size that does not
      divide. Flax would replicate such an array without a word.
  """
  if unknown := [a for a in axes if a not in RULES]:
    raise ValueError(f"{path}: no rule for logical axes {unknown}")
  mesh_axes = [RULES[a] for a in axes]
  used = [name for names in mesh_axes for name in names]
  if len(set(used)) != len(used):
    raise ValueError(f"{path}: {axes} puts two dimensions on one mesh axis: {mesh_axes}")
  for size, names in zip(shape, mesh_axes, strict=True):
    parts = math.prod(mesh.shape[name] for name in names)
    if size % parts:
      raise ValueError(f"{path}: {size} is not a multiple of mesh axes {names} = {parts}")
  return PartitionSpec(*(names or None for names in mesh_axes))


def shardings(boxed: Any, mesh: Mesh) -> Any:
  """Returns a NamedSharding per array of a boxed abstract tree; unnamed leaves are replicated.

  Raises:
    ValueError: an array cannot be split as its names say, or a large one would not be split.
  """

  def one(path: Any, leaf: Any) -> NamedSharding:
    boxed = isinstance(leaf, nn.LogicallyPartitioned)
    value, name = leaf.value if boxed else leaf, jax.tree_util.keystr(path)
    spec = partition_spec(name, value.shape, leaf.names, mesh) if boxed else PartitionSpec()
    sharding, size = NamedSharding(mesh, spec), math.prod(value.shape) * value.dtype.itemsize
    if mesh.shape["fsdp"] > 1 and sharding.is_fully_replicated and size > LARGEST_WHOLE:
      raise ValueError(f"{name}: {size:,} bytes would be whole on every device; split an axis")
    return sharding

  return jax.tree_util.tree_map_with_path(
    one, boxed, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned)
  )


def batch_sharding(mesh: Mesh, axis: int = 0) -> NamedSharding:
  """Returns the sharding of an array with the batch on this axis."""
  return NamedSharding(mesh, PartitionSpec(*[None] * axis, RULES["batch"]))


def _with_sharding(one: Callable[[NamedSharding, Any], Any], arrays: Arrays, mesh: Mesh) -> Arrays:
  """Returns `one(sharding, array)` of each array: sheets are [blocks, S, ...], others [B, ...]."""
  by_row, by_sheet = (functools.partial(one, batch_sharding(mesh, axis)) for axis in (0, 1))
  rows = jax.tree.map(by_row, arrays._replace(sheets=()))
  return rows._replace(sheets=jax.tree.map(by_sheet, arrays.sheets))


def put_batch(arrays: Arrays, mesh: Mesh) -> Arrays:
  """Returns global arrays from this process's: its sheets of every block, and its rows."""
  return _with_sharding(jax.make_array_from_process_local_data, arrays, mesh)


def abstract_batch(shapes: Arrays, mesh: Mesh) -> Arrays:
  """Returns what `put_batch` returns as shapes, from global ones."""

  def one(sharding: NamedSharding, x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

  return _with_sharding(one, shapes, mesh)
