"""Training files in the layout of the public release, and the manifest that describes them.

One parquet file per dataset: `query`, `passage`, `negative_1` ... `negative_k`, optional `lang`.
Several positives per query are `passage`, `passage_2` ...; scored pairs have a `score`. A teacher's
vectors of the texts may lie beside it as .npy files.
"""

import dataclasses
import difflib
import fnmatch
import functools
import hashlib
import itertools
import json
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq
from jaxtyping import Float, Float32, Int64

from mlembed_jax.data.tokenizer import DataError, with_instruction

# Its functions are made at import, where type checkers do not see them.
pc: Any = pyarrow.compute

SCORED = "scored_pairs"  # a query, a passage and how alike they are; no negatives
TASK_TYPES = ("retrieval", "bitext", "clustering", "classification", SCORED)
REQUIRED = {"task_type": str, "instruction": str, "query_has_instruction": bool, "negatives": int}
OPTIONAL = {"positives": int, "teacher_vectors": dict}
VECTORS = ("query", "passage", "negatives")  # keys of teacher_vectors; the last one is optional


@dataclasses.dataclass(frozen=True)
class VectorFile:
  """A teacher's vectors of some texts of every row of a training file, left on disk."""

  path: pathlib.Path
  vectors: Float[np.ndarray, "N K D"]  # float16 or float32; all rows, usable or not
  sha256: str  # of the file

  @property
  def width(self) -> int:
    """Numbers per vector."""
    return self.vectors.shape[-1]

  def read(
    self, rows: Int64[np.ndarray, "B"], texts: Sequence[int] | np.ndarray
  ) -> Float32[np.ndarray, "B k D"]:
    """Returns the vectors of the chosen texts of each row."""
    return self.vectors[rows[:, None], np.asarray(texts, np.int64)].astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Dataset:
  """One training file, its usable rows in memory as Arrow columns."""

  name: str  # as in the manifest
  task_type: str
  instruction: str
  query_has_instruction: bool
  positives: int  # per row
  negatives: int  # stored per row
  table: pa.Table
  rows: Int64[np.ndarray, "N"]  # where each stands in the file, counted from 0
  scores: Float32[np.ndarray, "N"] | None  # of scored pairs
  vectors: dict[str, VectorFile] | None  # a teacher's, in the order of VECTORS
  dropped: int  # rows with a null or empty text, or a null score
  sha256: str  # of the file

  def __len__(self) -> int:
    return self.table.num_rows

  def read(
    self, rows: Sequence[int] | np.ndarray, negatives: Sequence[int] | np.ndarray
  ) -> tuple[list[str], list[str], list[list[str]]]:
    """Returns queries as the model reads them, queries without instruction, and documents.

    Each row's documents are its positives and the chosen negatives (columns counted from 0).
    """
    columns = _columns(self.positives, negatives)
    part = self.table.select(columns).take(pa.array(np.asarray(rows)))
    queries, *documents = (part[name].to_pylist() for name in columns)
    if self.query_has_instruction:
      bare = [_without_instruction(query) for query in queries]
    else:
      bare, queries = queries, [with_instruction(self.instruction, query) for query in queries]
    return queries, bare, [list(row) for row in zip(*documents, strict=True)]

  def read_vectors(
    self, rows: Sequence[int] | np.ndarray, negatives: Sequence[int] | np.ndarray
  ) -> Float32[np.ndarray, "B C D"] | None:
    """Returns a teacher's vectors of the same texts: query, documents as far as they are stored."""
    if self.vectors is None:
      return None
    texts = {"query": [0], "passage": range(self.positives), "negatives": negatives}
    parts = [file.read(self.rows[rows], texts[key]) for key, file in self.vectors.items()]
    return np.concatenate(parts, axis=1)


def _columns(positives: int, negatives: Iterable[int]) -> list[str]:
  passages = ["passage", *(f"passage_{i + 1}" for i in range(1, positives))]
  return ["query", *passages, *(f"negative_{i + 1}" for i in negatives)]


def _without_instruction(query: str) -> str:
  head, separator, text = query.partition("\nQuery: ")
  return text if separator and head.startswith("Instruct: ") else query


def read_manifest(path: pathlib.Path) -> dict[str, dict[str, Any]]:
  """Returns {file: entry} of a manifest.

  Raises:
    DataError: the file is missing or no JSON object.
  """
  if not path.is_file():
    raise DataError(f"data.manifest: {path} does not exist")
  try:
    manifest = json.loads(path.read_text(encoding="utf-8"))
  except (json.JSONDecodeError, UnicodeDecodeError) as error:
    raise DataError(f"data.manifest: {path} is not JSON: {error}") from error
  if not isinstance(manifest, dict):
    raise DataError(f"data.manifest: {path} must be an object: file -> entry")
  return manifest


def select(manifest_path: pathlib.Path, patterns: Iterable[str], field: str) -> dict[str, Any]:
  """Returns the checked manifest entries of the files that match any of the patterns.

  Raises:
    DataError: a pattern matches nothing, or an entry lacks a field; `field` names the setting.
  """
  manifest = read_manifest(manifest_path)
  chosen: dict[str, Any] = {}
  for pattern in patterns:
    names = fnmatch.filter(manifest, pattern)
    if not names:
      raise DataError(
        f"{field}: {pattern!r} matches no file of {manifest_path}; it lists {', '.join(manifest)}"
      )
    chosen |= {name: check_entry(manifest_path, name, manifest[name]) for name in names}
  return chosen


def check_entry(manifest: pathlib.Path, name: str, entry: Any) -> dict[str, Any]:
  """Returns the entry; raises DataError where a field is missing, wrong or of another type."""
  fields: dict[str, Any] = entry if isinstance(entry, dict) else {}
  problem = next(itertools.chain(_type_problems(fields), _value_problems(fields)), None)
  if problem:
    raise DataError(f"{manifest}: {name}: {problem}")
  return fields


def _type_problems(entry: dict[str, Any]) -> Iterator[str]:
  known = REQUIRED | OPTIONAL
  for field in entry.keys() - known:  # others are notes of their own, such as a licence
    if close := difflib.get_close_matches(field, known, n=1, cutoff=0.8):
      yield f"{field}: unknown field; did you mean {close[0]}?"
  for field, kind in known.items():
    if (field in entry or field in REQUIRED) and type(entry.get(field)) is not kind:
      found = repr(entry[field]) if field in entry else "nothing"
      yield f"{field}: expected {kind.__name__}, found {found}"


def _value_problems(entry: dict[str, Any]) -> Iterator[str]:
  task, negatives, positives = entry["task_type"], entry["negatives"], entry.get("positives", 1)
  if task not in TASK_TYPES:
    yield f"task_type: {task!r} is unknown; known: {', '.join(TASK_TYPES)}"
  if negatives < 0:
    yield "negatives: must not be negative"
  if positives < 1:
    yield f"positives: must be at least 1, found {positives}"
  if task == SCORED and negatives:
    yield f"negatives: must be 0 for {task} (query, passage, score), found {negatives}"
  if task == SCORED and positives > 1:
    yield f"positives: must be 1 for {task} (query, passage, score), found {positives}"
  if "teacher_vectors" in entry:
    yield from _vector_problems(entry["teacher_vectors"])


def _vector_problems(files: dict[str, Any]) -> Iterator[str]:
  for key in files:
    if key not in VECTORS:
      yield f"teacher_vectors: {key!r} is unknown; known: {', '.join(VECTORS)}"
  for key in ("query", "passage", *files):
    if type(files.get(key)) is not str:
      found = repr(files[key]) if key in files else "nothing"
      yield f"teacher_vectors.{key}: expected the path of an .npy file, found {found}"


def load(
  folder: pathlib.Path,
  name: str,
  entry: dict[str, Any],
  max_dropped_share: float,
  *,
  vectors: bool = False,
) -> Dataset:
  """Returns the usable rows of one training file; with `vectors`, opens the teacher's, if any.

  Raises:
    DataError: a file is missing, unreadable or of another form than its entry says, a score lies
      outside [0, 1], or too many rows are unusable.
  """
  path, positives, negatives = folder / name, entry.get("positives", 1), entry["negatives"]
  columns = _columns(positives, range(negatives))
  numbers = ["score"] if entry["task_type"] == SCORED else []
  table = read_parquet(path, columns, numbers)
  scores = _scores(path, table["score"]) if numbers else None
  usable = functools.reduce(pc.and_, map(_is_usable, table.columns))
  rows = np.flatnonzero(usable)
  dropped = table.num_rows - rows.size
  if dropped > max_dropped_share * table.num_rows:
    raise DataError(_too_many_dropped(path, table, dropped, max_dropped_share))
  opened = vectors and "teacher_vectors" in entry
  return Dataset(
    name=name,
    task_type=entry["task_type"],
    instruction=entry["instruction"],
    query_has_instruction=entry["query_has_instruction"],
    positives=positives,
    negatives=negatives,
    table=table.select(columns).filter(usable).combine_chunks(),
    rows=rows,
    scores=None if scores is None else scores[rows],
    vectors=_open_vectors(folder, name, entry, table.num_rows, rows) if opened else None,
    dropped=dropped,
    sha256=_sha256(path),
  )


def _scores(path: pathlib.Path, column: pa.ChunkedArray) -> Float32[np.ndarray, "N"]:
  """Returns the score of each row, 0 where it is null; raises DataError outside [0, 1]."""
  scores = column.fill_null(0.0).to_numpy()
  outside = np.flatnonzero(~((scores >= 0) & (scores <= 1)))  # NaN too
  if outside.size:
    raise DataError(
      f"{path}: row {outside[0]}: score {scores[outside[0]]} is not in [0, 1]; rescale the column, "
      "e.g. divide STS scores 0-5 by 5 (a null score leaves its row out)"
    )
  return scores.astype(np.float32)


def _open_vectors(
  folder: pathlib.Path, name: str, entry: dict[str, Any], rows: int, usable: np.ndarray
) -> dict[str, VectorFile]:
  """Returns the teacher's files by key; raises DataError where one does not fit the entry, or a
  usable row is not finite or zero."""
  files, positives = entry["teacher_vectors"], entry.get("positives", 1)
  shapes = {
    "query": (rows,),
    "passage": (rows, positives) if positives > 1 else (rows,),
    "negatives": (rows, entry["negatives"]),
  }
  opened: dict[str, VectorFile] = {}
  for key in (key for key in VECTORS if key in files):
    width = opened["query"].width if opened else None
    opened[key] = _open_vector_file(folder / files[key], name, shapes[key], width)
    _check_usable(opened[key], usable)
  return opened


def _check_usable(file: VectorFile, rows: np.ndarray) -> None:
  for part in np.array_split(rows, -(-rows.size // 4096) or 1):  # so little of it is in memory
    vectors = np.asarray(file.vectors[part])
    finite = np.all(np.isfinite(vectors), axis=(1, 2))
    zero = np.any(np.all(vectors == 0, axis=2), axis=1)
    if not finite.all():
      raise DataError(
        f"{file.path}: row {part[~finite][0]} holds NaN or infinity (float16 ends at 65504); "
        "write finite vectors"
      )
    if zero.any():
      raise DataError(f"{file.path}: row {part[zero][0]} holds a vector of zeros; write real ones")


def _open_vector_file(
  path: pathlib.Path, name: str, shape: tuple[int, ...], width: int | None
) -> VectorFile:
  """Returns the file; raises DataError unless it has this shape and, last, this width (or any)."""
  array = _open_npy(path)
  if array.shape[:-1] != shape:
    raise DataError(
      f"{path}: expected [{', '.join(map(str, (*shape, 'D')))}], found {list(array.shape)}; "
      f"write the vectors of every row of {name}, unusable ones too, in order"
    )
  if width not in (None, array.shape[-1]):
    raise DataError(
      f"{path}: its vectors are {array.shape[-1]} numbers wide, but those of the queries {width}"
    )
  return VectorFile(path, array if array.ndim == 3 else array[:, None], _sha256(path))


def _open_npy(path: pathlib.Path) -> np.ndarray:
  """Returns the array, left on disk."""
  if not path.is_file():
    raise DataError(f"{path}: this file of teacher_vectors does not exist")
  try:
    array = np.lib.format.open_memmap(path, mode="r")
  except (ValueError, OSError) as error:
    raise DataError(f"{path}: not a readable .npy file: {error}") from error
  if array.dtype not in (np.float16, np.float32):
    raise DataError(f"{path}: expected float16 or float32, found {array.dtype}")
  return np.asarray(array)


def _sha256(path: pathlib.Path) -> str:
  with path.open("rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def read_parquet(path: pathlib.Path, texts: Sequence[str], numbers: Sequence[str] = ()) -> pa.Table:
  """Returns the named columns, as strings and as float64.

  Raises:
    DataError: the file is missing or unreadable, or a column is missing or of another type.
  """
  if not path.is_file():
    raise DataError(f"{path}: this file of the manifest does not exist")
  columns = [*texts, *numbers]
  try:
    schema = pq.read_schema(path)
    absent = [column for column in columns if column not in schema.names]
    if absent:
      raise DataError(f"{path}: column {absent[0]} is missing; it has {', '.join(schema.names)}")
    table = pq.read_table(path, columns=columns)
  except (pa.ArrowException, OSError) as error:
    raise DataError(f"{path}: not a readable parquet file: {error}") from error
  for column in columns:
    kind, number = table.schema.field(column).type, column in numbers
    if not (_is_number(kind) if number else _is_string(kind)):
      expected = "number" if number else "string"
      raise DataError(f"{path}: column {column} holds {kind}, expected {expected}")
  # 64-bit offsets: a column of several GB is one chunk, which makes random access cheap.
  target = [(c, pa.float64() if c in numbers else pa.large_string()) for c in table.column_names]
  return table.cast(pa.schema(target), safe=False)


def _is_string(kind: pa.DataType) -> bool:
  return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _is_number(kind: pa.DataType) -> bool:
  return pa.types.is_floating(kind) or pa.types.is_integer(kind)


def has_text(column: pa.ChunkedArray) -> Any:
  """Returns per row whether there is more than blanks; null counts as none."""
  trimmed = pc.utf8_length(pc.utf8_trim_whitespace(column))
  return pc.fill_null(pc.greater(trimmed, 0), False)


def _is_usable(column: pa.ChunkedArray) -> Any:
  return has_text(column) if _is_string(column.type) else pc.is_valid(column)


def _too_many_dropped(path: pathlib.Path, table: pa.Table, dropped: int, share: float) -> str:
  counts = {
    name: table.num_rows - pc.sum(_is_usable(table[name])).as_py()
    for name in table.column_names
    if table.num_rows
  }
  named = ", ".join(f"{name}: {count}" for name, count in counts.items() if count)
  return (
    f"{path}: {dropped} of {table.num_rows} rows have a null or empty field ({named}), more than "
    f"data.max_dropped_share = {share}; mend the file or raise the share"
  )


def fingerprint(datasets: Sequence[Dataset], *parts: Any) -> str:
  """Returns a hash of what batches depend on: files, their manifest entries, and `parts`."""
  digest = hashlib.sha256()
  for d in datasets:
    entry = (d.name, d.task_type, d.instruction, d.query_has_instruction, d.positives, d.negatives)
    vectors = {key: file.sha256 for key, file in d.vectors.items()} if d.vectors else None
    digest.update(json.dumps([*entry, len(d), d.sha256, vectors]).encode())
  digest.update(json.dumps(parts).encode())
  return digest.hexdigest()
