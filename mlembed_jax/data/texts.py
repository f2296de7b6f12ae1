"""The texts of a file of any form, one after another, as `encode` and `search` read them."""

import io
import sys
from collections.abc import Iterator
from typing import cast

from mlembed_jax.data.parquet_files import Columns
from mlembed_jax.data.tables import TYPED
from mlembed_jax.data.text_files import (
  Record,
  check_text,
  form_of,
  read_pipe,
  read_records,
)
from mlembed_jax.errors import DataError

BATCH = 4096  # texts of a file with typed columns that are read at a time


def read_texts(name: str, column: str, flag: str = "--input") -> Iterator[str]:
  """Yields the texts of a file in their order; - is the standard input.

  Args:
    name: of the file.
    column: field or column that holds the texts.
    flag: by which the file was given.

  Raises:
    DataError: the file cannot be read, or a row has no text; the message names it.
  """
  kind = form_of_file(name, flag) if name != "-" else ""
  records = _typed(name, column, kind) if kind in TYPED else _records(name)
  while (record := _next(records, flag)) is not None:
    yield _text(record, f"{name}, {record.where}", column)


def form_of_file(name: str, flag: str) -> str:
  """Returns the form of a file of texts; raises DataError, which names the flag, for another."""
  try:
    return form_of(name).kind
  except DataError as error:
    raise DataError(f"{flag}: {error}") from error


def _records(name: str) -> Iterator[Record]:
  if name != "-":
    return read_records(name)
  return read_pipe(cast("io.BufferedReader", sys.stdin.buffer), name)


def _typed(name: str, column: str, kind: str) -> Iterator[Record]:
  row = 0
  for table, invalid in TYPED[kind][1](name, Columns([column]), BATCH):
    for text, wrong in zip(table[column].to_pylist(), invalid[column].tolist(), strict=True):
      yield Record(f"row {row}", text, "bytes that are not UTF-8" if wrong else "")
      row += 1


def _next(records: Iterator[Record], flag: str) -> Record | None:
  """Returns the next record, None after the last; an error names the flag of the file."""
  try:
    return next(records, None)
  except DataError as error:
    raise DataError(f"{flag}: {error}") from error


def _text(record: Record, where: str, column: str) -> str:
  if record.problem:
    raise DataError(f"{where}: {record.problem}")
  found = record.value
  if isinstance(found, dict) and column not in found:
    raise DataError(f"--column: {where} has no field {column!r}; it has {', '.join(found)}")
  return check_text(found[column] if isinstance(found, dict) else found, where)
