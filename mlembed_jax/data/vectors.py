"""A teacher's vectors of training texts: .npy files named by the manifest, left on disk."""

import functools
import hashlib
import io
import math
import pathlib
import zlib

import numpy as np

from mlembed_jax.data.manifest import File
from mlembed_jax.errors import DataError


@functools.lru_cache(maxsize=64)
def _open(path: str) -> np.ndarray:
  if "://" in path:
    raise DataError(f"{path}: teacher_vectors are read from local files; copy it beside the others")
  try:
    array = np.lib.format.open_memmap(path, mode="r")
  except FileNotFoundError as error:
    raise DataError(f"{path}: this file of teacher_vectors does not exist") from error
  except (ValueError, OSError) as error:
    raise DataError(f"{path}: not a readable .npy file: {error}") from error
  if not array.ndim:
    raise DataError(f"{path}: holds one number, expected [rows, D]")
  if array.dtype not in (np.float16, np.float32):
    raise DataError(f"{path}: expected float16 or float32, found {array.dtype}")
  return np.asarray(array)


def check_shapes(file: File, rows: int | None = None) -> None:
  """Raises DataError where the files do not fit the manifest, or this number of rows."""
  width = None
  for key, path in file.vectors.items():
    array = _open(path)
    each = {"query": (), "passage": (file.positives,) if file.positives > 1 else ()}
    shape = (rows or array.shape[0], *each.get(key, (file.negatives,)))
    width = width or array.shape[-1]
    if array.shape[:-1] != shape:
      expected = ", ".join(map(str, (*shape, "D")))
      raise DataError(
        f"{path}: expected [{expected}], found {list(array.shape)}; write the vectors of every row "
        f"of {file.name}, unusable ones too, in order"
      )
    if array.shape[-1] != width:
      raise DataError(
        f"{path}: its vectors are {array.shape[-1]} numbers wide, but those of the queries {width}"
      )


def check_rows(file: File, rows: np.ndarray) -> None:
  """Raises DataError where a vector of these rows is missing, not finite or zero."""
  for path in file.vectors.values():
    array = _open(path)
    if rows.size and rows[-1] >= len(array):
      check_shapes(file, int(rows[-1]) + 1)
    for part in _parts(rows):
      vectors = _rows(array, part)
      finite = np.all(np.isfinite(vectors), axis=(1, 2))
      zero = np.any(np.all(vectors == 0, axis=2), axis=1)
      if not finite.all():
        raise DataError(
          f"{path}: row {part[~finite][0]} holds NaN or infinity (float16 ends at 65504); "
          "write finite vectors"
        )
      if zero.any():
        raise DataError(f"{path}: row {part[zero][0]} holds a vector of zeros; write real ones")


def _parts(rows: np.ndarray) -> list[np.ndarray]:
  """Returns the rows in pieces whose vectors fit in memory: 1,024 x 26 x 4,096 are 200 MB."""
  return np.array_split(rows, -(-rows.size // 1024) or 1)


def copy(file: File, rows: np.ndarray, target: pathlib.Path) -> tuple[str, np.ndarray]:
  """Writes the vectors of these rows as .npy [N, C, D]: query, positives, negatives.

  Returns a digest of them, and the CRC-32 of the file's header and of each row, [1 + N] uint32: a
  row is checked by itself, for a batch reads few rows of each of many files.
  """
  arrays, digest = [_open(path) for path in file.vectors.values()], hashlib.sha256()
  header = _header(np.concatenate([_rows(array, rows[:0]) for array in arrays], axis=1), rows.size)
  checksums = [zlib.crc32(header)]
  with target.open("wb") as out:
    out.write(header)
    for part in _parts(rows):
      data = np.concatenate([_rows(array, part) for array in arrays], axis=1)
      checksums += [zlib.crc32(row.tobytes()) for row in data]
      content = data.tobytes()
      digest.update(content)
      out.write(content)
  return digest.hexdigest(), np.array(checksums, np.uint32)


def _header(empty: np.ndarray, rows: int) -> bytes:
  """Returns the header of a .npy file of so many rows that are like those of `empty`, [0, C, D]."""
  out = io.BytesIO()
  described = np.lib.format.header_data_from_array_1_0(empty)
  np.lib.format.write_array_header_1_0(out, described | {"shape": (rows, *empty.shape[1:])})
  return out.getvalue()


def _rows(array: np.ndarray, rows: np.ndarray) -> np.ndarray:
  """Returns the vectors of these rows, possibly none, [N, C, D]."""
  return array[rows].reshape(rows.size, math.prod(array.shape[1:-1]), array.shape[-1])
