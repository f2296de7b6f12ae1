"""Parquet files of texts: every type of column that stands for texts or numbers, as Arrow casts it.

Texts may be strings of any kind, or categories of them; labels may be whole numbers, too. Numbers
may be whole, floating or decimal.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mlembed_jax.data.manifest import open_input
from mlembed_jax.errors import DataError

types = pa.types


class Columns(NamedTuple):
  """The columns of a file that are read, by what they hold."""

  texts: Sequence[str]
  optional: Sequence[str] = ()  # texts that the file may lack, or have as nulls
  labels: Sequence[str] = ()  # texts or whole numbers
  numbers: Sequence[str] = ()


def open_parquet(path: str, columns: Columns) -> pq.ParquetFile:
  """Returns the file, which has these columns.

  Raises:
    DataError: the file is missing or unreadable, or a column is missing or of another type.
  """
  source = open_input(path)
  try:
    file = pq.ParquetFile(source)
  except (pa.ArrowException, OSError) as error:
    raise DataError(f"{path}: not a readable parquet file: {error}") from error
  schema = file.schema_arrow
  for name in (*columns.labels, *columns.texts, *columns.numbers):
    if name not in schema.names:
      raise DataError(f"{path}: column {name} is missing; it has {', '.join(schema.names)}")
  for name in _present(schema, columns):
    _check_type(path, schema.field(name), columns)
  return file


def _present(schema: pa.Schema, columns: Columns) -> list[str]:
  """Returns the names of the columns that are read."""
  optional = [name for name in columns.optional if name in schema.names]
  return [*columns.texts, *columns.labels, *columns.numbers, *optional]


def _check_type(path: str, field: pa.Field, columns: Columns) -> None:
  kind = _decoded(field.type)
  if field.name in columns.numbers:
    fits = types.is_floating(kind) or types.is_integer(kind) or types.is_decimal(kind)
  elif field.name in columns.optional:
    fits = is_string(kind) or types.is_null(kind)
  else:
    fits = is_string(kind) or (field.name in columns.labels and types.is_integer(kind))
  if not fits:
    expected = "number" if field.name in columns.numbers else "string"
    raise DataError(f"{path}: column {field.name} holds {field.type}, expected {expected}")


def is_string(kind: pa.DataType) -> bool:
  """Returns whether a type is one of strings."""
  return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)


def _decoded(kind: pa.DataType) -> pa.DataType:
  return kind.value_type if types.is_dictionary(kind) else kind


def read_parquet(path: str, columns: Columns, size: int) -> Iterator[tuple[pa.Table, np.ndarray]]:
  """Yields up to `size` rows at a time, and which of them hold bytes that are not UTF-8.

  Texts and labels become strings of 64-bit offsets, null where a value is absent or not UTF-8.
  Numbers become float64.

  Raises:
    DataError: the file is unreadable, now or halfway, or a column is missing or of another type.
  """
  with open_parquet(path, columns) as file:
    names = _present(file.schema_arrow, columns)
    try:
      for batch in file.iter_batches(size, columns=names):
        yield cast(pa.table(batch), columns.numbers)
    except (pa.ArrowException, OSError) as error:
      raise DataError(f"{path}: damaged parquet file: {error}") from error


def cast(table: pa.Table, numbers: Sequence[str] = ()) -> tuple[pa.Table, np.ndarray]:
  """Returns a table with float64 numbers and valid strings, and the rows with invalid ones."""
  invalid = np.zeros(table.num_rows, bool)
  for place, name in enumerate(table.column_names):
    column = table[name].combine_chunks()
    column = column.cast(_decoded(column.type))
    if name in numbers:
      column = column.cast(pa.float64(), safe=False)
    else:
      column, wrong = _valid(column)
      invalid |= wrong
    table = table.set_column(place, name, column)
  return table, invalid


def _valid(column: pa.Array) -> tuple[pa.Array, np.ndarray]:
  """Returns strings of 64-bit offsets, null for what is not UTF-8, and which are that."""
  column = column.cast(pa.large_string())  # which does not look at the bytes
  try:
    column.validate(full=True)
    return column, np.zeros(len(column), bool)
  except pa.ArrowInvalid:
    values = [_text(value) for value in column.cast(pa.large_binary()).to_pylist()]
    known = column.is_valid().to_numpy(zero_copy_only=False)
    found = pa.array(values, pa.large_string())
    return found, known & found.is_null().to_numpy(zero_copy_only=False)


def _text(value: bytes | None) -> str | None:
  try:
    return None if value is None else value.decode()
  except UnicodeDecodeError:
    return None
