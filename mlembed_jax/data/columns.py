"""Numbers per row beside the shards of a split, checked as they are read."""

import dataclasses
import os
import pathlib
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mlembed_jax.data.file_digests import FileDigest, problem
from mlembed_jax.data.names import CHECKSUMS, VECTORS
from mlembed_jax.errors import DataError

RESTORE = (
  "restore it, or run the command that prepared the dataset again: it writes what is missing or "
  "damaged"
)


@dataclasses.dataclass(frozen=True)
class _Opened:
  """A file of numbers per row."""

  descriptor: int
  offset: int  # of the first row, in bytes
  shape: tuple[int, ...]  # of a row
  dtype: np.dtype
  checksums: np.ndarray | None  # CRC-32 of the header and of each row


class Columns:
  """Numbers per row beside the shards of a split: token counts, a teacher's vectors.

  Read without mapping the files to memory, whose pages would be counted as this process's. Files
  with checksums, those of vectors, are checked row by row as they are read: a batch of 1,024 rows
  touches all 305 files of 5 million rows, and with two vectors of 4,096 numbers in float16 each
  process would read 82 GB to check them whole. With the check, 1,024 rows in memory take 40 ms,
  without it 25 (on a busy core). Other files are read whole once by each process: 2 bytes per text
  of a row, 260 MB for 5 million rows of 26 texts.
  """

  def __init__(
    self, paths: Sequence[pathlib.Path], digests: Mapping[str, FileDigest], remedy: str = RESTORE
  ):
    """Opens nothing yet.

    Args:
      paths: the files by shard; those that are never read may be missing.
      digests: of files by name.
      remedy: what is to be done about a damaged file.
    """
    self._paths, self._digests, self._remedy = list(paths), digests, remedy
    self._open: dict[int, _Opened] = {}

  def __getstate__(self) -> dict[str, Any]:
    return self.__dict__ | {"_open": {}}  # another process opens its own

  def row(self, shard: int, place: int) -> np.ndarray:
    """Returns the numbers of one row; raises DataError where they cannot be read."""
    file, path = self._file(shard), self._paths[shard]
    size = file.dtype.itemsize * int(np.prod(file.shape))
    data = os.pread(file.descriptor, size, file.offset + place * size)
    if len(data) != size:
      raise DataError(f"{path}: row {place} is missing; prepare the dataset again")
    if file.checksums is not None and zlib.crc32(data) != file.checksums[1 + place]:
      raise DataError(f"{path}: row {place} is damaged; {self._remedy}")
    return np.frombuffer(data, file.dtype).reshape(file.shape)

  def shape(self, shard: int) -> tuple[int, ...]:
    """Returns the shape of a row."""
    return self._file(shard).shape

  def _file(self, shard: int) -> _Opened:
    if shard not in self._open:
      self._open[shard] = self._opened(self._paths[shard])
    return self._open[shard]

  def _opened(self, path: pathlib.Path) -> _Opened:
    sums = path.with_name(path.name + CHECKSUMS)
    by_row = sums.name in self._digests  # earlier versions wrote none beside vectors
    self._check(path, quick=path.name.endswith(VECTORS))
    if by_row:
      self._check(sums)
    try:
      checksums = np.load(sums) if by_row else None
      descriptor = os.open(path, os.O_RDONLY)
      if checksums is not None and zlib.crc32(_header(descriptor)) != checksums[0]:
        raise DataError(f"{path}: its header is damaged; {self._remedy}")
      array = np.load(path, mmap_mode="r")
    except (OSError, ValueError) as error:
      raise DataError(f"{path} cannot be read: {error}") from error
    return _Opened(descriptor, array.offset, array.shape[1:], array.dtype, checksums)

  def _check(self, path: pathlib.Path, *, quick: bool = False) -> None:
    """Raises DataError where a file is not as it was written; 0.1.0 did not keep how it was."""
    expected = self._digests.get(path.name)
    if expected and (wrong := problem(path, expected, quick=quick)):
      raise DataError(f"{path} {wrong}; {self._remedy}")


def _header(descriptor: int) -> bytes:
  """Returns the header of a .npy file of version 1.0: 8 bytes, 2 of its length, and the rest."""
  length = int.from_bytes(os.pread(descriptor, 2, 8), "little")
  return os.pread(descriptor, 10 + length, 0)
