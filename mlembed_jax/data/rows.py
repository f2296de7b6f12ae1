"""Rows of training files, checked and with each text once: parquet or JSON lines, in chunks.

Columns: `query`, `passage`, `passage_2` ..., `negative_1` ..., optional `lang`, and `score` of
scored pairs. A row that cannot be used is left out and counted by reason.
"""

import dataclasses
import hashlib
import itertools
import json
import lzma
import math
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq

from mlembed_jax.data.manifest import SCORED, File, open_input
from mlembed_jax.data.tokenizer import with_instruction
from mlembed_jax.errors import DataError

# Its functions are made at import, where type checkers do not see them.
pc: Any = pyarrow.compute

# So many rows are in memory at a time. With 24 negatives of 1 kB that is 0.4 GB of text, of which
# there are several copies on the way: 9 times the text was the peak of a whole chunk.
CHUNK = 16_384
CHECKED = 1000  # so many lines of a JSON file are looked at before any work
EXAMPLES = 5  # the report names so many rows per reason
UNKNOWN = "und"  # the language of rows that name none


@dataclasses.dataclass(frozen=True)
class Dropped:
  """Rows left out for one reason: how many, and the numbers of the first."""

  rows: int
  examples: list[int]


@dataclasses.dataclass(frozen=True)
class Chunk:
  """The usable rows among up to CHUNK rows of a file."""

  read: int
  dropped: dict[str, Dropped]  # by reason
  other_instructions: int  # rows whose own instruction is not the manifest's, which replaces it
  rows: pa.Table  # row, language, query, score, documents: places in `texts`
  texts: pa.Table  # hash (ascending), text; each document of the chunk once


def columns(file: File) -> list[str]:
  """Returns the text columns of a file: query, positives, negatives."""
  passages = ["passage", *(f"passage_{i}" for i in range(2, file.positives + 1))]
  return ["query", *passages, *(f"negative_{i}" for i in range(1, file.negatives + 1))]


def numbers(file: File) -> list[str]:
  """Returns the columns that hold numbers."""
  return ["score"] if file.entry["task_type"] == SCORED else []


def check_file(file: File) -> None:
  """Raises DataError where the file cannot be read, or a column is missing or of another type."""
  if is_json(file.path):
    next(_json_tables(file, CHECKED))
  else:
    _open_rows(file).close()


def read_chunks(file: File) -> Iterator[Chunk]:
  """Yields the chunks of a file.

  Raises:
    DataError: the file is unreadable, now or halfway, or a score lies outside [0, 1].
  """
  start = 0
  for table, reasons in _json_tables(file) if is_json(file.path) else _parquet_tables(file):
    yield _chunk(file, table, reasons, start)
    start += table.num_rows


def is_json(path: str) -> bool:
  """Returns whether a path is one of JSON lines rather than parquet."""
  inner = path.partition("::")[0]  # of zip://rows.jsonl.gz::gs://archive.zip
  return re.search(r"\.jsonl?(\.(gz|bz2|xz|zst))?$", inner) is not None


def open_parquet(path: str, texts: Sequence[str], numbers: Sequence[str] = ()) -> pq.ParquetFile:
  """Returns the file, which has these columns of strings and of numbers.

  Raises:
    DataError: the file is missing or unreadable, or a column is missing or of another type.
  """
  source = open_input(path)
  try:
    file = pq.ParquetFile(source)
  except (pa.ArrowException, OSError) as error:
    raise DataError(f"{path}: not a readable parquet file: {error}") from error
  for column in (*texts, *numbers):
    _check_column(path, file.schema_arrow, column, column in numbers)
  return file


def _check_column(path: str, schema: pa.Schema, column: str, number: bool) -> None:
  if column not in schema.names:
    raise DataError(f"{path}: column {column} is missing; it has {', '.join(schema.names)}")
  kind = schema.field(column).type
  if not (_is_number(kind) if number else _is_string(kind)):
    expected = "number" if number else "string"
    raise DataError(f"{path}: column {column} holds {kind}, expected {expected}")


def _open_rows(file: File) -> pq.ParquetFile:
  """Returns the parquet file of rows, which may have languages."""
  opened = open_parquet(file.path, columns(file), numbers(file))
  if "lang" in opened.schema_arrow.names:
    _check_column(file.path, opened.schema_arrow, "lang", number=False)
  if not opened.metadata.num_rows:
    raise DataError(f"{file.path}: no rows")
  return opened


def _is_string(kind: pa.DataType) -> bool:
  return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _is_number(kind: pa.DataType) -> bool:
  return pa.types.is_floating(kind) or pa.types.is_integer(kind)


Reasons = list[tuple[str, np.ndarray]]  # why rows cannot be used, and which [N]
Tables = Iterator[tuple[pa.Table, Reasons]]


def _parquet_tables(file: File) -> Tables:
  texts = columns(file)
  with _open_rows(file) as opened:
    lang = ["lang"] if "lang" in opened.schema_arrow.names else []
    wanted = [*texts, *numbers(file), *lang]
    try:
      for batch in opened.iter_batches(CHUNK, columns=wanted):
        yield _valid_text(pa.table(batch), [*texts, *lang])
    except (pa.ArrowException, OSError) as error:
      raise DataError(f"{file.path}: damaged parquet file: {error}") from error


def _valid_text(table: pa.Table, names: list[str]) -> tuple[pa.Table, Reasons]:
  """Returns the table with 64-bit offsets and nulls for what is not UTF-8, and such rows."""
  invalid = np.zeros(table.num_rows, bool)
  for name in names:
    column = table[name].combine_chunks()
    try:
      column.validate(full=True)
    except pa.ArrowInvalid:
      values = [_decoded(value) for value in column.cast(_binary(column.type)).to_pylist()]
      known = column.is_valid().to_numpy(zero_copy_only=False)
      column = pa.array(values, pa.large_string())
      invalid |= known & column.is_null().to_numpy(zero_copy_only=False)
    table = table.set_column(table.column_names.index(name), name, column.cast(pa.large_string()))
  return table, [("invalid_utf8", invalid)]


def _binary(kind: pa.DataType) -> pa.DataType:
  return pa.large_binary() if pa.types.is_large_string(kind) else pa.binary()


def _decoded(value: bytes | None) -> str | None:
  try:
    return None if value is None else value.decode()
  except UnicodeDecodeError:
    return None


def _json_tables(file: File, size: int | None = None) -> Tables:
  texts, scores = columns(file), numbers(file)
  with open_input(file.path) as lines:
    first = True
    while block := _lines(file, lines, size or CHUNK):
      rows = [_json_row(line) for line in block]
      if first and not any(rows):
        raise DataError(f"{file.path}: its first {len(rows)} lines are no JSON objects")
      for name in [*texts, *scores] if first else ():
        if not any(name in row for row in rows if row):
          known = ", ".join(dict.fromkeys(key for row in rows if row for key in row))
          raise DataError(f"{file.path}: column {name} is missing; it has {known}")
      first = False
      yield _json_table(rows, texts, scores)
  if first:
    raise DataError(f"{file.path}: no lines")


def _lines(file: File, lines: Iterator[bytes], size: int) -> list[bytes]:
  try:
    return list(itertools.islice(lines, size))
  except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
    raise DataError(f"{file.path}: damaged file: {error}") from error


def _json_row(line: bytes) -> dict[str, Any] | None:
  try:
    row = json.loads(line)
  except (ValueError, RecursionError):  # UnicodeDecodeError is a ValueError
    return None
  return row if isinstance(row, dict) else None


def _json_table(
  rows: list[dict[str, Any] | None], texts: list[str], scores: list[str]
) -> tuple[pa.Table, Reasons]:
  """Returns the rows as columns, null where a value is missing or of another type."""
  broken = np.array([row is None for row in rows])
  wrong, invalid = np.zeros((2, len(rows)), bool)
  data: dict[str, pa.Array] = {}
  for name in [*texts, "lang", *scores]:
    kinds = (int, float) if name in scores else (str,)
    values = [row.get(name) if row else None for row in rows]
    fits = np.array([v is None or type(v) in kinds for v in values], bool)
    wrong |= ~fits
    kept = [v if ok else None for v, ok in zip(values, fits, strict=True)]
    data[name] = _json_column(kept, name in scores)
    invalid |= np.array([v is not None for v in kept]) & _mask(data[name].is_null())
  return pa.table(data), [("not_json", broken), ("wrong_type", wrong), ("invalid_utf8", invalid)]


def _json_column(values: list[Any], number: bool) -> pa.Array:
  """Returns the column; texts with lone surrogates, which UTF-8 cannot write, are null."""
  if number:
    return pa.array([None if v is None else _float(v) for v in values], pa.float64())
  try:
    return pa.array(values, pa.large_string())
  except UnicodeEncodeError:
    written = [v.encode("utf-8", "surrogatepass") if v is not None else None for v in values]
    return pa.array([_decoded(value) for value in written], pa.large_string())


def _float(value: float) -> float:
  try:
    return float(value)
  except OverflowError:  # a whole number of hundreds of digits
    return math.inf


def _chunk(file: File, table: pa.Table, reasons: Reasons, start: int) -> Chunk:
  texts = columns(file)
  own = np.zeros(table.num_rows, bool)
  if file.entry["query_has_instruction"]:
    table, own = _strip_instruction(table, file.entry["instruction"])
  usable, dropped = _usable(table, [*reasons, *_reasons(file, table, texts)], start)
  rows = start + np.flatnonzero(usable)
  kept = table.filter(pa.array(usable)).combine_chunks()
  unique, places = _unique(kept, texts[1:])
  return Chunk(
    read=table.num_rows,
    dropped=dropped,
    other_instructions=int(np.sum(own & usable)),
    rows=pa.table(
      {
        "row": pa.array(rows, pa.int64()),
        "language": _languages(file, kept),
        "query": kept["query"],
        "score": _scores(file, kept, rows),
        "documents": pa.FixedSizeListArray.from_arrays(places.reshape(-1), len(texts) - 1),
      }
    ),
    texts=unique,
  )


def _strip_instruction(table: pa.Table, instruction: str) -> tuple[pa.Table, np.ndarray]:
  """Returns the table with bare queries, and which had another instruction than this."""
  query = table["query"]
  same = pc.starts_with(query, with_instruction(instruction, ""))
  bare = pc.replace_substring_regex(query, r"(?s)^Instruct: .*?\nQuery: ", "", max_replacements=1)
  place = table.column_names.index("query")
  return table.set_column(place, "query", bare), ~_mask(pc.fill_null(same, True))


def _reasons(file: File, table: pa.Table, texts: list[str]) -> Reasons:
  needed = [*texts, *numbers(file)]
  null, empty, equal = (np.zeros(table.num_rows, bool) for _ in range(3))
  for name in needed:
    null |= _mask(pc.is_null(table[name]))
  for name in texts:
    empty |= ~has_text(table[name])
  for i, j in itertools.product(range(file.positives), range(file.negatives)):
    same = pc.equal(table[texts[1 + i]], table[texts[1 + file.positives + j]])
    equal |= _mask(pc.fill_null(same, False))
  return [("null", null), ("empty", empty), ("negative_equals_positive", equal)]


def has_text(column: pa.ChunkedArray) -> np.ndarray:
  """Returns per row whether there is more than blanks; null counts as none."""
  trimmed = pc.utf8_length(pc.utf8_trim_whitespace(column))
  return _mask(pc.fill_null(pc.greater(trimmed, 0), False))


def _mask(values: Any) -> np.ndarray:
  return np.asarray(values.to_numpy() if isinstance(values, pa.ChunkedArray) else values, bool)


def _usable(table: pa.Table, reasons: Reasons, start: int) -> tuple[np.ndarray, dict[str, Dropped]]:
  """Returns which rows are usable, and the others by the first reason that holds."""
  usable, dropped = np.ones(table.num_rows, bool), {}
  for name, mask in reasons:
    rows = start + np.flatnonzero(usable & mask)
    if rows.size:
      dropped[name] = Dropped(rows.size, rows[:EXAMPLES].tolist())
    usable &= ~mask
  return usable, dropped


def _languages(file: File, table: pa.Table) -> pa.Array:
  language = file.entry.get("lang", UNKNOWN)
  if "lang" not in table.column_names:
    return pa.array([language] * table.num_rows, pa.large_string())
  named = pc.if_else(pa.array(has_text(table["lang"])), table["lang"], language)
  return pa.chunked_array(named).combine_chunks() if isinstance(named, list) else named


def _scores(file: File, table: pa.Table, rows: np.ndarray) -> pa.Array:
  """Returns the score of each row, 0 for files without; raises DataError outside [0, 1]."""
  if not numbers(file):
    return pa.array(np.zeros(rows.size, np.float32))
  scores = table["score"].cast(pa.float64(), safe=False).to_numpy()
  outside = np.flatnonzero(~((scores >= 0) & (scores <= 1)))  # NaN too
  if outside.size:
    raise DataError(
      f"{file.path}: row {rows[outside[0]]}: score {scores[outside[0]]} is not in [0, 1]; rescale "
      "the column, e.g. divide STS scores 0-5 by 5 (a null score leaves its row out)"
    )
  return pa.array(scores.astype(np.float32))


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
