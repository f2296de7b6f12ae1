"""Causal grouped-query attention within segments. Takes arrays only."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

# Finite, so that a padding row, which may attend to nothing else, never becomes NaN.
MASKED = -1e30


def attention(
  q_BTNK: Float[Array, "B T N K"],
  k_BTGK: Float[Array, "B T G K"],
  v_BTGK: Float[Array, "B T G K"],
  segments_BT: Int[Array, "B T"],
) -> Float[Array, "B T N K"]:
  """Returns the attention output in the dtype of `q`; the softmax is computed in float32.

  A token sees itself and earlier tokens of its own segment; padding is a segment of its own (0).
  Query head h reads key/value head h // (N / G).
  """
  B, T, N, K = q_BTNK.shape
  G = k_BTGK.shape[2]
  q_BTGHK = q_BTNK.reshape(B, T, G, N // G, K)
  scores_BGHTS = jnp.einsum(
    "BTGHK,BSGK->BGHTS", q_BTGHK, k_BTGK, preferred_element_type=jnp.float32
  )
  seen_BTS = (segments_BT[:, :, None] == segments_BT[:, None, :]) & jnp.tri(T, dtype=bool)[None]
  scores_BGHTS = jnp.where(seen_BTS[:, None, None], scores_BGHTS * K**-0.5, MASKED)
  weights_BGHTS = jax.nn.softmax(scores_BGHTS, axis=-1)
  out_BTGHK = jnp.einsum("BGHTS,BSGK->BTGHK", weights_BGHTS.astype(v_BTGK.dtype), v_BTGK)
  return out_BTGHK.reshape(B, T, N, K)


def rotary(
  x_BTNK: Float[Array, "B T N K"], positions_BT: Int[Array, "B T"], theta: float
) -> Float[Array, "B T N K"]:
  """Returns `x` rotated by position, halves paired (x[i], x[i + K/2]); angles in float32."""
  half = x_BTNK.shape[-1] // 2
  frequencies = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
  angles = positions_BT[:, :, None, None].astype(jnp.float32) * frequencies[None, None, None, :]
  cos, sin = jnp.cos(angles), jnp.sin(angles)
  a, b = jnp.split(x_BTNK.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BTNK.dtype)
