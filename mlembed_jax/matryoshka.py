"""The three Matryoshka axes: output dims, depth exits and embedding ranks, and cutting along them.

Everything here is static: sizes are Python integers, and a cut is plain slicing of a parameter
tree or of a vector. This module knows no other module of the package.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Dataclass = TypeVar("Dataclass")

# Candidate exits of the reference code; the paper's list stops at 32 and leaves out 24.
CODE_EXITS = (1, 2, 4, 8, 16, 24, 32, 40, 48)
PAPER_EXITS = (1, 2, 4, 8, 16, 32)
SMALLEST_DIM = 8
SMALLEST_RANK = 64


@dataclasses.dataclass(frozen=True)
class Slice:
  """One cut of a trained model; None keeps the whole axis."""

  rank: int | None = None  # leading columns of the token table
  depth: int | None = None  # layers, counted from the bottom
  dim: int | None = None  # leading output coordinates; cuts vectors, not parameters


@dataclasses.dataclass(frozen=True)
class Matryoshka:
  """What one run trains along each axis, with its weights."""

  dims: tuple[int, ...]  # ascending, ends with the width
  dim_weights: tuple[float, ...]  # one per dim, in the order of `dims`
  exits: tuple[int, ...]  # layer counts, ascending, ends with the depth
  ranks: tuple[int, ...]  # ascending, ends with the rank; empty for a full table
  rank_probabilities: tuple[float, ...]


def axes_of(model: Any, matryoshka: Any) -> Matryoshka:
  """Returns the axes of a `ModelConfig` and a `MatryoshkaConfig`, defaults filled in."""
  dims = matryoshka.dims or default_dims(model.width)
  ranks = matryoshka.ranks or default_ranks(model.rank)
  return Matryoshka(
    dims=dims,
    dim_weights=dim_weights(dims),
    exits=matryoshka.exits or default_exits(model.layers),
    ranks=ranks,
    rank_probabilities=rank_probabilities(ranks),
  )


def _powers_of_two(smallest: int, full: int) -> tuple[int, ...]:
  powers = (2**i for i in range(full.bit_length()))
  return (*(p for p in powers if smallest <= p < full), full)


def default_dims(width: int) -> tuple[int, ...]:
  """Returns the powers of two from 8 up to below `width`, then `width`."""
  return _powers_of_two(SMALLEST_DIM, width)


def default_exits(layers: int, candidates: Sequence[int] = CODE_EXITS) -> tuple[int, ...]:
  """Returns the candidate exits up to `layers`, and `layers` itself."""
  return tuple(sorted({e for e in candidates if e <= layers} | {layers}))


def default_ranks(rank: int) -> tuple[int, ...]:
  """Returns the powers of two from 64 up to below `rank`, then `rank`; nothing for a full table."""
  return _powers_of_two(SMALLEST_RANK, rank) if rank else ()


def dim_weights(dims: Sequence[int]) -> tuple[float, ...]:
  """Returns w = 1 / (n * sqrt(largest / dim)), n = 1 for the largest dim; their sum is not 1."""
  largest = max(dims)
  order = {dim: n for n, dim in enumerate(sorted(dims, reverse=True), start=1)}
  return tuple(1.0 / (order[dim] * (largest / dim) ** 0.5) for dim in dims)


def rank_probabilities(ranks: Sequence[int]) -> tuple[float, ...]:
  """Returns the chance of each rank in one step, proportional to the rank."""
  return tuple(rank / sum(ranks) for rank in ranks)


def slice_params(params: Mapping[str, Any], s: Slice) -> dict[str, Any]:
  """Returns the parameters of the smaller encoder whose configuration is `slice_config`.

  Raises:
    ValueError: a rank is asked of a full table, or a cut is larger than the model.
  """
  table = {"table": params["table"]}
  if "up" in params:
    table = {"table": _leading(params["table"], s.rank, 1, "rank")}
    table["up"] = _leading(params["up"], s.rank, 0, "rank")
  elif s.rank is not None:
    raise ValueError(f"rank {s.rank}: this model has a full token table, which has no ranks")
  layers = jax.tree.map(lambda a: _leading(a, s.depth, 0, "depth"), params["layers"])
  return {**params, **table, "layers": layers}


def _leading(array: Any, size: int | None, axis: int, name: str) -> Any:
  if size is None:
    return array
  if not 1 <= size <= array.shape[axis]:
    raise ValueError(f"{name} {size}: the model has 1 to {array.shape[axis]}")
  return array[:size] if axis == 0 else array[:, :size]


def slice_config(model: Dataclass, s: Slice) -> Dataclass:
  """Returns the `ModelConfig` of the encoder that `slice_params` cuts out."""
  changes = {"rank": s.rank, "layers": s.depth}
  kept = {name: size for name, size in changes.items() if size is not None}
  return dataclasses.replace(model, **kept)  # type: ignore[type-var]


def truncate(x: Float[Array, "... D"], dim: int | None) -> Float[Array, "... M"]:
  """Returns the first `dim` coordinates at unit length (divisor at least 1e-12), in float32."""
  x = x[..., :dim].astype(jnp.float32)
  # Bounding the square keeps the gradient of a zero vector finite; that of its root is not.
  square = jnp.sum(x * x, axis=-1, keepdims=True)
  return x * jax.lax.rsqrt(jnp.maximum(square, 1e-24))


def factorize(table: Float[Array, "V D"], rank: int) -> tuple[Array, Array, Array]:
  """Returns U [V, rank] and V [rank, D] with U @ V the best approximation of `table` (float32).

  The third are all singular values, [D], descending.

  The singular values go into U, so any leading columns of U with the same rows of V are the best
  approximation of that rank. This is how ML-Embed starts the factors (arXiv 2605.15081).
  """
  # Eigenvectors of the D x D Gram matrix would square the condition number; the table is tall and
  # D is small, so QR first costs V*D*D and leaves an SVD of a D x D matrix.
  q, r = jnp.linalg.qr(table.astype(jnp.float32))
  u, s, vt = jnp.linalg.svd(r, full_matrices=False)
  # Accelerators would round the inputs of a default product to bfloat16 or TF32.
  exact = jax.lax.Precision.HIGHEST
  return jnp.matmul(q, u[:, :rank] * s[None, :rank], precision=exact), vt[:rank], s
