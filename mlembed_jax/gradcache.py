"""Value and gradient of a loss over the whole batch, in the memory of a part of it.

GradCache (arXiv 2101.06983): encode every block of sheets without keeping activations;
differentiate the loss with respect to the states of all texts at once; encode each block again to
pull the gradient of its states back to the parameters. Unlike accumulation, the loss sees every row
of the batch.

Arrays only. Sheets of one width: tokens [n, S, T], ends [n, S, K] and texts [n, S, K] of n blocks,
as data/packing.py makes them. Only blocks that hold a text are encoded.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from mlembed_jax.sharding import RULES

Sheets = dict[str, Array]
Body = Callable[[Sheets, Any], Any]
ROWS = PartitionSpec(RULES["batch"])
STATES = PartitionSpec(None, RULES["batch"])


def value_and_grad(
  encode: Callable[[Any, Sheets], Float[Array, "E S K D"]],
  watch: Callable[[Sheets], Any],
  loss: Callable[..., tuple[Array, Any]],
  params: Any,
  head: Any,
  sheets: Sequence[Sheets],
  rows: tuple[int, int],
) -> tuple[tuple[Array, Any], tuple[Any, Any]]:
  """Returns ((value, aux), gradients of (params, head)) of the whole batch.

  `encode(params, block)` gives the states of a block's texts, `watch(block)` arrays without
  gradient of the same layout; `loss(states, watched, head)` gives (value, aux) from what they give
  for all texts of the batch, [E, B, C, D]. `rows` is (B, C).
  """
  if _at_once(sheets):
    # One block is the whole batch: no second encoding.
    watched = _by_text(watch, sheets, rows, _each_block)
    return jax.value_and_grad(
      lambda p, h: loss(
        _by_text(functools.partial(encode, p), sheets, rows, _each_block), watched, h
      ),
      argnums=(0, 1),
      has_aux=True,
    )(params, head)
  both = lambda block: (encode(params, block), watch(block))  # noqa: E731
  states, watched = _by_text(both, sheets, rows, _each_used_block)
  value, (d_states, d_head) = jax.value_and_grad(loss, argnums=(0, 2), has_aux=True)(
    states, watched, head
  )

  def add(block: Sheets, total: Any) -> Any:
    _, pull = jax.vjp(lambda p: encode(p, block), params)
    return jax.tree.map(jnp.add, total, pull(_take(d_states, block["texts"]))[0])

  grads = _each_used_block(sheets, add, jax.tree.map(jnp.zeros_like, params))
  return value, (grads, d_head)


def work(sheets: Sequence[Sheets]) -> dict[str, Array]:
  """Returns what a batch holds, and what is computed of it, over all devices of all hosts.

  `texts`, `tokens`, `computed_tokens` (places of tokens, padding too; int32) and `squares`, the
  sum over texts of s * (s + 1) for s tokens (float32, as a large batch has more than int32 holds).
  """
  widths = [_work(width, _at_once(sheets)) for width in sheets]
  return functools.reduce(functools.partial(jax.tree.map, jnp.add), widths)


def _work(width: Sheets, at_once: bool) -> dict[str, Array]:
  ends, (_, S, T) = width["ends"], width["tokens"].shape
  starts = jnp.pad(ends[..., :-1] + 1, ((0, 0), (0, 0), (1, 0)))  # of texts; empty slots come last
  lengths = jnp.where(ends < T, ends + 1 - starts, 0)
  # Within a sheet in int32: there, it is at most T * (T + 1).
  squares = jnp.sum(lengths * (lengths + 1), axis=-1).astype(jnp.float32)
  return {
    "texts": jnp.sum(ends < T),
    "tokens": jnp.sum(lengths),
    "computed_tokens": S * T * (jnp.asarray(len(ends)) if at_once else _used(width)),
    "squares": jnp.sum(squares),
  }


def _at_once(sheets: Sequence[Sheets]) -> bool:
  return all(len(width["texts"]) == 1 for width in sheets)


def _used(width: Sheets) -> Array:
  """Returns how many blocks hold a text on any device; they come first."""
  return jnp.any(width["ends"] < width["tokens"].shape[-1], axis=(1, 2)).sum()


def _each_block(sheets: Sequence[Sheets], body: Body, carry: Any) -> Any:
  """Returns the carry after every block, differentiably."""
  for width in sheets:
    for i in range(len(width["texts"])):
      carry = body(_block(width, i), carry)
  return carry


def _each_used_block(sheets: Sequence[Sheets], body: Body, carry: Any) -> Any:
  """Returns the carry after every block with a text on any device."""
  for width in sheets:
    # The loop runs as often on every device: collectives are in its body.
    step = lambda i, carry, width=width: body(_block(width, i), carry)  # noqa: E731
    carry = jax.lax.fori_loop(0, _used(width), step, carry)
  return carry


def _block(width: Sheets, i: Any) -> Sheets:
  return jax.tree.map(lambda x: x[i], width)


def _by_text(
  run: Callable[[Sheets], Any], sheets: Sequence[Sheets], rows: tuple[int, int], loop: Any
) -> Any:
  """Returns what `run` gives for each block, [E, S, K, D], as [E, B, C, D]."""

  def write(block: Sheets, into: Any) -> Any:
    put = functools.partial(_put, texts_SK=block["texts"])
    return jax.tree.map(put, into, run(block))

  shapes = jax.eval_shape(run, _block(sheets[0], 0))
  empty = jax.tree.map(lambda x: jnp.zeros((x.shape[0], *rows, x.shape[-1]), x.dtype), shapes)
  return loop(sheets, write, empty)


# Texts are numbered within their shard, so states never leave their device: shard_map promises it.


def _put(
  into_EBCD: Float[Array, "E B C D"],
  states_ESKD: Float[Array, "E S K D"],
  texts_SK: Int[Array, "S K"],
) -> Float[Array, "E B C D"]:
  """Returns `into` with states in the zeros of their texts; empty slots are of no text."""

  def local(into: Array, states: Array, texts: Array) -> Array:
    flat, states = (x.reshape(len(x), -1, x.shape[-1]) for x in (into, states))
    # Added, not set: its transpose is a plain look-up.
    return flat.at[:, texts.reshape(-1)].add(states, mode="drop").reshape(into.shape)

  return jax.shard_map(local, in_specs=(STATES, STATES, ROWS), out_specs=STATES)(
    into_EBCD, states_ESKD, texts_SK
  )


def _take(x_EBCD: Float[Array, "E B C D"], texts_SK: Int[Array, "S K"]) -> Float[Array, "E S K D"]:
  """Returns the vector of the text in each slot, 0 where there is none."""

  def local(x: Array, texts: Array) -> Array:
    flat = x.reshape(len(x), -1, x.shape[-1])
    return flat.at[:, texts].get(mode="fill", fill_value=0)

  return jax.shard_map(local, in_specs=(STATES, ROWS), out_specs=STATES)(x_EBCD, texts_SK)
