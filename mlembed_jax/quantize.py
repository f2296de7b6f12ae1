"""Vectors at unit length, and in fewer bytes as sentence-transformers has them. numpy alone."""

import pathlib

import numpy as np
from jaxtyping import Float

PRECISIONS = ("float32", "int8", "uint8", "binary", "ubinary")
LEVELED = ("int8", "uint8")  # a level of each coordinate's range
LEVELS = 255
RANGES_SUFFIX = ".ranges.npy"  # of the ranges beside a file of vectors, after its stem
LEAST_TEXTS = 100  # to take ranges from; sentence-transformers warns of fewer

Vectors = Float[np.ndarray, "N D"]
Ranges = Float[np.ndarray, "2 D"]


def ranges_path(vectors: pathlib.Path) -> pathlib.Path:
  """Returns the file of the ranges of a file of vectors."""
  return vectors.with_name(vectors.stem + RANGES_SUFFIX)


def unit(vectors: Vectors) -> Vectors:
  """Returns vectors at unit length; the divisor is at least 1e-12."""
  return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def ranges(vectors: Vectors) -> Ranges:
  """Returns the smallest and the largest value of each coordinate."""
  return np.stack([vectors.min(axis=0), vectors.max(axis=0)])


def check_precision(
  precision: str, count: int, dim: int, calibration: Ranges | None = None
) -> None:
  """Raises ValueError where `quantize` cannot make `count` vectors [D = dim] of these arguments.

  An unknown precision; coordinates that are no whole bytes; int8 or uint8 of fewer than 100 vectors
  without `calibration`, as their own ranges would make codes of them that say nothing (of one
  vector: all -128); a `calibration` that is no range for each coordinate.
  """
  if precision not in PRECISIONS:
    raise ValueError(f"precision: {precision!r} is not one of {', '.join(PRECISIONS)}")
  if precision in ("binary", "ubinary") and dim % 8:
    raise ValueError(f"precision: {precision} needs dims in multiples of 8, found {dim}")
  if precision in LEVELED and calibration is not None:
    check_ranges(calibration, dim)
  elif precision in LEVELED and 0 < count < LEAST_TEXTS:
    raise ValueError(
      f"precision: {precision} needs ranges, or at least {LEAST_TEXTS} texts to take them from, "
      f"found {count}; give the ranges that the documents were rounded by (of a file "
      "OUT.ranges.npy, or of a folder whose export stored them)"
    )


def check_ranges(calibration: Ranges, dim: int) -> None:
  """Raises ValueError where `calibration` is not a finite range for each of `dim` coordinates."""
  if np.shape(calibration) != (2, dim):
    raise ValueError(f"ranges: expected [2, {dim}], found {list(np.shape(calibration))}")
  low, high = np.asarray(calibration, np.float32)
  if not (np.isfinite(low) & np.isfinite(high) & (low <= high)).all():
    raise ValueError("ranges: a coordinate has no finite range, or one that ends below its start")


def quantize(vectors: Vectors, precision: str, calibration: Ranges | None = None) -> np.ndarray:
  """Returns vectors [N, D] in a precision; binary ones in [N, D / 8] bytes, a bit per coordinate.

  int8 and uint8 divide the range of each coordinate into 256 levels, which `decoded` reads.
  `calibration`: these ranges, so that vectors of several calls can be compared; None: those of
  `vectors`, which must be 100 at least.

  Raises:
    ValueError: see `check_precision`.
  """
  check_precision(precision, len(np.atleast_2d(vectors)), vectors.shape[-1], calibration)
  if precision == "float32":
    return vectors
  if precision in ("binary", "ubinary"):
    return _signed(np.packbits(vectors > 0, axis=-1), precision == "binary")
  if calibration is None:
    calibration = ranges(vectors) if vectors.size else np.zeros((2, vectors.shape[-1]))
  low, step = _levels(calibration)
  levels = np.clip(np.floor((vectors - low) / step), 0, LEVELS).astype(np.uint8)
  return _signed(levels, precision == "int8")


def decoded(codes: np.ndarray, calibration: Ranges) -> Vectors:
  """Returns the float32 vectors [N, D] that int8 or uint8 codes stand for, the middles of levels.

  `calibration`: the ranges that they were made by. Cosines and products of codes themselves order
  texts in another way: every level stands for another number in each coordinate.

  Raises:
    ValueError: codes of another type, or ranges that are not theirs.
  """
  name = codes.dtype.name
  if name not in LEVELED:
    raise ValueError(f"codes: expected int8 or uint8, found {name}")
  check_ranges(calibration, codes.shape[-1])
  low, step = _levels(calibration)
  levels = codes.astype(np.float32) + (128 if name == "int8" else 0)
  return np.minimum(low + (levels + 0.5) * step, np.asarray(calibration[1], np.float32))


def outside(vectors: Vectors, calibration: Ranges) -> int:
  """Returns how many coordinates lie beyond their range, where codes cannot tell them apart."""
  low, high = np.asarray(calibration, np.float32)
  return int(np.count_nonzero((vectors < low) | (vectors > high)))


def _levels(calibration: Ranges) -> tuple[np.ndarray, np.ndarray]:
  """Returns where the levels of each coordinate begin, and how far apart they are."""
  low, high = np.asarray(calibration, np.float32)
  step = (high - low) / LEVELS
  return low, np.where(step == 0, np.float32(1), step)  # as sentence-transformers has it


def rounded(vectors: Vectors, precision: str) -> Vectors:
  """Returns what is left of vectors in a precision, in float32, for cosines of what is stored.

  Of int8 and uint8 the decoded codes by the vectors' own ranges, however few they are; 1 and -1 for
  bits, whose cosines order vectors as Hamming distances do. Raises ValueError for an unknown
  precision.
  """
  if precision in LEVELED:
    own = ranges(vectors)
    return decoded(quantize(vectors, precision, own), own)
  if precision in ("binary", "ubinary"):
    return np.where(vectors > 0, np.float32(1), np.float32(-1))
  return quantize(vectors, precision)


def _signed(array: np.ndarray, wanted: bool) -> np.ndarray:
  """Returns uint8 values, as int8 around zero where `wanted`."""
  return (array.astype(np.int16) - 128).astype(np.int8) if wanted else array
