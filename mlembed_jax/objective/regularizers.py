"""Terms that shape vectors for indexes: spread over the sphere, robust to int8 and to one bit.

Arrays only; letters as in negatives.py.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mlembed_jax.matryoshka import truncate
from mlembed_jax.objective.similarity import product

INT8_LEVELS = 127  # on each side of zero


def spread_out(
  x_BD: Float[Array, "B D"], ids_B: Int[Array, "B"], dims: Sequence[int]
) -> Float[Array, "M"]:
  """Returns mean(cos)^2 + max(0, mean(cos^2) - 1/dim) over all pairs of different texts.

  These are the moments of vectors spread evenly over the sphere (GOR, arXiv 1708.06320). Of equal
  texts one counts. The sums over pairs come from the vectors' sum and their Gram matrix, so the
  pairs are never written down.
  """
  weight_B = _is_first(ids_B).astype(jnp.float32)
  count = jnp.sum(weight_B)
  pairs = jnp.maximum(count * (count - 1), 1)
  terms = []
  for dim in dims:
    unit = truncate(x_BD, dim) * weight_B[:, None]
    gram = product("bm,bn->mn", unit, unit)
    mean = (jnp.sum(jnp.square(jnp.sum(unit, axis=0))) - count) / pairs
    square = (jnp.sum(jnp.square(gram)) - count) / pairs
    terms.append(jnp.square(mean) + jax.nn.relu(square - 1 / dim))
  return jnp.stack(terms)


def _is_first(ids_B: Int[Array, "B"]) -> Bool[Array, "B"]:
  """Returns whether no row before has the same number."""
  order = jnp.argsort(ids_B, stable=True)
  ids = ids_B[order]
  is_new = jnp.concatenate([jnp.ones(1, bool), ids[1:] != ids[:-1]])
  return jnp.zeros(len(ids_B), bool).at[order].set(is_new)


def _straight_through(x: Array, quantized: Array) -> Array:
  """Returns `quantized`; its gradient is that of `x`."""
  return jax.lax.stop_gradient(quantized.astype(x.dtype)) + (x - jax.lax.stop_gradient(x))


def int8(states_BCD: Float[Array, "B C D"]) -> Float[Array, "B C D"]:
  """Returns unit vectors rounded to 255 levels per coordinate, with a straight-through gradient.

  The range of a coordinate is that of the batch, as an index calibrates it. A prefix of the
  rounded vector is the rounded prefix.
  """
  unit = truncate(states_BCD, None)
  step = jnp.max(jnp.abs(unit), axis=(0, 1), keepdims=True) / INT8_LEVELS
  step = jax.lax.stop_gradient(jnp.maximum(step, 1e-12))
  return _straight_through(unit, jnp.round(unit / step) * step)


def binary(states_BCD: Float[Array, "B C D"]) -> Float[Array, "B C D"]:
  """Returns the signs, +1 or -1, with a straight-through gradient.

  Their cosine is 1 - 2 * (Hamming distance / dim). States after the final norm have coordinates of
  about 1, so a sign is a rounded state and the gradient keeps its size.
  """
  return _straight_through(states_BCD, jnp.where(states_BCD < 0, -1.0, 1.0))
