"""Rows of files of any form as Arrow tables: parquet, Arrow, JSON, CSV and TSV."""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from mlembed_jax.data import manifest
from mlembed_jax.data.arrow_files import arrow_names, read_arrow
from mlembed_jax.data.parquet_files import Columns, parquet_names, read_parquet, require
from mlembed_jax.data.text_files import (
  ARROW,
  CSV,
  PARQUET,
  TSV,
  TXT,
  form_of,
  is_valid,
  read_records,
)
from mlembed_jax.errors import DataError

CHECKED = 1000  # so many rows of a file that is not parquet are looked at before any work

Row = dict[str, Any] | None  # by column; None: no row
# Why rows cannot be used, and which [N], by column; "" is for what is no row at all.
Reasons = dict[str, dict[str, np.ndarray]]
Tables = Iterator[tuple[pa.Table, Reasons]]
# Of forms whose columns have types: what reads the names of columns, and the rows.
TYPED = {PARQUET: (parquet_names, read_parquet), ARROW: (arrow_names, read_arrow)}


def column_names(paths: Sequence[str], columns: Columns) -> list[str]:
  """Returns the names of all columns of files that are one after another.

  Where columns have no types, they are those of the first rows.

  Raises:
    DataError: a file cannot be read, all have no rows, or one of `columns` is missing or of another
      type.
  """
  found = [_names(path, columns) for path in paths]
  if not any(found):
    raise DataError(f"{paths[0]}: no rows; leave it out of the manifest")
  return list(dict.fromkeys(itertools.chain.from_iterable(found)))


def _names(path: str, columns: Columns) -> list[str]:
  if names_and_rows := TYPED.get(form_of(path).kind):
    return names_and_rows[0](path, columns)
  return _known(next(_blocks(path, columns, CHECKED), []))


def read_tables(path: str, columns: Columns, size: int) -> Tables:
  """Yields up to `size` rows of a file at a time, and why some cannot be used.

  Texts and labels become strings of 64-bit offsets, numbers float64; null where a value is absent
  or unfit.

  Raises:
    DataError: the file is unreadable, now or halfway, or a column is missing or of another type.
  """
  kind = form_of(path).kind
  if kind in TYPED:
    yield from ((t, {"invalid_utf8": bad}) for t, bad in TYPED[kind][1](path, columns, size))
    return
  for rows in _blocks(path, columns, size):
    yield _table(rows, columns, "wrong_fields" if kind in (CSV, TSV) else "not_json")


def _blocks(path: str, columns: Columns, size: int) -> Iterator[list[Row]]:
  """Yields up to `size` rows at a time of a file that is not parquet."""
  kind, first = form_of(path).kind, True
  if kind == TXT and list(columns.texts) != [manifest.TEXT]:
    raise DataError(f"{path}: a file of texts has no columns; write .jsonl, .csv or .parquet")
  records = read_records(path)
  while block := list(itertools.islice(records, size)):
    rows = [_row(record.value, kind) for record in block]
    if first:
      _check_columns(path, rows, columns)
    first = False
    if kind in (CSV, TSV):
      rows = [row and row | {n: _number(row.get(n)) for n in columns.numbers} for row in rows]
    yield rows


def _row(value: Any, kind: str) -> Row:
  """Returns the columns of a record, None where it is no row."""
  if kind == TXT:
    return {manifest.TEXT: value}
  return value if isinstance(value, dict) else None


def _known(rows: Sequence[Row]) -> list[str]:
  return list(dict.fromkeys(key for row in rows if row for key in row))


def _check_columns(path: str, rows: Sequence[Row], columns: Columns) -> None:
  """Raises DataError where the first rows of a file are none, or none has a column."""
  if not any(rows):
    raise DataError(f"{path}: its first {len(rows)} lines are no JSON objects")
  require(path, _known(rows), columns)


def _number(text: str | None) -> float | str | None:
  """Returns the number that a field holds, None where it is empty, else the text."""
  try:
    return float(text) if text else None
  except ValueError:
    return text


def _table(rows: Sequence[Row], columns: Columns, broken: str) -> tuple[pa.Table, Reasons]:
  """Returns the rows as columns, null where a value is missing or of another type.

  `broken`: the reason of rows that are none.
  """
  none = np.array([row is None for row in rows])
  wrong: dict[str, np.ndarray] = {}
  invalid: dict[str, np.ndarray] = {}
  data: dict[str, pa.Array] = {}
  for name in (*columns.texts, *columns.labels, *columns.optional, *columns.numbers):
    kinds = _kinds(name, columns)
    values = [row.get(name) if row else None for row in rows]
    fits = np.array([v is None or type(v) in kinds for v in values], bool)
    wrong[name] = ~fits
    kept = [v if ok else None for v, ok in zip(values, fits, strict=True)]
    data[name] = _column(kept, name, columns)
    invalid[name] = np.array([v is not None for v in kept]) & np.asarray(data[name].is_null())
  return pa.table(data), {broken: {"": none}, "wrong_type": wrong, "invalid_utf8": invalid}


def _kinds(name: str, columns: Columns) -> tuple[type, ...]:
  if name in columns.numbers:
    return int, float
  return (str, int) if name in columns.labels else (str,)


def _column(values: Sequence[Any], name: str, columns: Columns) -> pa.Array:
  """Returns the column; texts with lone surrogates, which UTF-8 cannot write, are null."""
  if name in columns.numbers:
    return pa.array([None if v is None else _float(v) for v in values], pa.float64())
  texts = [None if v is None else str(v) for v in values]
  try:
    return pa.array(texts, pa.large_string())
  except UnicodeEncodeError:
    valid = [v if v is not None and is_valid(v) else None for v in texts]
    return pa.array(valid, pa.large_string())


def _float(value: float) -> float:
  try:
    return float(value)
  except OverflowError:  # a whole number of hundreds of digits
    return math.inf
