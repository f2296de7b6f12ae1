"""Positions, segments and pooling of texts that share a row. Takes arrays only."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

POOLINGS = ("lasttoken", "mean", "cls")  # in the words of sentence-transformers


def packed(ends_BK: Int[Array, "B K"], size: int) -> tuple[Array, Array]:
  """Returns positions [B, size], from 0 in each text, and segments [B, size].

  `ends` holds the last token of each text, ascending, and `size` where there are no more texts.
  Text k is segment k + 1, what follows the last text is padding, segment 0. The mask comes from
  the ends, never from a token id: the padding id may be the pooled one. Rotary attention sees only
  differences of positions; starting at 0 each time, a text is rounded wherever it is as alone.
  """
  at_11T = jnp.arange(size)[None, None]
  over_BKT = ends_BK[:, :, None] < at_11T  # texts that a token comes after
  over_BT = jnp.sum(over_BKT, axis=1)
  starts_BT = jnp.max(jnp.where(over_BKT, ends_BK[:, :, None] + 1, 0), axis=1)
  texts_B1 = jnp.sum(ends_BK < size, axis=1, keepdims=True)
  return at_11T[0] - starts_BT, jnp.where(over_BT < texts_B1, over_BT + 1, 0)


def last_tokens(x_BTD: Float[Array, "B T D"], ends_BK: Int[Array, "B K"]) -> Float[Array, "B K D"]:
  """Returns the vector at the end of each text; where there is no text, that of the last token."""
  return jnp.take_along_axis(x_BTD, ends_BK[:, :, None], axis=1, mode="clip")


def pooled(
  x_BTD: Float[Array, "B T D"],
  ends_BK: Int[Array, "B K"],
  segments_BT: Int[Array, "B T"],
  pooling: str,
) -> Float[Array, "B K D"]:
  """Returns the vector of each text by one of POOLINGS: of its last token, its first, or the mean.

  Where there is no text, the values are arbitrary, but finite. Means are summed in float32.
  """
  if pooling == "lasttoken":
    return last_tokens(x_BTD, ends_BK)
  if pooling == "cls":
    starts_BK = jnp.pad(ends_BK[:, :-1] + 1, ((0, 0), (1, 0)))
    return last_tokens(x_BTD, starts_BK)
  texts_K = jnp.arange(1, ends_BK.shape[1] + 1)
  inside_BTK = (segments_BT[:, :, None] == texts_K[None, None]).astype(jnp.float32)
  sums_BKD = jnp.einsum("BTK,BTD->BKD", inside_BTK, x_BTD.astype(jnp.float32), precision="highest")
  return sums_BKD / jnp.maximum(jnp.sum(inside_BTK, axis=1), 1)[:, :, None]
