"""Our parameters and the tensors of a Hugging Face folder: names, shapes and layouts.

The one table that both directions read. A linear weight is [out, in] in the folder and [in, out]
here, with its head axis unfolded; rotary embedding is half-split on both sides.
"""

import dataclasses
import functools
import math
import operator
from collections.abc import Mapping
from typing import Any

import numpy as np

from mlembed_jax.config_fields import ModelConfig

# Field of ModelConfig -> key of config.json. rope_theta has two spellings there.
CONFIG_KEYS = {
  "vocab": "vocab_size",
  "width": "hidden_size",
  "layers": "num_hidden_layers",
  "ffn": "intermediate_size",
  "heads": "num_attention_heads",
  "kv_heads": "num_key_value_heads",
  "head_dim": "head_dim",
  "norm_eps": "rms_norm_eps",
}

REMOTE = "mlembed_"  # begins the model_type of a folder whose token table is stored as factors
RANK_KEY = "embedding_rank"  # of config.json, in such a folder

# (our leaf, tensor, axes of the tensor as products of ModelConfig fields)
TABLE = ("table", "embed_tokens.weight", "vocab width")
FACTORS = (
  ("table", "embed_tokens.u.weight", "vocab rank"),
  ("up", "embed_tokens.v.weight", "width rank"),
)
FINAL_NORM = ("final_norm/scale", "norm.weight", "width")
LAYER = (
  ("attention_norm/scale", "input_layernorm.weight", "width"),
  ("attention/q", "self_attn.q_proj.weight", "heads*head_dim width"),
  ("attention/k", "self_attn.k_proj.weight", "kv_heads*head_dim width"),
  ("attention/v", "self_attn.v_proj.weight", "kv_heads*head_dim width"),
  ("attention/o", "self_attn.o_proj.weight", "width heads*head_dim"),
  ("mlp_norm/scale", "post_attention_layernorm.weight", "width"),
  ("mlp/gate", "mlp.gate_proj.weight", "ffn width"),
  ("mlp/up", "mlp.up_proj.weight", "ffn width"),
  ("mlp/down", "mlp.down_proj.weight", "width ffn"),
)
QK_NORM = (
  ("attention/q_norm/scale", "self_attn.q_norm.weight", "head_dim"),
  ("attention/k_norm/scale", "self_attn.k_norm.weight", "head_dim"),
)
QKV_BIAS = (
  ("attention/q_bias", "self_attn.q_proj.bias", "heads*head_dim"),
  ("attention/k_bias", "self_attn.k_proj.bias", "kv_heads*head_dim"),
  ("attention/v_bias", "self_attn.v_proj.bias", "kv_heads*head_dim"),
)


@dataclasses.dataclass(frozen=True)
class Tensor:
  """One tensor of the folder and where it stands in our tree."""

  path: str  # of our leaf, "/" between keys
  layer: int | None  # row of a leaf that stacks layers
  name: str  # in the folder, without the prefix "model."
  shape: tuple[int, ...]  # in the folder
  our_shape: tuple[int, ...]  # here, without the layer axis
  meaning: str  # of `shape`, in the words of config.json

  def to_hf(self, array: np.ndarray) -> np.ndarray:
    """Returns our array in the layout of the folder."""
    return array if self.path == TABLE[0] else array.reshape(self.shape[::-1]).T

  def from_hf(self, tensor: np.ndarray) -> np.ndarray:
    """Returns a tensor of the folder in our layout."""
    return tensor if self.path == TABLE[0] else tensor.T.reshape(self.our_shape)


def tensors(model: ModelConfig) -> list[Tensor]:
  """Returns the tensors of a folder: of Qwen3 with a full table 11 * layers + 2."""
  rows = LAYER + (QK_NORM if model.qk_norm else ()) + (QKV_BIAS if model.qkv_bias else ())
  layers = [
    _tensor(model, (f"layers/{path}", f"layers.{layer}.{name}", axes), layer)
    for layer in range(model.layers)
    for path, name, axes in rows
  ]
  table = FACTORS if model.rank else (TABLE,)
  return [*(_tensor(model, row) for row in table), *layers, _tensor(model, FINAL_NORM)]


def _tensor(model: ModelConfig, row: tuple[str, str, str], layer: int | None = None) -> Tensor:
  path, name, axes = row
  fields = [axis.split("*") for axis in axes.split()]
  sizes = [[getattr(model, field) for field in axis] for axis in fields]
  ours = sizes if path == TABLE[0] else sizes[::-1]
  keys = CONFIG_KEYS | {"rank": RANK_KEY}
  words = [" x ".join(f"{keys[f]} {getattr(model, f)}" for f in axis) for axis in fields]
  return Tensor(
    path=path,
    layer=layer,
    name=name,
    shape=tuple(math.prod(axis) for axis in sizes),
    our_shape=tuple(size for axis in ours for size in axis),
    meaning=", ".join(words),
  )


def leaf(params: Mapping[str, Any], path: str) -> Any:
  """Returns the array of `params` at `path`."""
  return functools.reduce(operator.getitem, path.split("/"), params)


def tensor_of(params: Mapping[str, Any], t: Tensor) -> np.ndarray:
  """Returns a tensor of `params` in the layout of the folder, float32."""
  found = leaf(params, t.path)
  return t.to_hf(np.asarray(found if t.layer is None else found[t.layer], np.float32))
