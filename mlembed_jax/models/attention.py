"""Causal grouped-query attention within segments, by the best kernel of each platform.

Takes arrays only. The einsum is the definition; the kernels equal it up to rounding.
"""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jaxtyping import Array, Float, Int

from mlembed_jax.errors import ConfigError
from mlembed_jax.parallel import mesh_context

# Finite, so that a padding row, which may attend to nothing else, never becomes NaN.
MASKED = -1e30
LANES = 128  # of a TPU's vector registers: tokens and head width come in multiples of it
SPLASH_BLOCK = 1024
# Name of what the backward pass of attention needs beside q, k and v, for remat policies.
SAVED = "context"
Rotation = tuple[Float[Array, "B T 1 K"], Float[Array, "B T 1 K"]]  # cosine and sine


def attention(
  q_BTNK: Float[Array, "B T N K"],
  k_BTGK: Float[Array, "B T G K"],
  v_BTGK: Float[Array, "B T G K"],
  segments_BT: Int[Array, "B T"],
  implementation: str = "auto",
) -> Float[Array, "B T N K"]:
  """Returns the attention output in the dtype of `q`; the softmax is computed in float32.

  A token sees itself and earlier tokens of its own segment; padding is a segment of its own (0).
  Query head h reads key/value head h // (N / G).

  Raises:
    ConfigError: as of `choose`.
  """
  _, size, _, width = q_BTNK.shape
  name = choose(implementation, mesh_context.platform(), size, width, str(q_BTNK.dtype))
  return FUNCTIONS[name](q_BTNK, k_BTGK, v_BTGK, segments_BT)


def choose(implementation: str, platform: str, size: int, width: int, dtype: str) -> str:
  """Returns the name of the function for texts of `size` tokens and heads of `width`.

  "auto" is the first of the platform that can do these shapes.

  Raises:
    ConfigError: the implementation is none of this platform, or cannot do these shapes.
  """
  here = [*KERNELS.get(platform, ()), "einsum"]
  if implementation == "auto":
    return next(name for name in here if not _refusal(name, size, width, dtype))
  if implementation not in here:
    raise ConfigError(
      f"model.attention: {implementation!r} does not run on {platform}, which has {', '.join(here)}"
    )
  if reason := _refusal(implementation, size, width, dtype):
    raise ConfigError(f"model.attention: {implementation} needs {reason}")
  return implementation


def _refusal(name: str, size: int, width: int, dtype: str) -> str:
  """Returns what an implementation would need instead, "" where it can do these shapes."""
  if name == "splash" and size % LANES:
    return f"data.lengths in multiples of {LANES}, found {size}"
  if name == "splash" and width % LANES:
    return f"model.head_dim in multiples of {LANES}, found {width}"
  if name == "cudnn" and dtype != "bfloat16":
    return f"model.dtype bfloat16, found {dtype}"
  if name == "cudnn" and (width % 8 or width > LANES):
    return f"model.head_dim in multiples of 8 up to {LANES}, found {width}"
  return ""


def einsum(
  q_BTNK: Float[Array, "B T N K"],
  k_BTGK: Float[Array, "B T G K"],
  v_BTGK: Float[Array, "B T G K"],
  segments_BT: Int[Array, "B T"],
) -> Float[Array, "B T N K"]:
  """Returns the attention output by its definition; all scores stand in memory."""
  B, T, N, K = q_BTNK.shape
  G = k_BTGK.shape[2]
  q_BTGHK = q_BTNK.reshape(B, T, G, N // G, K)
  scores_BGHTS = jnp.einsum(
    "BTGHK,BSGK->BGHTS", q_BTGHK, k_BTGK, preferred_element_type=jnp.float32
  )
  scores_BGHTS = jnp.where(seen(segments_BT)[:, None, None], scores_BGHTS * K**-0.5, MASKED)
  weights_BGHTS = jax.nn.softmax(scores_BGHTS, axis=-1)
  out_BTGHK = jnp.einsum("BGHTS,BSGK->BTGHK", weights_BGHTS.astype(v_BTGK.dtype), v_BTGK)
  return checkpoint_name(out_BTGHK.reshape(B, T, N, K), SAVED)


def seen(segments_BT: Int[Array, "B T"]) -> Any:
  """Returns which keys each query sees, [B, T, S]."""
  same_BTS = segments_BT[:, :, None] == segments_BT[:, None, :]
  return same_BTS & jnp.tri(segments_BT.shape[1], dtype=bool)[None]


def splash_attention(
  q_BTNK: Float[Array, "B T N K"],
  k_BTGK: Float[Array, "B T G K"],
  v_BTGK: Float[Array, "B T G K"],
  segments_BT: Int[Array, "B T"],
  interpret: bool = False,
) -> Float[Array, "B T N K"]:
  """Returns the attention output by the Pallas kernel for TPU, each device its own heads and rows.

  `interpret` runs the kernel's program on any platform.
  """
  _, size, heads, _ = q_BTNK.shape
  kernel = _splash_kernel(size, heads, interpret)

  def local(q: Array, k: Array, v: Array, segments: Array) -> Array:
    heads_first = [x.swapaxes(1, 2) for x in (q * q.shape[-1] ** -0.5, k, v)]
    ids = splash.SegmentIds(segments, segments)
    out = jax.vmap(kernel)(*heads_first, ids)
    return out.swapaxes(1, 2)

  return _on_devices(local, q_BTNK, k_BTGK, v_BTGK, segments_BT)


def _splash_kernel(size: int, heads: int, interpret: bool) -> Any:
  block = next(b for b in range(min(SPLASH_BLOCK, size), 0, -LANES) if size % b == 0)
  blocks = splash.BlockSizes(
    block_q=block,
    block_kv=block,
    block_q_dkv=block,
    block_kv_dkv=block,
    use_fused_bwd_kernel=True,
  )
  local_heads = heads // mesh_context.shards("heads")
  mask = splash.MultiHeadMask([splash.CausalMask((size, size))] * local_heads)
  return splash.make_splash_mha(
    mask,
    block_sizes=blocks,
    head_shards=1,
    q_seq_shards=1,
    residual_checkpoint_name=SAVED,
    interpret=interpret,
  )


def cudnn_attention(
  q_BTNK: Float[Array, "B T N K"],
  k_BTGK: Float[Array, "B T G K"],
  v_BTGK: Float[Array, "B T G K"],
  segments_BT: Int[Array, "B T"],
  kernel: Literal["cudnn", "xla"] = "cudnn",
) -> Float[Array, "B T N K"]:
  """Returns the attention output by cuDNN's flash kernel; all heads share a mask of segments."""
  mask_B1TS = seen(segments_BT)[:, None]
  out_BTNK = jax.nn.dot_product_attention(
    q_BTNK, k_BTGK, v_BTGK, mask=mask_B1TS, implementation=kernel
  )
  return checkpoint_name(out_BTNK, SAVED)


def _on_devices(local: Callable[..., Array], *arrays: Array) -> Array:
  """Returns `local(q, k, v, segments)` of each device's rows and heads."""
  q, kv = (mesh_context.spec("batch", "token", heads, None) for heads in ("heads", "kv_heads"))
  if not tuple(q):
    return local(*arrays)
  # A kernel says nothing of which axes its output varies over, so check_vma would refuse it.
  rows = mesh_context.spec("batch", "token")
  return jax.shard_map(local, in_specs=(q, kv, kv, rows), out_specs=q, check_vma=False)(*arrays)


FUNCTIONS: dict[str, Any] = {
  "splash": splash_attention,
  "cudnn": cudnn_attention,
  "einsum": einsum,
}
KERNELS = {"tpu": ("splash",), "gpu": ("cudnn",)}  # the best first; einsum runs everywhere


def rotation(positions_BT: Int[Array, "B T"], width: int, theta: float) -> Rotation:
  """Returns cosine and sine of the angles of each position, [B, T, 1, width], float32.

  Once for all layers: XLA would compute them again for every head.
  """
  half = width // 2
  frequencies = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
  angles = positions_BT[:, :, None, None].astype(jnp.float32) * frequencies[None, None, None, :]
  angles = jnp.concatenate([angles, angles], axis=-1)
  return jnp.cos(angles), jnp.sin(angles)


def rotary(x_BTNK: Float[Array, "B T N K"], turns: Rotation) -> Float[Array, "B T N K"]:
  """Returns `x` rotated by `rotation`, halves paired (x[i], x[i + K/2]); computed in float32."""
  cos, sin = turns
  return (cos * x_BTNK + sin * quarter_turn(x_BTNK, mesh_context.platform())).astype(x_BTNK.dtype)


def quarter_turn(x_BTNK: Float[Array, "B T N K"], platform: str) -> Float[Array, "B T N K"]:
  """Returns (-b, a) for halves (a, b) of `x`."""
  width = x_BTNK.shape[-1]
  if platform != "tpu":
    a, b = jnp.split(x_BTNK, 2, axis=-1)
    return jnp.concatenate([-b, a], axis=-1)
  # A product with a permutation, exact. Halves of a register's lanes would be written to memory
  # and read again: three times the time.
  turn = jnp.eye(width, k=width // 2) - jnp.eye(width, k=-width // 2)
  return jnp.tensordot(x_BTNK, turn.astype(x_BTNK.dtype), 1, precision="highest")
