"""Vectors at unit length, and in fewer bytes as sentence-transformers has them. numpy alone."""

import numpy as np
from jaxtyping import Float

PRECISIONS = ("float32", "int8", "uint8", "binary", "ubinary")
LEVELS = 255

Vectors = Float[np.ndarray, "N D"]
Ranges = Float[np.ndarray, "2 D"]


def unit(vectors: Vectors) -> Vectors:
  """Returns vectors at unit length; the divisor is at least 1e-12."""
  return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def ranges(vectors: Vectors) -> Ranges:
  """Returns the smallest and the largest value of each coordinate."""
  return np.stack([vectors.min(axis=0), vectors.max(axis=0)])


def quantize(vectors: Vectors, precision: str, calibration: Ranges | None = None) -> np.ndarray:
  """Returns vectors [N, D] in a precision; binary ones in [N, D / 8] bytes, a bit per coordinate.

  int8 and uint8 divide the range of each coordinate into 256 levels. `calibration`: these
  ranges, so that vectors of several calls can be compared; None: those of `vectors`.

  Raises:
    ValueError: an unknown precision, or coordinates that are no whole bytes.
  """
  if precision not in PRECISIONS:
    raise ValueError(f"precision: {precision!r} is not one of {', '.join(PRECISIONS)}")
  if precision == "float32":
    return vectors
  if precision in ("binary", "ubinary"):
    return _bits(vectors, precision)
  low, high = ranges(vectors) if calibration is None else calibration
  levels = (vectors - low) / np.maximum((high - low) / LEVELS, 1e-12)
  return _signed(np.clip(levels, 0, LEVELS).astype(np.uint8), precision == "int8")


def rounded(vectors: Vectors, precision: str) -> Vectors:
  """Returns what is left of vectors in a precision, in float32, for cosines of what is stored.

  The middle of each of the 256 levels that int8 and uint8 make of the vectors' own ranges; 1 and -1
  for bits, whose cosines order vectors as Hamming distances do. Raises ValueError for an unknown
  precision.
  """
  if precision in ("int8", "uint8"):
    low, high = calibration = ranges(vectors)
    levels = quantize(vectors, "uint8", calibration).astype(np.float32)
    return np.minimum(low + (levels + 0.5) * (high - low) / LEVELS, high)
  if precision in ("binary", "ubinary"):
    return np.where(vectors > 0, np.float32(1), np.float32(-1))
  return quantize(vectors, precision)


def _bits(vectors: Vectors, precision: str) -> np.ndarray:
  if vectors.shape[1] % 8:
    raise ValueError(
      f"precision: {precision} needs dims in multiples of 8, found {vectors.shape[1]}"
    )
  return _signed(np.packbits(vectors > 0, axis=1), precision == "binary")


def _signed(array: np.ndarray, wanted: bool) -> np.ndarray:
  """Returns uint8 values, as int8 around zero where `wanted`."""
  return (array.astype(np.int16) - 128).astype(np.int8) if wanted else array
