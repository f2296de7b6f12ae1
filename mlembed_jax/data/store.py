"""The rows of a split as training asks for them: by file, language and number."""

import dataclasses
import os
import pathlib
import zlib
from typing import Any

import numpy as np
from jaxtyping import Int64

from mlembed_jax.data import languages, mixture, records
from mlembed_jax.data.catalog import Catalog
from mlembed_jax.data.file_digests import problem
from mlembed_jax.data.manifest import File
from mlembed_jax.data.mixture import Unit
from mlembed_jax.data.names import CHECKSUMS, LENGTHS, VECTORS, shard_name
from mlembed_jax.data.transforms import RowShard
from mlembed_jax.errors import DataError


class Rows:
  """Where the rows of each unit stand in a split.

  A shard holds a run of rows of each of its languages, so a few thousand runs place 60 million
  rows.
  """

  def __init__(self, shards: list[RowShard], chosen: list[Unit]):
    """Finds the runs of the units `chosen`, those of the files that are trained on."""
    number = {(unit.file, unit.language): n for n, unit in enumerate(chosen)}
    found: list[tuple[int, int, int]] = []  # unit, first record, rows
    start = 0
    for shard in shards:
      for run in shard.runs:
        if (shard.file, run.language) in number:
          found.append((number[shard.file, run.language], start, run.rows))
        start += run.rows
    runs = np.array(sorted(found), np.int64)
    self._first, self._virtual = runs[:, 1], np.concatenate([[0], np.cumsum(runs[:, 2])])
    self._units = self._virtual[np.searchsorted(runs[:, 0], np.arange(len(chosen)))]

  def place(self, units: np.ndarray, rows: np.ndarray) -> Int64[np.ndarray, "B"]:
    """Returns the record of each row of its unit."""
    virtual = self._units[units] + rows
    run = np.searchsorted(self._virtual, virtual, side="right") - 1
    return self._first[run] + virtual - self._virtual[run]


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

  def __init__(self, catalog: Catalog, split: str, suffix: str):
    shards = len(catalog.shards[split])
    self._paths = [catalog.folder / (shard_name(split, i, shards) + suffix) for i in range(shards)]
    self._digests = catalog.digests
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
      raise DataError(f"{path}: row {place} is damaged; {RESTORE}")
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
        raise DataError(f"{path}: its header is damaged; {RESTORE}")
      array = np.load(path, mmap_mode="r")
    except (OSError, ValueError) as error:
      raise DataError(f"{path} cannot be read: {error}") from error
    return _Opened(descriptor, array.offset, array.shape[1:], array.dtype, checksums)

  def _check(self, path: pathlib.Path, *, quick: bool = False) -> None:
    """Raises DataError where a file is not as it was written; 0.1.0 did not keep how it was."""
    expected = self._digests.get(path.name)
    if expected and (wrong := problem(path, expected, quick=quick)):
      raise DataError(f"{path} {wrong}; {RESTORE}")


def _header(descriptor: int) -> bytes:
  """Returns the header of a .npy file of version 1.0: 8 bytes, 2 of its length, and the rest."""
  length = int.from_bytes(os.pread(descriptor, 2, 8), "little")
  return os.pread(descriptor, 10 + length, 0)


@dataclasses.dataclass(frozen=True)
class Split:
  """The rows of the chosen files of a split, and all documents."""

  files: list[File]
  units: list[Unit]
  merged: dict[str, list[str]]  # languages of several tags, with these
  shards: list[RowShard]
  rows: Rows
  queries: records.Records
  documents: records.Records
  lengths: Columns
  vectors: Columns

  def longest(self, file: File) -> int:
    """Returns the tokens of the longest text of a file."""
    return max(shard.longest for shard in self.shards if shard.file == file.name)

  def vectors_shape(self, file: File) -> tuple[int, int] | None:
    """Returns texts per row and width of the teacher's vectors of a file, if it has any."""
    if not file.vectors:
      return None
    texts, width = self.vectors.shape(self._shard(file))
    return texts, width

  def first_vectors(self, file: File, rows: int) -> np.ndarray:
    """Returns the teacher's vectors of up to `rows` rows of a file, [n, C, D]."""
    shard = self._shard(file)
    rows = min(rows, self.shards[shard].written.records)
    return np.array([self.vectors.row(shard, place) for place in range(rows)])

  def _shard(self, file: File) -> int:
    """Returns a shard that has rows of the file."""
    return next(i for i, s in enumerate(self.shards) if s.file == file.name and s.written.records)


def open_split(
  catalog: Catalog, split: str, names: list[str], language_key: str = languages.LANGUAGE_SCRIPT
) -> Split:
  """Returns a split of these files, in this order.

  The languages of its units are keys, as `data.language_key` says; records keep their own tags.

  Raises:
    DataError: a file has no rows.
  """
  tags = [r.language for s in catalog.shards[split] if s.file in names for r in s.runs]
  shards = [_keyed(shard, language_key) for shard in catalog.shards[split]]
  filled = {shard.file for shard in shards if shard.written.records}
  if empty := [name for name in names if name not in filled]:
    raise DataError(f"{catalog.folder}: {empty[0]} has no rows for {split}; leave it out")
  units = [u for name in names for u in mixture.units([s for s in shards if s.file == name])]
  return Split(
    files=[catalog.files[name] for name in names],
    units=units,
    merged=languages.merged(tags, language_key),
    shards=shards,
    rows=Rows(shards, units),
    queries=catalog.records(split),
    documents=catalog.records(records.DOCUMENTS),
    lengths=Columns(catalog, split, LENGTHS),
    vectors=Columns(catalog, split, VECTORS),
  )


def _keyed(shard: RowShard, language_key: str) -> RowShard:
  """Returns a shard whose runs have keys for languages; those of one key stay runs of their own."""
  runs = [
    dataclasses.replace(run, language=languages.language_key(run.language, language_key))
    for run in shard.runs
  ]
  return dataclasses.replace(shard, runs=runs)
