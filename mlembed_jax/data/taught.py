"""A folder with the vectors that a teacher gave the texts of a prepared dataset.

  taught.json                                    what they are of, and digests of the other files
  mlembed-documents.array_record-*.vectors.npy   a vector per document, [n, D] float16
  mlembed-train.array_record-*.vectors.npy       a vector per row, that of its query

Beside each stand checksums by row, as beside the vectors of a prepared dataset. taught.json is
written last: a folder that has it is complete. Shards that no taught file needs have no vectors,
documents that none needs have zeros. Texts of a row that is aligned share the vector of the row.
"""

import dataclasses
import pathlib
import zlib
from collections.abc import Sequence
from typing import Self

import numpy as np
from jaxtyping import Float16

from mlembed_jax import typed
from mlembed_jax.data.catalog import Catalog
from mlembed_jax.data.columns import Columns
from mlembed_jax.data.file_digests import FileDigest, digest_of, problems
from mlembed_jax.data.names import CHECKSUMS, VECTORS, shard_name
from mlembed_jax.data.records import DOCUMENTS, TRAIN, Records, Row
from mlembed_jax.data.to_teach import NONE, ToTeach
from mlembed_jax.errors import DataError
from mlembed_jax.files import digest, read_object, save_npy, write_object

NAME = "taught.json"
FORMAT = 1
REMEDY = "restore it, or remove the folder and write it again with python -m mlembed_jax.teach"


@dataclasses.dataclass(frozen=True)
class Taught:
  """The content of taught.json, but for its format version."""

  dataset: str  # fingerprint of the prepared dataset
  teacher: str
  version: str  # of the teacher's files
  width: typed.Size
  prompts: str  # what stands before texts, see `--prompts`
  align: str  # which text of a translation has the vector of all, see `--align`
  known: dict[str, typed.Size]  # texts of a row that have a vector, the first ones, by file
  aligned: tuple[str, ...]  # files whose rows are aligned
  files: dict[str, FileDigest]

  def save(self, folder: pathlib.Path) -> None:
    """Writes taught.json."""
    write_object(folder / NAME, {"format_version": FORMAT} | dataclasses.asdict(self))

  @classmethod
  def load(cls, folder: pathlib.Path) -> Self:
    """Returns the content of a folder's file; raises DataError where it is damaged."""
    try:
      value = read_object(folder / NAME, FORMAT, DataError)
      value.pop("format_version", None)
      return typed.from_json(cls, value)
    except ValueError as error:  # also a DataError, which names the file
      where = "" if isinstance(error, DataError) else f"{folder / NAME}: "
      raise DataError(f"{where}{error}; {REMEDY}") from error


class TaughtVectors:
  """The opened vectors of a folder."""

  def __init__(self, folder: pathlib.Path, content: Taught, catalog: Catalog):
    """Opens nothing yet.

    Raises:
      DataError: they were made of another dataset, or a file is missing or of another size.
    """
    self.folder, self.content = folder, content
    if content.dataset != catalog.fingerprint:
      raise DataError(
        f"kd.teacher: {folder} holds vectors of another prepared dataset than {catalog.folder}; "
        f"write those of this one by the same command (--teacher {content.teacher} --prompts "
        f"{content.prompts}{f' --align {content.align}' if content.align else ''}) with --dataset "
        f"{catalog.folder} and another --out"
      )
    if wrong := damage(folder, content):
      raise DataError(f"kd.teacher: {folder}: {wrong}; {REMEDY}")
    self._queries, self._documents = catalog.records(TRAIN), catalog.records(DOCUMENTS)
    self._of_queries = _columns(folder, content, TRAIN, self._queries)
    self._of_documents = _columns(folder, content, DOCUMENTS, self._documents)

  @property
  def version(self) -> str:
    """A digest of all that decides the vectors."""
    return digest(self.folder / NAME)

  def shape(self, file: str) -> tuple[int, int] | None:
    """Returns how many texts of a row of a file have a vector, and its width; None: no text."""
    known = self.content.known.get(file)
    return None if known is None else (known, self.content.width)

  def row(self, place: int, row: Row, columns: np.ndarray) -> Float16[np.ndarray, "C D"]:
    """Returns the vectors of some texts of a row: its query, positives, negatives, from 0 on.

    `place` is that of its record in the split.
    """
    query = self._of_queries.row(*self._queries.place(place))
    if row.dataset in self.content.aligned:
      return np.stack([query] * len(columns))
    documents = np.concatenate([row.positives, row.negatives])
    return np.stack(
      [query if c == 0 else self._document(int(documents[c - 1])) for c in columns.tolist()]
    )

  def _document(self, place: int) -> np.ndarray:
    return self._of_documents.row(*self._documents.place(place))


def _columns(folder: pathlib.Path, content: Taught, split: str, records: Records) -> Columns:
  return Columns([folder / name for name in names_of(split, records)], content.files, REMEDY)


def damage(folder: pathlib.Path, content: Taught, *, quick: bool = True) -> str:
  """Returns what is wrong with the files of a folder, "" where nothing is; `quick`: by sizes."""
  wrong = problems(folder, content.files, quick=quick)
  return next((f"{name} {what}" for name, what in wrong.items()), "")


def names_of(split: str, records: Records) -> list[str]:
  """Returns the names of the files of vectors beside the shards of a split."""
  shards = len(records.shards)
  return [shard_name(split, i, shards) + VECTORS for i in range(shards)]


def open_taught(path: pathlib.Path, catalog: Catalog) -> TaughtVectors | None:
  """Returns the vectors of a folder, None where the path is none that `teach` wrote.

  Raises:
    DataError: as `TaughtVectors`, or its taught.json is damaged.
  """
  return TaughtVectors(path, Taught.load(path), catalog) if (path / NAME).is_file() else None


def numbers(vectors: np.ndarray, texts: Sequence[str]) -> np.ndarray:
  """Returns the vectors of texts in float16; raises DataError where one cannot be kept so."""
  with np.errstate(over="ignore"):
    found = np.asarray(vectors, np.float16)
  bad = ~np.isfinite(found).all(axis=1) | (found == 0).all(axis=1)
  if bad.any():
    raise DataError(
      f"the teacher gives {int(bad.sum())} of {len(texts)} texts zeros, NaN or numbers beyond "
      f"65504, where float16 ends; the first is {texts[int(np.argmax(bad))][:80]!r}. Take another "
      "teacher, or leave these rows out of the data"
    )
  return found


def write(
  folder: pathlib.Path,
  content: Taught,
  planned: ToTeach,
  parts: Sequence[pathlib.Path],
  catalog: Catalog,
) -> None:
  """Writes the files of a folder that is there, taught.json last.

  Args:
    folder: an empty one.
    content: of taught.json, but for the digests.
    planned: who gets which vector.
    parts: .npy files that hold the vectors of `planned.sources` one after the other, all of the
      same length but the last one.
    catalog: of the prepared dataset.
  """
  digests = dict[str, FileDigest]()
  for split, numbers in ((DOCUMENTS, planned.documents), (TRAIN, planned.queries)):
    records = catalog.records(split)
    shards = np.split(numbers, np.cumsum(records.shards)[:-1])
    for name, of_shard in zip(names_of(split, records), shards, strict=True):
      if (of_shard != NONE).any():
        for file in _write_shard(folder / name, parts, of_shard):
          digests[file.name] = digest_of(file)
  dataclasses.replace(content, files=digests).save(folder)


def _write_shard(
  path: pathlib.Path, parts: Sequence[pathlib.Path], numbers: np.ndarray
) -> tuple[pathlib.Path, pathlib.Path]:
  """Writes the vectors of these numbers, zeros for NONE, and their checksums; returns both files.

  The header and each row have a CRC-32, as `data.columns` reads them. One part is open at a time:
  there may be more of them than files that a process may open.
  """
  size, width = np.load(parts[0], mmap_mode="r").shape
  found = np.lib.format.open_memmap(path, "w+", np.float16, (len(numbers), width))
  at, place = np.divmod(numbers, size)
  for part in np.unique(at[numbers != NONE]):
    rows = np.flatnonzero((at == part) & (numbers != NONE))
    found[rows] = np.load(parts[part], mmap_mode="r")[place[rows]]
  found.flush()
  with path.open("rb") as file:
    header = file.read(found.offset)
  sums = [zlib.crc32(header), *(zlib.crc32(row.tobytes()) for row in found)]
  beside = path.with_name(path.name + CHECKSUMS)
  save_npy(beside, np.array(sums, np.uint32))
  return path, beside
