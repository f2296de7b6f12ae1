"""Import of a folder in Hugging Face layout, one of ours or anyone's, straight into sharded arrays.

Weights are read tensor by tensor from mapped files, and cast on the device: a process holds one
tensor beside what its devices hold.
"""

import functools
import pathlib
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding
from jaxtyping import Int

from mlembed_jax.config_fields import ModelConfig
from mlembed_jax.hf import factors
from mlembed_jax.hf.folder import Folder, open_model_folder, raise_all
from mlembed_jax.models import encoder
from mlembed_jax.parallel import processes

Params = dict[str, Any]


def load_params(
  path: pathlib.Path,
  model: ModelConfig,
  like: Params | None = None,
  ids: Int[np.ndarray, "K"] | None = None,
) -> Params:
  """Returns the parameters of `model`, its token table factorised where `model.rank` asks.

  `like` is their tree as shapes with dtypes and shardings, or a part of it, of which no other
  parameters are read; None: all, in float32 on one device. Rows of the
  table that the folder does not have are zero. `ids` are those that are taken, as the rows of
  `model`, None: all. To be called by all processes of a run.

  Raises:
    LoadError: see `open_model_folder`; or a weight is not finite, or trained factors do not belong
      to the table.
  """
  folder = open_model_folder(path, model, ids)
  like = on_device(model, jax.local_devices()[0]) if like is None else like
  params = _read(folder, model, like)
  if model.rank:
    return params | _factorised(folder, model, like)
  if folder.rank and "table" in like:
    table = factors.table(folder)
    return params | {"table": _put(_zeros(like["table"])(), table, None)}
  return params


def on_device(model: ModelConfig, device: Any) -> Params:
  """Returns the parameters of `model` as shapes, float32, on one device."""
  sharding = SingleDeviceSharding(device)
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32, sharding=sharding),
    encoder.parameter_shapes(model),
  )


def _read(folder: Folder, model: ModelConfig, like: Params) -> Params:
  """Returns all parameters of `like`, but of a token table only one that is whole on both sides."""
  leaves: dict[str, jax.Array] = {}
  targets = flax.traverse_util.flatten_dict(like, sep="/")
  problems = []
  for t, stored in folder.tensors:
    if t.path not in targets or (t.path in ("table", "up") and (folder.rank or model.rank)):
      continue
    tensor, target = stored.read(), targets[t.path]
    if damage := np.count_nonzero(~np.isfinite(tensor)):
      problems.append(
        f"E107 not finite: {t.name} has {damage} NaN or infinite values. "
        "The file is damaged or was saved from a diverged run."
      )
    leaf = leaves.pop(t.path) if t.path in leaves else _zeros(target)()
    tensor = folder.taken(tensor) if t.path == "table" else tensor
    leaves[t.path] = _put(leaf, t.from_hf(tensor), t.layer)
  raise_all(folder.path, problems)
  return flax.traverse_util.unflatten_dict(leaves, sep="/")


def _put(leaf: jax.Array, array: np.ndarray, layer: int | None) -> jax.Array:
  """Returns `leaf`, which is given up, with `array` as its layer or as its first rows."""
  stacked = layer is not None
  shape = leaf.shape[1:] if stacked else leaf.shape
  if array.shape != shape:  # a table with fewer rows
    array = np.concatenate([array, np.zeros((shape[0] - len(array), *shape[1:]), array.dtype)])
  part = _part(leaf.sharding, stacked)
  value = jax.make_array_from_callback(shape, part, lambda index: array[index])
  return _setter(leaf.sharding, stacked)(leaf, value, np.int32(layer or 0))


def _part(sharding: Sharding, stacked: bool) -> Sharding:
  """Returns how one layer of a stacked leaf is split."""
  if not stacked or not isinstance(sharding, NamedSharding):
    return sharding
  return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))


@functools.cache
def _setter(sharding: Sharding, stacked: bool) -> Any:
  def put(leaf: Any, value: Any, layer: Any) -> Any:
    value = value.astype(leaf.dtype)
    return jax.lax.dynamic_update_index_in_dim(leaf, value, layer, 0) if stacked else value

  return jax.jit(put, donate_argnums=0 if stacked else (), out_shardings=sharding)


def _zeros(target: Any) -> Any:
  return jax.jit(lambda: jnp.zeros(target.shape, target.dtype), out_shardings=target.sharding)


def _factorised(folder: Folder, model: ModelConfig, like: Params) -> Params:
  """Returns table [vocab, rank] and up [rank, width]; process 0 computes them for all."""
  if not (wanted := [name for name in ("table", "up") if name in like]):
    return {}
  shapes = encoder.parameter_shapes(model)
  found = {name: np.zeros(shapes[name].shape, np.float32) for name in ("table", "up")}
  with processes.agreed():
    if processes.is_first():
      found["table"][: folder.rows], found["up"][:] = factors.of_folder(folder, model.rank)
  # A factorisation may round in another way on another machine; factors of two machines do not fit
  # each other.
  found = processes.from_first(found)
  return {name: _placed(found[name], like[name]) for name in wanted}


def _placed(array: np.ndarray, like: Any) -> jax.Array:
  return jax.make_array_from_callback(
    array.shape, like.sharding, lambda index: array[index].astype(like.dtype)
  )
