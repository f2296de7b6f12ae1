"""The rows of a split as training asks for them: by file, language and number."""

import dataclasses

import numpy as np
from jaxtyping import Int64

from mlembed_jax.data import languages, mixture, records
from mlembed_jax.data.catalog import Catalog
from mlembed_jax.data.columns import Columns
from mlembed_jax.data.manifest import File
from mlembed_jax.data.mixture import Unit
from mlembed_jax.data.names import LENGTHS, VECTORS, shard_name
from mlembed_jax.data.taught import TaughtVectors
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
  vectors: Columns  # a teacher's, which the dataset holds itself
  taught: TaughtVectors | None = None  # those of a folder, in their place

  def longest(self, file: File) -> int:
    """Returns the tokens of the longest text of a file."""
    return max(shard.longest for shard in self.shards if shard.file == file.name)

  def vectors_shape(self, file: File) -> tuple[int, int] | None:
    """Returns texts per row and width of the teacher's vectors of a file, if it has any."""
    if self.taught:
      return self.taught.shape(file.name)
    if not file.vectors:
      return None
    texts, width = self.vectors.shape(self._shard(file))
    return texts, width

  def vectors_of(self, place: int, row: records.Row, columns: np.ndarray) -> np.ndarray:
    """Returns the teacher's vectors of some texts of a row, [C, D]: query, positives, negatives.

    `place` is that of its record.
    """
    if self.taught:
      return self.taught.row(place, row, columns)
    return self.vectors.row(*self.queries.place(place))[columns]

  def first_queries(self, file: File, rows: int) -> np.ndarray:
    """Returns the teacher's vectors of the queries of up to `rows` rows of a file, [n, D]."""
    shard = self._shard(file)
    first = sum(s.written.records for s in self.shards[:shard])
    places = range(first, first + min(rows, self.shards[shard].written.records))
    read = [(place, records.decode_record(self.queries[place])[1]) for place in places]
    return np.concatenate([self.vectors_of(*each, np.array([0])) for each in read])

  def _shard(self, file: File) -> int:
    """Returns a shard that has rows of the file."""
    return next(i for i, s in enumerate(self.shards) if s.file == file.name and s.written.records)


def open_split(
  catalog: Catalog,
  split: str,
  names: list[str],
  language_key: str = languages.LANGUAGE_SCRIPT,
  taught: TaughtVectors | None = None,
) -> Split:
  """Returns a split of these files, in this order.

  The languages of its units are keys, as `data.language_key` says; records keep their own tags.
  `taught` are a teacher's vectors in place of those that the dataset holds.

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
    lengths=_columns(catalog, split, LENGTHS),
    vectors=_columns(catalog, split, VECTORS),
    taught=taught,
  )


def _columns(catalog: Catalog, split: str, suffix: str) -> Columns:
  shards = len(catalog.shards[split])
  names = [shard_name(split, i, shards) + suffix for i in range(shards)]
  return Columns([catalog.folder / name for name in names], catalog.digests)


def _keyed(shard: RowShard, language_key: str) -> RowShard:
  """Returns a shard whose runs have keys for languages; those of one key stay runs of their own."""
  runs = [
    dataclasses.replace(run, language=languages.language_key(run.language, language_key))
    for run in shard.runs
  ]
  return dataclasses.replace(shard, runs=runs)
