"""Value and gradient of a loss over the whole batch, in the memory of a part of it.

GradCache (arXiv 2101.06983): encode every block of sheets; differentiate the loss with respect to
the states of all texts at once; pull the gradient of each block's states back to the parameters.
Unlike accumulation, the loss sees every row of the batch. What the backward pass needs of a block
is kept from the first pass for as many blocks as memory holds; the others are encoded again.

Sheets come by width, as data/packing.py makes them. Only blocks that hold a text are encoded.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from mlembed_jax.batch import Arrays, Sheets
from mlembed_jax.parallel.sharding import RULES
from mlembed_jax.training.split_vjp import Pull

Encode = Callable[[Any, Sheets], Float[Array, "E S K D"]]
ROWS = PartitionSpec(RULES["batch"])
STATES = PartitionSpec(None, RULES["batch"])
BLOCKS = "blocks_"  # scope of a loop over blocks: their width, first and end follow


def value_and_grad(
  encode: Encode,
  constants: Callable[[Sheets], Any],
  loss: Callable[..., tuple[Array, Any]],
  params: Any,
  head: Any,
  batch: Arrays,
  kept_tokens: int,
) -> tuple[tuple[Array, Any], tuple[Any, Any]]:
  """Returns ((value, aux), gradients of (params, head)) of the whole batch.

  Args:
    encode: `encode(params, block)` gives the states of a block's texts, [E, S, K, D].
    constants: `constants(block)` gives other arrays by text, [E', S, K, D'], without gradient.
    loss: `loss(states, constants, head)` gives (value, aux) from the arrays of all texts of the
      batch, [E, B, C, D].
    params: what the states depend on.
    head: what the loss depends on beside them.
    batch: of it the sheets are encoded; its rows and texts per row are B and C.
    kept_tokens: blocks that hold the first so many tokens of each width are encoded once.
  """
  alone, rows = len(batch.sheets) == 1, batch.hashes.shape[:2]
  passes = [_Passes(encode, constants, params, width, kept_tokens, alone) for width in batch.sheets]
  shapes = jax.eval_shape(passes[0].states, passes[0].block(0))
  into: Any = jax.tree.map(lambda x: jnp.zeros((x.shape[0], *rows, x.shape[-1]), x.dtype), shapes)
  kept = []
  for each in passes:
    into, residuals = each.forward(into)
    kept.append(residuals)
  states, fixed = into
  value, (d_states, d_head) = jax.value_and_grad(loss, argnums=(0, 2), has_aux=True)(
    states, fixed, head
  )
  grads = jax.tree.map(jnp.zeros_like, params)
  for each, residuals in zip(passes, kept, strict=True):
    grads = each.backward(d_states, residuals, grads)
  return value, (grads, d_head)


def kept_bytes(encode: Encode, params: Any, sheets: Sequence[Sheets], kept_tokens: int) -> int:
  """Returns the bytes of what is kept of `sheets` (shapes) between the passes."""
  total = 0
  for width in sheets:
    first = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), width)
    each = _Passes(encode, lambda _: None, params, width, kept_tokens, len(sheets) == 1)
    total += each.kept * Pull(encode, params, first).bytes
  return total


def work(sheets: Sequence[Sheets]) -> dict[str, Array]:
  """Returns what a batch holds, and what is computed of it, over all devices.

  `texts`, `tokens`, `computed_tokens` (places of tokens, padding too; int32) and `squares`, the
  sum over texts of s * (s + 1) for s tokens (float32, as a large batch has more than int32 holds).
  """
  return functools.reduce(functools.partial(jax.tree.map, jnp.add), map(_work, sheets))


def _work(width: Sheets) -> dict[str, Array]:
  ends, (_, S, T) = width.ends, width.tokens.shape
  starts = jnp.pad(ends[..., :-1] + 1, ((0, 0), (0, 0), (1, 0)))  # of texts; empty slots come last
  lengths = jnp.where(ends < T, ends + 1 - starts, 0)
  # Within a sheet in int32: there, it is at most T * (T + 1).
  squares = jnp.sum(lengths * (lengths + 1), axis=-1).astype(jnp.float32)
  return {
    "texts": jnp.sum(ends < T),
    "tokens": jnp.sum(lengths),
    "computed_tokens": S * T * _used(width),
    "squares": jnp.sum(squares),
  }


def _used(width: Sheets) -> Array:
  """Returns how many blocks hold a text on any device; they come first."""
  return jnp.any(width.ends < width.tokens.shape[-1], axis=(1, 2)).sum()


@dataclasses.dataclass(frozen=True)
class _Passes:
  """Both passes over the blocks of one width."""

  encode: Encode
  constants: Callable[[Sheets], Any]
  params: Any
  sheets: Sheets
  kept_tokens: int
  alone: bool  # there is no other width, so the first block holds a text

  @property
  def blocks(self) -> int:
    return len(self.sheets.tokens)

  def block(self, i: Any) -> Sheets:
    return jax.tree.map(lambda x: x[i], self.sheets)

  def states(self, block: Sheets) -> tuple[Array, Any]:
    return self.encode(self.params, block), self.constants(block)

  @functools.cached_property
  def kept(self) -> int:
    blocks, *size = self.sheets.tokens.shape
    if self.alone and blocks == 1:
      return 1  # there is no other block whose activations would need the memory
    return min(blocks, math.ceil(self.kept_tokens / (size[0] * size[1])))

  @functools.cached_property
  def pull(self) -> Pull:
    return Pull(self.encode, self.params, self.block(0))

  def forward(self, into: Any) -> tuple[Any, Any]:
    """Returns `into` with the states of these blocks, and what is kept of the first ones."""

    def keep(i: Array, carry: Any) -> Any:
      into, residuals = carry
      block = self.block(i)
      states, found = self.pull.forward(self.params, block)
      residuals = jax.tree.map(lambda all_, x: all_.at[i].set(x), residuals, found)
      return _put_all(into, (states, self.constants(block)), block), residuals

    def encode(i: Array, into: Any) -> Any:
      return _put_all(into, self.states(self.block(i)), self.block(i))

    residuals = self.pull.empty(self.kept) if self.kept else ()
    into, residuals = self._loop(0, self.kept, keep, (into, residuals))
    return self._loop(self.kept, self.blocks, encode, into), residuals

  def backward(self, d_states: Array, residuals: Any, grads: Any) -> Any:
    """Returns `grads` plus the gradient of these blocks."""

    def from_kept(i: Array, total: Any) -> Any:
      found = jax.tree.map(lambda x: x[i], residuals)
      d_block = _take(d_states, self.sheets.texts[i])
      d_params = self.pull.back(self.params, self.block(0), found, d_block)
      return jax.tree.map(jnp.add, total, d_params)

    def from_text(i: Array, total: Any) -> Any:
      block = self.block(i)
      _, pull = jax.vjp(lambda p: self.encode(p, block), self.params)
      return jax.tree.map(jnp.add, total, pull(_take(d_states, block.texts))[0])

    grads = self._loop(0, self.kept, from_kept, grads)
    return self._loop(self.kept, self.blocks, from_text, grads)

  def _loop(self, start: int, end: int, body: Callable[..., Any], carry: Any) -> Any:
    """Returns the carry after the used blocks from `start` to before `end`."""
    width = self.sheets.tokens.shape[-1]
    if start == end:
      return carry
    if self.alone and (start, end) == (0, 1):
      # Without a loop what is kept is not copied to where the loop keeps it.
      return body(jnp.int32(0), carry)
    with jax.named_scope(f"{BLOCKS}{width}_{start}_{end}"):
      # The loop runs as often on every device: collectives are in its body.
      stop = jnp.minimum(_used(self.sheets), end)
      return jax.lax.fori_loop(start, stop, body, carry)


# Texts are numbered within their shard, so states never leave their device: shard_map promises it.


def _put_all(into: Any, states: Any, block: Sheets) -> Any:
  """Returns arrays by text with those of a block, [E, S, K, D], in their places."""
  return jax.tree.map(functools.partial(_put, texts_SK=block.texts), into, states)


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
