"""Texts to vectors of every exit, in batches of a few fixed shapes."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Float

from mlembed_jax import hosts
from mlembed_jax.config_fields import ModelConfig
from mlembed_jax.data.batching import bucket, pad
from mlembed_jax.models.encoder import Encoder


@functools.lru_cache(maxsize=64)
def _program(
  model: ModelConfig, exits: tuple[int, ...], out: NamedSharding | None
) -> Callable[..., Any]:
  @functools.partial(jax.jit, out_shardings=out)
  def run(params: Any, tokens: Any, lengths: Any) -> Any:
    states: Any = Encoder(model, exits).apply({"params": params}, tokens, lengths[:, None] - 1)
    return states[:, :, 0].astype(jnp.float32)

  return run


def encode(
  model: ModelConfig,
  params: Any,
  ids: Sequence[Sequence[int]],
  *,
  exits: Sequence[int],
  lengths: Sequence[int],
  batch_size: int,
  sharding: NamedSharding | None = None,
) -> Float[np.ndarray, "E N D"]:
  """Returns the final-norm state of each text at each exit, float32, *before* L2 normalisation.

  Texts are sorted by length and padded to the smallest of `lengths` that holds the longest of a
  batch, so at most len(lengths) programs are compiled. `sharding` splits the rows over a mesh, of
  which every process gives all texts and gets all states.
  """
  whole = NamedSharding(sharding.mesh, PartitionSpec()) if sharding else None
  program = _program(model, tuple(exits), whole)
  order = np.argsort([len(row) for row in ids], kind="stable")
  out = np.empty((len(exits), len(ids), model.width), np.float32)
  for start in range(0, len(ids), batch_size):
    rows = order[start : start + batch_size]
    # The last batch repeats its first row instead of being a new shape.
    chosen = [ids[i] for i in np.resize(rows, batch_size).tolist()]
    inputs = pad(chosen, bucket(max(map(len, chosen)), lengths))
    if sharding:
      inputs = hosts.place(inputs, (sharding, sharding))
    out[:, rows] = np.asarray(program(params, *inputs))[:, : len(rows)]
  return out
