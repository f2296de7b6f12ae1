"""Rows of training files, checked and with each text once, in chunks.

Files are of any form that `tables` reads. Columns: `query`, `passage`, `passage_2` ...,
`negative_1` ..., optional `lang`, and `score` of scored pairs; of texts alone `text`. A row that
cannot be used is left out and counted by reason.
"""

import dataclasses
import functools
import hashlib
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute

from mlembed_jax.data import near_names, tables
from mlembed_jax.data.manifest import SCORED, TEXT, File
from mlembed_jax.data.parquet_files import Columns
from mlembed_jax.data.shards import paths_of
from mlembed_jax.data.tables import Reasons
from mlembed_jax.data.text_files import TXT, form_of
from mlembed_jax.errors import DataError

# Its functions are made at import, where type checkers do not see them.
pc: Any = pyarrow.compute

# So many rows are in memory at a time. With 24 negatives of 1 kB that is 0.4 GB of text, of which
# there are several copies on the way: 9 times the text was the peak of a whole chunk.
CHUNK = 16_384
EXAMPLES = 5  # the report names so many rows per reason
# Qwen3 has no blank after `Query:`, other releases have one.
INSTRUCTED = r"(?s)^Instruct:.*?\r?\nQuery: ?"
FIELDS = {"passage": "positives", "negative": "negatives"}  # that count columns of a kind
UNKNOWN = "und"  # the language of rows that name none


@dataclasses.dataclass(frozen=True)
class Dropped:
  """Rows left out for one reason: how many, the numbers of the first, and how many by column."""

  rows: int
  examples: list[int]
  columns: dict[str, int]


BLANK = "blank_line"  # of a .txt: no fault of a row, as other forms have blank lines, too


@dataclasses.dataclass(frozen=True)
class Chunk:
  """The usable rows among up to CHUNK rows of a file."""

  read: int
  dropped: dict[str, Dropped]  # by reason
  other_instructions: int  # rows whose own instruction is not the manifest's, which replaces it
  against_manifest: int  # usable rows that have an instruction, or none, unlike the manifest says
  rows: pa.Table  # row, language, query, score, documents: places in `texts`
  texts: pa.Table  # hash (ascending), text; each document of the chunk once


def columns(file: File) -> list[str]:
  """Returns the text columns of a file: query, positives, negatives; or `text` alone."""
  if file.entry["task_type"] == TEXT:
    return [TEXT]
  passages = ["passage", *(f"passage_{i}" for i in range(2, file.positives + 1))]
  return ["query", *passages, *(f"negative_{i}" for i in range(1, file.negatives + 1))]


def numbers(file: File) -> list[str]:
  """Returns the columns that hold numbers."""
  return ["score"] if file.entry["task_type"] == SCORED else []


def check_file(file: File) -> None:
  """Raises DataError where the file cannot be read, or a column is missing or of another type."""
  _names(file)


def _names(file: File) -> list[str]:
  """Returns the names of all columns of a file; raises DataError as `check_file`."""
  names = tables.column_names(paths_of(file), _wanted(file))
  near = near_names.columns_for(["lang"], names)
  if near and "lang" not in names and "lang" not in file.entry:
    raise DataError(f"{file.path}: {near_names.missing_columns(['lang'], names)}")
  return names


def unused(file: File) -> list[str]:
  """Returns a sentence for each thing that the file or its entry holds and that is not read.

  Raises:
    DataError: see `check_file`.
  """
  names, found = _names(file), []
  for kind, used in (("passage", file.positives), ("negative", file.negatives)):
    if beyond := _beyond(names, kind, used):
      found.append(f"{beyond} not used, as the manifest says {FIELDS[kind]}: {used}")
  for column in near_names.COLUMNS["negative_1"]:
    if column in names:
      found.append(f"column {column} is not used; negatives stand in negative_1, negative_2, ...")
  return [f"{file.name}: {sentence}" for sentence in found]


def _beyond(names: Sequence[str], kind: str, used: int) -> str:
  """Returns the columns of a kind with higher numbers than are used, and their verb."""
  found = [n for n in names if (m := re.fullmatch(rf"{kind}_(\d+)", n)) and int(m[1]) > used]
  if len(found) > 1:
    return f"columns {found[0]} to {found[-1]} are"
  return f"column {found[0]} is" if found else ""


def read_chunks(file: File) -> Iterator[Chunk]:
  """Yields the chunks of a file.

  Raises:
    DataError: the file is unreadable, now or halfway, or a score lies outside [0, 1].
  """
  start = 0
  for path in paths_of(file):
    first = start
    for table, reasons in tables.read_tables(path, _wanted(file), CHUNK):
      if file.entry["task_type"] == TEXT:  # from here on a query, as the first text of a row is
        table = table.rename_columns(["query" if n == TEXT else n for n in table.column_names])
      _check_scores(file, table, f"{path}: row", start - first)
      chunk = _chunk(file, table, reasons, start)
      if form_of(path).kind == TXT and (blank := chunk.dropped.pop("empty", None)):
        chunk.dropped[BLANK] = dataclasses.replace(blank, columns={})
      yield chunk
      start += table.num_rows


def _wanted(file: File) -> Columns:
  return Columns(columns(file), optional=["lang"], numbers=numbers(file))


def _chunk(file: File, table: pa.Table, reasons: Reasons, start: int) -> Chunk:
  texts = ["query", *columns(file)[1:]]
  own = np.zeros(table.num_rows, bool)
  has = _mask(pc.fill_null(pc.match_substring_regex(table["query"], INSTRUCTED), False))
  if file.instructed:
    table, own = _strip_instruction(table, file.entry["instruction"])
  usable, dropped = _usable(table, reasons | _reasons(file, table, texts), start)
  rows = start + np.flatnonzero(usable)
  kept = table.filter(pa.array(usable)).combine_chunks()
  unique, places = _unique(kept, texts[1:])
  return Chunk(
    read=table.num_rows,
    dropped=dropped,
    other_instructions=int(np.sum(own & has & usable)),
    against_manifest=int(np.sum((has != file.instructed) & usable)),
    rows=pa.table(
      {
        "row": pa.array(rows, pa.int64()),
        "language": languages_of(file, kept),
        "query": kept["query"],
        "score": _scores(file, kept),
        "documents": _lists(places),
      }
    ),
    texts=unique,
  )


def _lists(places: np.ndarray) -> pa.Array:
  """Returns the rows of [N, columns] as lists; Arrow has no lists of no column: those are null."""
  if not places.shape[1]:
    return pa.nulls(len(places))
  return pa.FixedSizeListArray.from_arrays(places.reshape(-1), places.shape[1])


def _strip_instruction(table: pa.Table, instruction: str) -> tuple[pa.Table, np.ndarray]:
  """Returns the table with bare queries, and which had another instruction than this."""
  query = table["query"]
  own = rf"^Instruct: ?{re.escape(instruction)}\r?\nQuery:" if instruction else ""
  same = pc.match_substring_regex(query, own)
  bare = pc.replace_substring_regex(query, INSTRUCTED, "", max_replacements=1)
  place = table.column_names.index("query")
  return table.set_column(place, "query", bare), ~_mask(pc.fill_null(same, True))


def _reasons(file: File, table: pa.Table, texts: list[str]) -> Reasons:
  named = dict(zip(columns(file), texts, strict=True))  # as the file calls them
  null = {c: _mask(pc.is_null(table[name])) for c, name in named.items()}
  null |= {name: _mask(pc.is_null(table[name])) for name in numbers(file)}
  empty = {c: ~has_text(table[name]) for c, name in named.items()}
  equal = {name: np.zeros(table.num_rows, bool) for name in texts[1 + file.positives :]}
  for passage, negative in itertools.product(texts[1 : 1 + file.positives], equal):
    same = pc.equal(table[passage], table[negative])
    equal[negative] |= _mask(pc.fill_null(same, False))
  return {"null": null, "empty": empty, "negative_equals_positive": equal}


def has_text(column: pa.ChunkedArray) -> np.ndarray:
  """Returns per row whether there is more than blanks; null counts as none."""
  trimmed = pc.utf8_length(pc.utf8_trim_whitespace(column))
  return _mask(pc.fill_null(pc.greater(trimmed, 0), False))


def _mask(values: Any) -> np.ndarray:
  return np.asarray(values.to_numpy() if isinstance(values, pa.ChunkedArray) else values, bool)


def _usable(table: pa.Table, reasons: Reasons, start: int) -> tuple[np.ndarray, dict[str, Dropped]]:
  """Returns which rows are usable, and the others by the first reason that holds."""
  usable, dropped = np.ones(table.num_rows, bool), {}
  for name, masks in reasons.items():
    lost = {column: usable & mask for column, mask in masks.items()}
    any_of = functools.reduce(np.logical_or, lost.values(), np.zeros(table.num_rows, bool))
    rows = start + np.flatnonzero(any_of)
    if rows.size:
      columns = {column: int(mask.sum()) for column, mask in lost.items() if column and mask.any()}
      dropped[name] = Dropped(rows.size, rows[:EXAMPLES].tolist(), columns)
    usable &= ~any_of
  return usable, dropped


def languages_of(file: File, table: pa.Table) -> pa.Array:
  """Returns the language of each row: its own, else that of the file, else UNKNOWN."""
  language = file.entry.get("lang", UNKNOWN)
  if "lang" not in table.column_names:
    return pa.array([language] * table.num_rows, pa.large_string())
  named = pc.if_else(pa.array(has_text(table["lang"])), table["lang"], language)
  return pa.chunked_array(named).combine_chunks() if isinstance(named, list) else named


def _check_scores(file: File, table: pa.Table, where: str, start: int) -> None:
  """Raises DataError where a score is outside [0, 1]; the first row of the table is `start`."""
  for name in numbers(file):
    scores = _numbers(table[name])
    outside = np.flatnonzero(~((scores >= 0) & (scores <= 1) | _mask(pc.is_null(table[name]))))
    if outside.size:
      raise DataError(
        f"{where} {start + outside[0]}: {name} {scores[outside[0]]} is not in [0, 1]; rescale the "
        "column, e.g. divide STS scores 0-5 by 5 (a null score leaves its row out)"
      )


def _numbers(column: pa.ChunkedArray) -> np.ndarray:
  return column.cast(pa.float64(), safe=False).to_numpy()


def _scores(file: File, table: pa.Table) -> pa.Array:
  """Returns the score of each row, float32; 0 for files without."""
  found = [_numbers(table[name]) for name in numbers(file)] or [np.zeros(table.num_rows)]
  return pa.array(found[0].astype(np.float32))


def _unique(table: pa.Table, names: list[str]) -> tuple[pa.Table, np.ndarray]:
  """Returns each text of the columns once, ascending by hash, and the places [N, columns]."""
  parts = [chunk for name in names for chunk in table[name].chunks]
  encoded = pa.chunked_array(parts, pa.large_string()).combine_chunks().dictionary_encode()
  texts = encoded.dictionary
  pieces = (texts.slice(start, 4096).to_pylist() for start in range(0, len(texts), 4096))
  hashes = hash64(itertools.chain.from_iterable(pieces))
  order = np.argsort(hashes, kind="stable")
  place = np.empty(len(order), np.int32)
  place[order] = np.arange(len(order), dtype=np.int32)
  places = place[encoded.indices.to_numpy()].reshape(len(names), table.num_rows).T
  ordered = {"hash": pa.array(hashes[order]), "text": texts.take(pa.array(order))}
  return pa.table(ordered), np.ascontiguousarray(places)


def hash64(texts: Iterable[str]) -> np.ndarray:
  """Returns 64 bits of each text; equal texts are never each other's negatives, [N] uint64.

  Two of 400 million different texts have the same 64 bits with a chance of 0.4 %.
  """
  digests = b"".join(hashlib.blake2b(text.encode(), digest_size=8).digest() for text in texts)
  return np.frombuffer(digests, "<u8")
