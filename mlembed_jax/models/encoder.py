"""A dense Qwen3 decoder that returns the pooled state of every depth in one pass."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from mlembed_jax.config_fields import ModelConfig
from mlembed_jax.models.attention import SAVED, Rotation, attention, rotary, rotation
from mlembed_jax.models.embedding import look_up
from mlembed_jax.models.pooling import last_tokens, packed, pooled
from mlembed_jax.parallel import mesh_context

_saved = jax.checkpoint_policies.save_only_these_names
# What a layer keeps for its backward pass beside its input, which computes the rest again. "none"
# means no rematerialisation at all. Bytes are those of one token in one layer of the 8B; the input
# has 8 KiB.
REMAT_POLICIES: dict[str, Callable[..., bool]] = {
  "full": jax.checkpoint_policies.nothing_saveable,
  # 8 KiB: splash attention runs once; other kernels run again.
  "context": _saved(SAVED),
  # 68 KiB: also keeps the MLP's products, so neither attention nor the MLP is computed again.
  "products": _saved("query", "key", "value", SAVED, "gate", "up"),
  # 68 KiB: keeps all products but those of attention.
  "dots": _saved("product"),
  # The input itself waits in the memory of the host.
  "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
    names_which_can_be_saved=[],
    names_which_can_be_offloaded=["stream"],
    offload_src="device",
    offload_dst="pinned_host",
  ),
}


LORA_A, LORA_B = "_lora_a", "_lora_b"  # end the names of the two factors of an adapter


def weight(
  module: Any,
  name: str,
  shape: tuple[int, ...],
  axes: tuple[str | None, ...],
  init: nn.initializers.Initializer,
  dtype: str | None = None,
) -> Array:
  """Returns parameter `name`, stored in float32, in `dtype` (default: the compute dtype).

  `axes` names each dimension of `shape`.
  """
  param = module.param(name, nn.with_logical_partitioning(init, axes), shape, jnp.float32)
  return param.astype(dtype or module.config.dtype)


def normal(fan_in: int) -> nn.initializers.Initializer:
  """Returns the initialiser that keeps unit variance through a product over `fan_in` inputs."""
  return nn.initializers.normal(fan_in**-0.5)


def project(x: Array, w: Array, axes: int = 1) -> Array:
  """Returns `multiplied`, which remat policies know as a product."""
  return _named(multiplied(x, w, axes))


def _named(x: Array) -> Any:
  return checkpoint_name(x, "product")


def multiplied(x: Array, w: Array, axes: int = 1) -> Array:
  """Returns the product over the last `axes` axes of `x` and the first of `w`."""
  rows = x.shape[: x.ndim - axes]
  if mesh_context.platform() == "tpu":
    out: Any = _product(x, w, axes)
  else:
    # Tokens are made one axis. For a weight gradient that contracts two (batch and token), XLA's
    # CPU backend transposes both operands, which doubles the time of the layer. On TPU, where
    # attention has its heads before its tokens, it is the flattening that transposes.
    fan_in = math.prod(w.shape[:axes])
    out = x.reshape(-1, fan_in) @ w.reshape(fan_in, -1)
  return out.reshape(*rows, *w.shape[axes:])


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _product(x: Array, w: Array, axes: int) -> Array:
  # The axes of heads are made one: a result in pieces of a head takes twice the time on TPU (8B on
  # v5e, 6,144 tokens on a chip).
  out = jnp.tensordot(x, w.reshape(*w.shape[:axes], -1), axes)
  return out.reshape(*out.shape[:-1], *w.shape[axes:])


def _product_fwd(x: Array, w: Array, axes: int) -> tuple[Array, tuple[Array, Array]]:
  return _product(x, w, axes), (x, w)


def _product_bwd(axes: int, saved: tuple[Array, Array], d_out: Array) -> tuple[Array, Array]:
  x, w = saved
  # The gradient is written to memory. XLA would else compute the gradient of a norm or of the gate
  # twice, inside of both products: the backward pass of a layer of the 8B then takes 11 % more on
  # v5e.
  d_out = jax.lax.optimization_barrier(d_out)
  rows = tuple(range(x.ndim - axes))
  transposed = w.transpose(*range(axes, w.ndim), *range(axes))
  d_x: Any = _product(d_out, transposed, w.ndim - axes)
  return d_x, jnp.tensordot(x, d_out, (rows, rows))


_product.defvjp(_product_fwd, _product_bwd)


def product(
  module: Any,
  name: str,
  x: Array,
  shape: tuple[int, ...],
  axes: tuple[str | None, ...],
  inputs: int = 1,
) -> Array:
  """Returns the product of `x` and the weight `name`, plus that with its adapter, if it has one.

  `shape` and `axes` are those of the weight, whose first `inputs` dimensions are summed over.
  """
  fan_in, fan_out = math.prod(shape[:inputs]), math.prod(shape[inputs:])
  kernel, lora = weight(module, name, shape, axes, normal(fan_in)), module.config.lora
  if not lora.adapts(f"{name}_proj"):
    return project(x, kernel, inputs)
  a = weight(module, f"{name}{LORA_A}", (fan_in, lora.rank), ("adapter", None), normal(fan_in))
  zeros = nn.initializers.zeros
  b = weight(module, f"{name}{LORA_B}", (lora.rank, fan_out), (None, "adapter"), zeros)
  narrow = project(x.reshape(*x.shape[: x.ndim - inputs], fan_in), a)
  out = multiplied(x, kernel, inputs)
  # One sum is kept by remat, not its two terms.
  return _named(out + lora.scale * multiplied(narrow, b).reshape(out.shape))


class RMSNorm(nn.Module):
  """Computes scale * x / rms(x) over the last axis, with statistics in float32."""

  config: ModelConfig

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """Returns the normed `x` in the compute dtype."""
    scale = weight(self, "scale", x.shape[-1:], ("norm",), nn.initializers.ones, "float32")
    x = x.astype(jnp.float32)
    x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.config.norm_eps)
    return (x * scale.reshape((1,) * (x.ndim - 1) + (-1,))).astype(self.config.dtype)


class Attention(nn.Module):
  """Grouped-query attention; RMSNorm on each query and key head where the model has it."""

  config: ModelConfig

  @nn.compact
  def __call__(self, x_BTD: Array, turns: Rotation, segments_BT: Array) -> Array:
    """Returns the attention output, [B, T, D]."""
    c = self.config
    q_BTNK = rotary(self._normed("q", x_BTD, c.heads, "heads"), turns)
    k_BTGK = rotary(self._normed("k", x_BTD, c.kv_heads, "kv_heads"), turns)
    v_BTGK = self._heads("v", x_BTD, c.kv_heads, "kv_heads")
    q_BTNK = checkpoint_name(q_BTNK, "query")
    k_BTGK = checkpoint_name(k_BTGK, "key")
    v_BTGK = checkpoint_name(v_BTGK, "value")
    out_BTNK = attention(q_BTNK, k_BTGK, v_BTGK, segments_BT, c.attention)
    shape, axes = (c.heads, c.head_dim, c.width), ("heads", "head_dim", "embed")
    return product(self, "o", out_BTNK, shape, axes, inputs=2)

  def _heads(self, name: str, x_BTD: Array, heads: int, axis: str) -> Array:
    """Returns queries, keys or values, [B, T, heads, K]."""
    c = self.config
    shape, axes = (c.width, heads, c.head_dim), ("embed", axis, "head_dim")
    out = product(self, name, x_BTD, shape, axes)
    if not c.qkv_bias:
      return out
    bias = weight(self, f"{name}_bias", shape[1:], axes[1:], nn.initializers.zeros)
    return out + bias[None, None]

  def _normed(self, name: str, x_BTD: Array, heads: int, axis: str) -> Array:
    """Returns queries or keys, each head normed where the model does so."""
    out = self._heads(name, x_BTD, heads, axis)
    return RMSNorm(self.config, name=f"{name}_norm")(out) if self.config.qk_norm else out


class Mlp(nn.Module):
  """SwiGLU."""

  config: ModelConfig

  @nn.compact
  def __call__(self, x_BTD: Array) -> Array:
    """Returns the gated MLP output, [B, T, D]."""
    c = self.config
    shape, axes = (c.width, c.ffn), ("embed", "ffn")
    gated_BTF = checkpoint_name(product(self, "gate", x_BTD, shape, axes), "gate")
    up_BTF = checkpoint_name(product(self, "up", x_BTD, shape, axes), "up")
    hidden_BTF = jax.nn.silu(gated_BTF) * up_BTF
    return product(self, "down", hidden_BTF, shape[::-1], axes[::-1])


class Block(nn.Module):
  """One pre-norm decoder layer, shaped for `nn.scan`: carries the stream, emits it at the ends."""

  config: ModelConfig

  @nn.compact
  def __call__(
    self, x_BTD: Array, turns: Rotation, segments_BT: Array, ends_BK: Array
  ) -> tuple[Array, Array]:
    """Returns the residual stream [B, T, D] and its value at the end of each text [B, K, D]."""
    c = self.config
    x_BTD = nn.with_logical_constraint(x_BTD, ("batch", "token", None))
    x_BTD = checkpoint_name(x_BTD, "stream")
    normed_BTD = RMSNorm(c, name="attention_norm")(x_BTD)
    x_BTD = x_BTD + Attention(c, name="attention")(normed_BTD, turns, segments_BT)
    x_BTD = x_BTD + Mlp(c, name="mlp")(RMSNorm(c, name="mlp_norm")(x_BTD))
    return x_BTD, last_tokens(x_BTD, ends_BK)


class Encoder(nn.Module):
  """Token ids to one vector per text and depth."""

  config: ModelConfig
  exits: tuple[int, ...] = ()  # layer counts to give the states of; (): all
  pooling: str = "lasttoken"  # others give the states of the full depth alone

  @nn.compact
  def __call__(
    self,
    tokens_BT: Int[Array, "B T"],
    ends_BK: Int[Array, "B K"],
    rank_mask_R: Float[Array, "R"] | None = None,
  ) -> Float[Array, "E B K D"]:
    """Returns the final-norm state at the end of each text after every exit.

    Row b holds texts one after another, text k up to token `ends[b, k]` (ascending; T: no more
    texts, the states there are arbitrary, but finite). No text sees another one. `rank_mask_R` (1
    for used columns of the token table) gives the vectors of a smaller rank without a new
    program; `slice_params` gives the same ones.
    """
    c = self.config
    positions_BT, segments_BT = packed(ends_BK, tokens_BT.shape[1])
    x_BTD = self._embed(tokens_BT, rank_mask_R)
    turns = rotation(positions_BT, c.head_dim, c.rope_theta)
    x_BTD, last_LBKD = self._layers()(c, name="layers")(x_BTD, turns, segments_BT, ends_BK)
    # Recomputed by the backward pass, which else keeps four times as much in float32.
    norm: Any = nn.remat(RMSNorm, prevent_cse=False)
    if self.pooling != "lasttoken":  # a mean is one of normed states
      return pooled(norm(c, name="final_norm")(x_BTD), ends_BK, segments_BT, self.pooling)[None]
    exits = self.exits or range(1, c.layers + 1)
    return norm(c, name="final_norm")(last_LBKD[jnp.array(exits) - 1])

  def _embed(self, tokens_BT: Array, rank_mask_R: Array | None) -> Array:
    c = self.config
    std = nn.initializers.normal(0.02)
    # Rows are cast after the look-up: the gradient of a token is summed over all its places, and
    # in bfloat16 a sum of equal terms stops growing at 256 of them.
    if not c.rank:
      table_VD = weight(self, "table", (c.vocab, c.width), ("vocab", "embed"), std, "float32")
      return look_up(table_VD, tokens_BT).astype(c.dtype)
    table_VR = weight(self, "table", (c.vocab, c.rank), ("vocab", "rank"), std, "float32")
    # The second factor keeps the deviation 0.02 of a full table. Its columns stay whole: it is
    # small, and two dimensions on one mesh axis are not possible.
    up_RD = weight(self, "up", (c.rank, c.width), ("rank", None), normal(c.rank))
    if rank_mask_R is not None:
      up_RD = up_RD * rank_mask_R.astype(up_RD.dtype)[:, None]
    rows_BTR = look_up(table_VR, tokens_BT).astype(c.dtype)
    return project(rows_BTR, up_RD)

  def _layers(self) -> Any:
    c = self.config
    block: Any = Block
    if c.remat != "none":
      # Inside a scan XLA cannot merge the recomputation with the forward pass by itself.
      block = nn.remat(Block, policy=REMAT_POLICIES[c.remat], prevent_cse=False)
    return nn.scan(
      block,
      length=c.layers,
      in_axes=nn.broadcast,  # type: ignore[arg-type]
      variable_axes={"params": 0},
      split_rngs={"params": True},
      metadata_params={nn.PARTITION_NAME: "layer"},
    )


def init(config: ModelConfig, key: Array) -> Any:
  """Returns new parameters, boxed with their logical axis names."""
  rows = mesh_context.shards("batch")  # what the mesh splits must divide
  tokens, ends = jnp.zeros((rows, 2), jnp.int32), jnp.ones((rows, 1), jnp.int32)
  # Parameters do not depend on the kernel, which may refuse texts as short as these.
  config = dataclasses.replace(config, attention="einsum")
  return Encoder(config).init(key, tokens, ends)["params"]


def abstract_params(config: ModelConfig) -> Any:
  """Returns the boxed tree of parameter shapes and logical axis names; nothing is computed."""
  key = jax.eval_shape(lambda: jax.random.key(0))
  return jax.eval_shape(functools.partial(init, config), key)


def parameter_shapes(config: ModelConfig) -> Any:
  """Returns the tree of parameter shapes."""
  # Outside eval_shape, unboxing under a mesh would place arrays that do not exist.
  return jax.eval_shape(nn.unbox, abstract_params(config))


def parameter_count(config: ModelConfig) -> int:
  """Returns the number of parameters of the encoder."""
  return sum(leaf.size for leaf in jax.tree.leaves(parameter_shapes(config)))
