"""Positions and last-token pooling of right-padded rows. Takes arrays only."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def right_padded(lengths_B: Int[Array, "B"], size: int) -> tuple[Array, Array, Array]:
  """Returns positions [B, size], segments [B, size] (1 for text, 0 for padding) and last [B].

  The mask comes from the lengths, never from a token id: the padding id may be the pooled one.
  """
  positions_BT = jnp.broadcast_to(jnp.arange(size)[None, :], (lengths_B.shape[0], size))
  segments_BT = (positions_BT < lengths_B[:, None]).astype(jnp.int32)
  return positions_BT, segments_BT, lengths_B - 1


def last_token(x_BTD: Float[Array, "B T D"], last_B: Int[Array, "B"]) -> Float[Array, "B D"]:
  """Returns row b's vector at position `last_B[b]`."""
  return jnp.take_along_axis(x_BTD, last_B[:, None, None], axis=1)[:, 0]
