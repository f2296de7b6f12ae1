"""Which parameters a run trains, and the others, which stay as they were when it started.

A path names a parameter: `table`, `final_norm/scale`, `layers/mlp/gate`, `layers/mlp/gate_lora_a`.
What is frozen is held in the compute dtype. It has no gradient, no moments and no copy in float32,
and is no part of checkpoints: the workdir keeps it once, see frozen_store.py.
"""

import dataclasses
import fnmatch
import functools
from collections.abc import Callable, Collection, Mapping
from typing import Any

import flax.traverse_util
import jax
import numpy as np
from jax.sharding import Mesh

from mlembed_jax.config_fields import NO_LORA, Config, ModelConfig
from mlembed_jax.errors import ConfigError
from mlembed_jax.hf.param_mapping import LAYER
from mlembed_jax.models.encoder import LORA_A, LORA_B, abstract_params, parameter_shapes
from mlembed_jax.parallel.sharding import shardings

TABLE = {"table", "up"}
Tree = dict[str, Any]


def is_adapter(path: str) -> bool:
  """Returns whether a path names a factor of an adapter."""
  return path.endswith((LORA_A, LORA_B))


@functools.cache
def trained_paths(config: Config) -> frozenset[str]:
  """Returns the paths of the parameters that are trained.

  Raises:
    ConfigError: patterns of `train.trainable` and `train.frozen` name a parameter twice or not at
      all, or match nothing; or what they freeze cannot be.
  """
  paths, train = sorted(_flat(parameter_shapes(config.model))), config.train
  if not (train.trainable or train.frozen):
    return frozenset(p for p in paths if not config.model.lora.rank or is_adapter(p))
  trained = _matching(paths, train.trainable, "train.trainable")
  frozen = _matching(paths, train.frozen, "train.frozen")
  _check_once(paths, trained, frozen)
  _check_frozen(frozen, trained)
  return frozenset(trained)


def _matching(paths: list[str], patterns: tuple[str, ...], field: str) -> set[str]:
  found: set[str] = set()
  for pattern in patterns:
    if not (matched := fnmatch.filter(paths, pattern)):
      raise ConfigError(f"{field}: {pattern!r} names no parameter of {', '.join(paths)}")
    found |= set(matched)
  return found


def _check_once(paths: list[str], trained: Collection[str], frozen: Collection[str]) -> None:
  for path in paths:
    if (path in trained) == (path in frozen):
      said = "both name" if path in frozen else "neither names"
      raise ConfigError(
        f"train.trainable, train.frozen: {said} {path}; the two must name every parameter once: "
        + ", ".join(paths)
      )


def _check_frozen(frozen: set[str], trained: set[str]) -> None:
  if factor := next(filter(is_adapter, sorted(frozen)), None):
    raise ConfigError(
      f"train.frozen: names {factor}, a factor of an adapter, which train.init_from does not have; "
      "name *_lora_a and *_lora_b in train.trainable"
    )
  if frozen & TABLE and trained & TABLE:
    raise ConfigError(
      "train.frozen: table and up are the two factors of one token table; freeze both or none"
    )


def split(config: Config, params: Mapping[str, Any]) -> tuple[Tree, Tree]:
  """Returns the trained and the frozen part of a tree of parameters, or of what stands for them."""
  trained = trained_paths(config)
  return _part(params, trained.__contains__), _part(params, lambda path: path not in trained)


def whole(trained: Mapping[str, Any], frozen: Mapping[str, Any] | None) -> Tree:
  """Returns the tree of which the two are parts."""
  return _nested(_flat(trained) | _flat(frozen or {}))


def adapter(params: Mapping[str, Any]) -> Tree:
  """Returns the factors of the adapter of a tree of parameters."""
  return _part(params, is_adapter)


def without_adapter(params: Mapping[str, Any]) -> Tree:
  """Returns a tree of parameters without the factors of its adapter."""
  return _part(params, lambda path: not is_adapter(path))


def _part(params: Mapping[str, Any], wanted: Callable[[str], bool]) -> Tree:
  return _nested({path: x for path, x in _flat(params).items() if wanted(path)})


def abstract(config: Config, mesh: Mesh) -> Tree:
  """Returns the frozen parameters as shapes with shardings, in the compute dtype; {}: none."""
  shapes = parameter_shapes(config.model)
  layout = shardings(abstract_params(config.model), mesh)
  dtype = config.model.dtype
  both = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, dtype, sharding=s), shapes, layout)
  return split(config, both)[1]


def skipped_products(config: Config) -> int:
  """Returns how many multiplications per token the backward pass does not do.

  They are those of the gradients of frozen weights, and below a frozen table nothing needs one.
  """
  products = {f"layers/{path}": 1 for path, name, _ in LAYER if name.endswith("_proj.weight")}
  products["up"] = 2  # to the weight, and to the rows of the table
  shapes = _flat(split(config, parameter_shapes(config.model))[1])
  return sum(products.get(path, 0) * x.size for path, x in shapes.items())


def base_model(model: ModelConfig) -> ModelConfig:
  """Returns a model without its adapter."""
  return dataclasses.replace(model, lora=NO_LORA)


def merged(model: ModelConfig, params: Mapping[str, Any]) -> Tree:
  """Returns the parameters of `base_model`, float32 arrays, the adapter added to its weights.

  Those that are float32 and have no adapter are not copied.
  """
  flat = _flat(params)
  found = {path: np.asarray(x, np.float32) for path, x in flat.items() if not is_adapter(path)}
  for path in [path for path in found if path + LORA_A in flat]:
    found[path] = np.array(found[path])
    for layer, added in zip(found[path], _added(model, flat, path), strict=True):
      layer += added.reshape(layer.shape)
  return _nested(found)


def _added(model: ModelConfig, flat: Mapping[str, Any], path: str) -> Any:
  """Yields what an adapter adds to the weight of each layer, [inputs, outputs], float32."""
  for a, b in zip(flat[path + LORA_A], flat[path + LORA_B], strict=True):
    yield model.lora.scale * (np.asarray(a, np.float32) @ np.asarray(b, np.float32))


def lost_by_rounding(model: ModelConfig, params: Mapping[str, Any], dtype: str) -> float:
  """Returns how far rounding the merged weights to `dtype` goes, as a share of the adapter.

  It is the norm of the difference over that of what the adapter adds, over all weights. An update
  that is small beside its weight is lost where the steps of a format are larger.
  """
  flat, lost, size = _flat(params), 0.0, 0.0
  for path in [p for p in flat if p + LORA_A in flat]:
    for weight, added in zip(flat[path], _added(model, flat, path), strict=True):
      exact = np.asarray(weight, np.float32).reshape(added.shape) + added
      lost += float(np.sum((exact.astype(dtype).astype(np.float32) - exact) ** 2))
      size += float(np.sum(added**2))
  return (lost / size) ** 0.5 if size else 0.0


def _flat(tree: Mapping[str, Any]) -> dict[str, Any]:
  return flax.traverse_util.flatten_dict(dict(tree), sep="/")


def _nested(flat: Mapping[str, Any]) -> Tree:
  return flax.traverse_util.unflatten_dict(flat, sep="/")
