"""Training files in the layout of the public release, and the manifest that describes them.

One parquet file per dataset: `query`, `passage`, `negative_1` ... `negative_k`, optional `lang`.
"""

import dataclasses
import fnmatch
import functools
import hashlib
import json
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq

from mlembed_jax.data.tokenizer import DataError, with_instruction

# Its functions are made at import, where type checkers do not see them.
pc: Any = pyarrow.compute

TASK_TYPES = ("retrieval", "bitext", "clustering", "classification")
# Task types whose positives are candidates for every query of the batch, as in F2LLM-v2. The
# others learn from their hard negatives alone.
INBATCH_TASKS = ("retrieval", "bitext")
REQUIRED = {"task_type": str, "instruction": str, "query_has_instruction": bool, "negatives": int}


@dataclasses.dataclass(frozen=True)
class Dataset:
  """One training file, its usable rows in memory as Arrow columns."""

  name: str  # as in the manifest
  task_type: str
  instruction: str
  query_has_instruction: bool
  negatives: int  # stored per row
  table: pa.Table
  dropped: int  # rows with a null or empty text
  sha256: str  # of the file

  def __len__(self) -> int:
    return self.table.num_rows

  def read(
    self, rows: Sequence[int] | np.ndarray, negatives: Sequence[int] | np.ndarray
  ) -> tuple[list[str], list[str], list[list[str]]]:
    """Returns queries as the model reads them, queries without instruction, and documents.

    Each row's documents are its positive and the chosen negatives (columns counted from 0).
    """
    columns = ["query", "passage", *(f"negative_{i + 1}" for i in negatives)]
    part = self.table.select(columns).take(pa.array(np.asarray(rows)))
    queries, *documents = (part[name].to_pylist() for name in columns)
    if self.query_has_instruction:
      bare = [_without_instruction(query) for query in queries]
    else:
      bare, queries = queries, [with_instruction(self.instruction, query) for query in queries]
    return queries, bare, [list(row) for row in zip(*documents, strict=True)]


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
  """Returns the entry; raises DataError where a required field is missing or of another type."""
  for field, kind in REQUIRED.items():
    if not isinstance(entry, dict) or type(entry.get(field)) is not kind:
      found = repr(entry.get(field)) if isinstance(entry, dict) and field in entry else "nothing"
      raise DataError(f"{manifest}: {name}: {field}: expected {kind.__name__}, found {found}")
  if entry["task_type"] not in TASK_TYPES:
    known = ", ".join(TASK_TYPES)
    raise DataError(
      f"{manifest}: {name}: task_type: {entry['task_type']!r} is unknown; known: {known}"
    )
  if entry["negatives"] < 0:
    raise DataError(f"{manifest}: {name}: negatives: must not be negative")
  return entry


def load(
  folder: pathlib.Path, name: str, entry: dict[str, Any], max_dropped_share: float
) -> Dataset:
  """Returns the usable rows of one training file.

  Raises:
    DataError: the file is missing, unreadable or lacks a column, or too many rows are unusable.
  """
  columns = ["query", "passage", *(f"negative_{i + 1}" for i in range(entry["negatives"]))]
  table = read_parquet(folder / name, columns)
  usable = functools.reduce(pc.and_, (has_text(table[column]) for column in columns))
  kept = table.filter(usable)
  dropped = table.num_rows - kept.num_rows
  if dropped > max_dropped_share * table.num_rows:
    raise DataError(_too_many_dropped(folder / name, table, dropped, max_dropped_share))
  return Dataset(
    name=name,
    task_type=entry["task_type"],
    instruction=entry["instruction"],
    query_has_instruction=entry["query_has_instruction"],
    negatives=entry["negatives"],
    table=kept.combine_chunks(),
    dropped=dropped,
    sha256=_sha256(folder / name),
  )


def _sha256(path: pathlib.Path) -> str:
  with path.open("rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def read_parquet(path: pathlib.Path, columns: Sequence[str]) -> pa.Table:
  """Returns the named columns as strings.

  Raises:
    DataError: the file is missing or unreadable, or a column is missing or not text.
  """
  if not path.is_file():
    raise DataError(f"{path}: this file of the manifest does not exist")
  try:
    schema = pq.read_schema(path)
    absent = [column for column in columns if column not in schema.names]
    if absent:
      raise DataError(f"{path}: column {absent[0]} is missing; it has {', '.join(schema.names)}")
    table = pq.read_table(path, columns=list(columns))
  except (pa.ArrowException, OSError) as error:
    raise DataError(f"{path}: not a readable parquet file: {error}") from error
  for column in columns:
    kind = table.schema.field(column).type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
      raise DataError(f"{path}: column {column} holds {kind}, expected string")
  # 64-bit offsets: a column of several GB is one chunk, which makes random access cheap.
  return table.cast(pa.schema([(column, pa.large_string()) for column in table.column_names]))


def has_text(column: pa.ChunkedArray) -> Any:
  """Returns per row whether there is more than blanks; null counts as none."""
  trimmed = pc.utf8_length(pc.utf8_trim_whitespace(column))
  return pc.fill_null(pc.greater(trimmed, 0), False)


def _too_many_dropped(path: pathlib.Path, table: pa.Table, dropped: int, share: float) -> str:
  counts = {
    name: table.num_rows - pc.sum(has_text(table[name])).as_py()
    for name in table.column_names
    if table.num_rows
  }
  named = ", ".join(f"{name}: {count}" for name, count in counts.items() if count)
  return (
    f"{path}: {dropped} of {table.num_rows} rows have a null or empty text ({named}), more than "
    f"data.max_dropped_share = {share}; mend the file or raise the share"
  )


def fingerprint(datasets: Sequence[Dataset], *parts: Any) -> str:
  """Returns a hash of what batches depend on: files, their manifest entries, and `parts`."""
  digest = hashlib.sha256()
  for d in datasets:
    shape = (d.name, d.task_type, d.instruction, d.query_has_instruction, d.negatives, len(d))
    digest.update(json.dumps([*shape, d.sha256]).encode())
  digest.update(json.dumps(parts).encode())
  return digest.hexdigest()
