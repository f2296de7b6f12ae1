"""Vectors in fewer bytes, in the formats of sentence-transformers. numpy alone."""

import numpy as np
from jaxtyping import Float

PRECISIONS = ("float32", "int8", "uint8", "binary", "ubinary")
LEVELS = 255

Vectors = Float[np.ndarray, "N D"]
Ranges = Float[np.ndarray, "2 D"]


def ranges(vectors: Vectors) -> Ranges:
  """Returns the smallest and the largest value of each coordinate."""
  return np.stack([vectors.min(axis=0), vectors.max(axis=0)])


def quantize(vectors: Vectors, precision: str, of: Ranges | None = None) -> np.ndarray:
  """Returns vectors [N, D] in a precision; binary ones in [N, D / 8] bytes, a bit per coordinate.

  int8 and uint8 divide the range of each coordinate into 256 levels. `of`: these ranges, so that
  vectors of several calls can be compared; None: those of `vectors`.

  Raises:
    ValueError: an unknown precision, or coordinates that are no whole bytes.
  """
  if precision not in PRECISIONS:
    raise ValueError(f"precision: {precision!r} is not one of {', '.join(PRECISIONS)}")
  if precision == "float32":
    return vectors
  if precision in ("binary", "ubinary"):
    return _bits(vectors, precision)
  low, high = ranges(vectors) if of is None else of
  levels = (vectors - low) / np.maximum((high - low) / LEVELS, 1e-12)
  return _signed(np.clip(levels, 0, LEVELS).astype(np.uint8), precision == "int8")


def _bits(vectors: Vectors, precision: str) -> np.ndarray:
  if vectors.shape[1] % 8:
    raise ValueError(
      f"precision: {precision} needs dims in multiples of 8, found {vectors.shape[1]}"
    )
  return _signed(np.packbits(vectors > 0, axis=1), precision == "binary")


def _signed(array: np.ndarray, wanted: bool) -> np.ndarray:
  """Returns uint8 moved to the middle of int8, where that is wanted."""
  return (array.astype(np.int16) - 128).astype(np.int8) if wanted else array
