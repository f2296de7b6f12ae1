"""Second moments of gradients as one number per row and one per column of each matrix (Adafactor).

Shazeer and Stern, arXiv 1804.04235. optax.scale_by_factored_rms computes the same of a matrix, but
picks the axes by size alone, so that the layers of a scanned model could be one of them, and drops
the axes that it averages over, with which sharding by the names of axes is lost. Here they stay,
with size 1, and layers are never averaged.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

# A matrix with a smaller axis keeps a number for each element, as in Adafactor: factors of it would
# save nothing.
SMALLEST = 128
LAYERS = "layers"  # stands in the path of parameters with a leading axis of layers


class FactoredState(NamedTuple):
  """Means of squared gradients, each tree like the parameters, float32."""

  count: Any  # updates done, int32
  # Means over the largest axis, which has size 1. A leaf that is too small to factor has its full
  # second moment here.
  rows: Any
  columns: Any  # means over the second largest axis; a leaf that is not factored has a single zero


def scale_by_factored_rms(beta2: float, eps: float) -> optax.GradientTransformation:
  """Returns the division of gradients by the root of their factored, bias-corrected mean square.

  `eps` bounds the root from below: its square is added to that of the gradient.
  """

  def init(params: Any) -> FactoredState:
    rows, columns = (
      jax.tree_util.tree_map_with_path(functools.partial(_zeros, i), params) for i in (0, 1)
    )
    return FactoredState(jnp.zeros((), jnp.int32), rows, columns)

  def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, FactoredState]:
    del params
    count = optax.safe_increment(state.count)
    # With this decay the mean is that of Adam divided by 1 - beta2 ** count (section 7.1).
    decay = beta2 * (1 - beta2 ** (count - 1.0)) / (1 - beta2**count)
    rows, columns = (
      jax.tree_util.tree_map_with_path(functools.partial(_decayed, i, eps, decay), old, updates)
      for i, old in enumerate((state.rows, state.columns))
    )
    scaled = jax.tree_util.tree_map_with_path(_scaled, updates, rows, columns)
    return scaled, FactoredState(count, rows, columns)

  return optax.GradientTransformation(init, update)


def _axes(path: Any, shape: tuple[int, ...]) -> tuple[int, int] | None:
  """Returns the largest axis and the second largest, None for a leaf that is not factored."""
  first = 1 if any(getattr(key, "key", None) == LAYERS for key in path) else 0
  largest = [first + int(i) for i in np.argsort(shape[first:], kind="stable")[::-1]]
  if len(largest) < 2 or shape[largest[1]] < SMALLEST:
    return None
  return largest[0], largest[1]


def _zeros(which: int, path: Any, param: Any) -> jax.Array:
  return jnp.zeros(jax.eval_shape(lambda p: _mean_square(which, 0.0, path, p), param).shape)


def _mean_square(which: int, eps: float, path: Any, grad: Any) -> jax.Array:
  """Returns the mean of the squared gradient over one axis: 0 gives `rows`, 1 gives `columns`."""
  if axes := _axes(path, grad.shape):
    return jnp.mean(jnp.square(grad) + eps**2, axis=axes[which], keepdims=True)
  return jnp.zeros((1,) * grad.ndim) if which else jnp.square(grad) + eps**2


def _decayed(which: int, eps: float, decay: Any, path: Any, mean: Any, grad: Any) -> jax.Array:
  return decay * mean + (1 - decay) * _mean_square(which, eps, path, grad)


def _scaled(path: Any, grad: jax.Array, rows: jax.Array, columns: jax.Array) -> jax.Array:
  if axes := _axes(path, grad.shape):
    # rows x columns counts the whole matrix's mean twice. Two roots: eps ** 4 is no float32.
    whole = jnp.mean(rows, axis=axes[1], keepdims=True)
    return grad * jax.lax.rsqrt(rows / whole) * jax.lax.rsqrt(columns)
  return grad * jax.lax.rsqrt(rows)
