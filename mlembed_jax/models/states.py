"""Texts to vectors of every exit, in batches of a few fixed shapes."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Float

from mlembed_jax.config_fields import ModelConfig
from mlembed_jax.models.encoder import Encoder
from mlembed_jax.parallel import processes


@functools.lru_cache(maxsize=64)
def _program(
  model: ModelConfig, exits: tuple[int, ...], out: NamedSharding | None
) -> Callable[..., Any]:
  @functools.partial(jax.jit, out_shardings=out)
  def run(params: Any, tokens: Any, lengths: Any) -> Any:
    found: Any = Encoder(model, exits).apply({"params": params}, tokens, lengths[:, None] - 1)
    return found[:, :, 0].astype(jnp.float32)

  return run


def states(
  model: ModelConfig,
  params: Any,
  ids: Sequence[Sequence[int]],
  *,
  exits: Sequence[int],
  lengths: Sequence[int],
  rows: Callable[[int], int],
  sharding: NamedSharding | None = None,
  progress: Callable[[int], Any] = lambda count: None,
) -> Float[np.ndarray, "E N D"]:
  """Returns the final-norm state of each text at each exit, float32, *before* L2 normalisation.

  Texts are sorted by length, the longest first, and padded to the smallest of `lengths` that holds
  the longest of a batch; a batch of this length has `rows(length)` texts, so there are at most
  len(lengths) programs. `sharding` splits the rows over a mesh, of which every process gives all
  texts and gets all states. `progress` is told how many texts are on their way.
  """
  whole = NamedSharding(sharding.mesh, PartitionSpec()) if sharding else None
  program = _program(model, tuple(exits), whole)
  out = np.empty((len(exits), len(ids), model.width), np.float32)
  before: tuple[np.ndarray, Any] | None = None
  for chosen, inputs in _batches(ids, lengths, rows):
    if sharding:
      inputs = processes.place(inputs, (sharding, sharding))
    found = chosen, program(params, *inputs)
    # The device has its next batch before the states of the last one are fetched.
    if before:
      _fetch(out, *before)
    before = found
    progress(len(chosen))
  if before:
    _fetch(out, *before)
  return out


def _batches(
  ids: Sequence[Sequence[int]], lengths: Sequence[int], rows: Callable[[int], int]
) -> Iterator[tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]]:
  """Yields (which texts, their tokens and lengths)."""
  order = np.argsort([-len(row) for row in ids], kind="stable")
  while order.size:
    size = bucket(len(ids[order[0]]), lengths)
    chosen, order = order[: rows(size)], order[rows(size) :]
    # The last batch repeats its first row instead of being a new shape.
    yield chosen, pad([ids[i] for i in np.resize(chosen, rows(size)).tolist()], size)


def _fetch(out: np.ndarray, rows: np.ndarray, found: Any) -> None:
  out[:, rows] = np.asarray(found)[:, : len(rows)]


def bucket(length: int, lengths: Sequence[int]) -> int:
  """Returns the smallest of `lengths` that holds `length` tokens."""
  return next(size for size in sorted(lengths) if size >= length)


def pad(ids: Sequence[Sequence[int]], size: int) -> tuple[np.ndarray, np.ndarray]:
  """Returns tokens [N, size], padded on the right with 0, and lengths [N]; both int32."""
  tokens = np.zeros((len(ids), size), np.int32)
  for row, values in zip(tokens, ids, strict=True):
    row[: len(values)] = values
  return tokens, np.array([len(values) for values in ids], np.int32)
