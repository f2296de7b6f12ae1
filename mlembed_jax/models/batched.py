"""Texts to vectors of every exit, in batches of a few fixed shapes."""

import dataclasses
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
from mlembed_jax.progress import clocked


@dataclasses.dataclass(frozen=True)
class Batching:
  """The batches that texts are encoded in: their widths, their rows, and where these live."""

  lengths: Sequence[int]  # tokens; a batch is padded to the smallest that holds its longest text
  rows: Callable[[int], int]  # gives the texts of a batch of such a length
  sharding: NamedSharding | None = None  # splits the rows over a mesh; None: one device has all


@functools.lru_cache(maxsize=64)
def _program(
  model: ModelConfig, exits: tuple[int, ...], pooling: str, out: NamedSharding | None
) -> tuple[Callable[..., Any], set[tuple[int, ...]]]:
  """Returns a program, and the shapes of tokens that it was compiled for."""

  @functools.partial(jax.jit, out_shardings=out)
  def run(params: Any, tokens: Any, lengths: Any) -> Any:
    encoder = Encoder(model, exits, pooling)
    found: Any = encoder.apply({"params": params}, tokens, lengths[:, None] - 1)
    return found[:, :, 0].astype(jnp.float32)

  return run, set()


def encode_batched(
  model: ModelConfig,
  params: Any,
  ids: Sequence[Sequence[int]],
  exits: Sequence[int],
  batching: Batching,
  progress: Callable[[int], Any] = lambda count: None,
  pooling: str = "lasttoken",
) -> Float[np.ndarray, "E N D"]:
  """Returns the final-norm state of each text at each exit, float32, *before* L2 normalisation.

  Texts are sorted by length, the longest first, so that a batch needs little padding. There is one
  program per length of `batching`, at most. Where that has a mesh, every process of the mesh gives
  all texts and gets all states.

  Args:
    model: shape of the encoder.
    params: its parameters.
    ids: token ids of each text.
    exits: layer counts at which states are taken, ascending.
    batching: shapes of the batches.
    progress: is called with the number of texts of each batch that is on its way.
    pooling: one of `models.pooling.POOLINGS`; all but "lasttoken" have the exit of full depth only.
  """
  sharding = batching.sharding
  whole = NamedSharding(sharding.mesh, PartitionSpec()) if sharding else None
  program, compiled = _program(model, tuple(exits), pooling, whole)
  out = np.empty((len(exits), len(ids), model.width), np.float32)
  before: tuple[np.ndarray, Any] | None = None
  for chosen, inputs in _batches(ids, batching):
    if sharding:
      inputs = processes.place(inputs, (sharding, sharding))
    shape = inputs[0].shape
    shown = processes.is_first() and shape not in compiled
    with clocked(f"compiling the encoder for {shape[1]} tokens a text", shown=shown):
      found = chosen, program(params, *inputs)
    compiled.add(shape)
    # The device has its next batch before the states of the last one are fetched.
    if before:
      _fetch(out, *before)
    before = found
    progress(len(chosen))
  if before:
    _fetch(out, *before)
  return out


def _batches(
  ids: Sequence[Sequence[int]], batching: Batching
) -> Iterator[tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]]:
  """Yields (which texts, their tokens and lengths)."""
  order = np.argsort([-len(row) for row in ids], kind="stable")
  while order.size:
    size = bucket(len(ids[order[0]]), batching.lengths)
    rows = batching.rows(size)
    chosen, order = order[:rows], order[rows:]
    # The last batch repeats its first rows instead of being a new shape.
    yield chosen, pad([ids[i] for i in np.resize(chosen, rows).tolist()], size)


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
