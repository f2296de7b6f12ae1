"""Value and gradient of a loss over the whole batch, in the memory of a part of it.

GradCache (arXiv 2101.06983): encode every micro-batch without keeping activations; differentiate
the loss with respect to all states at once; encode each micro-batch again to pull the gradient of
its states back to the parameters. Unlike accumulation, the loss sees every row of the batch.

Arrays only. Row axes: 0 of `rows`, 1 of states.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def value_and_grad(
  encode: Callable[[Any, Any], Float[Array, "E B C D"]],
  watch: Callable[[Any], Any],
  loss: Callable[..., tuple[Array, Any]],
  params: Any,
  head: Any,
  rows: Any,
  micro_batches: int,
) -> tuple[tuple[Array, Any], tuple[Any, Any]]:
  """Returns ((value, aux), gradients of (params, head)) of the whole batch.

  `encode(params, rows)` gives states, `watch(rows)` arrays without gradient of the same layout,
  `loss(states, watched, head)` (value, aux).
  """
  if micro_batches == 1:
    watched = watch(rows)
    return jax.value_and_grad(
      lambda p, h: loss(encode(p, rows), watched, h), argnums=(0, 1), has_aux=True
    )(params, head)
  parts = jax.tree.map(lambda x: _split(x, micro_batches, 0), rows)
  cached = jax.lax.map(lambda part: (encode(params, part), watch(part)), parts)
  states, watched = jax.tree.map(_join, cached)
  value, (d_states, d_head) = jax.value_and_grad(loss, argnums=(0, 2), has_aux=True)(
    states, watched, head
  )

  def add(total: Any, inputs: Any) -> tuple[Any, None]:
    part, d_part = inputs
    _, pull = jax.vjp(lambda p: encode(p, part), params)
    return jax.tree.map(jnp.add, total, pull(d_part)[0]), None

  zeros = jax.tree.map(jnp.zeros_like, params)
  grads, _ = jax.lax.scan(add, zeros, (parts, _split(d_states, micro_batches, 1)))
  return value, (grads, d_head)


def _split(x: Array, parts: int, axis: int) -> Array:
  """Returns `parts` arrays, stacked in front; part k holds the rows k, k + parts, k + 2 * parts...

  So each device, which holds a run of rows, has its share of every part without any exchange.
  """
  shape = (*x.shape[:axis], x.shape[axis] // parts, parts, *x.shape[axis + 1 :])
  return jnp.moveaxis(x.reshape(shape), axis + 1, 0)


def _join(x: Array) -> Array:
  """Returns states [parts, E, b, ...] as [E, B, ...] in the order of the batch."""
  x = jnp.moveaxis(x, 0, 2)
  return x.reshape(x.shape[0], -1, *x.shape[3:])
