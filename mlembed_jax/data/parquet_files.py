"""Parquet files of texts: every type of column that stands for texts or numbers, as Arrow casts it.

Texts may be strings of any kind, or categories of them; labels may be whole numbers, too. Numbers
may be whole, floating or decimal.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mlembed_jax.data import near_names
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
  check_schema(path, file.schema_arrow, columns)
  return file


def check_schema(path: str, schema: pa.Schema, columns: Columns) -> None:
  """Raises DataError where a column is missing or of another type."""
  require(path, schema.names, columns)
  for name in present(schema, columns):
    _check_type(path, schema.field(name), columns)


def require(path: str, names: Sequence[str], columns: Columns) -> None:
  """Raises DataError where one of `names` is missing, with all that are, and those to rename."""
  wanted = (*columns.texts, *columns.labels, *columns.numbers)
  if missing := [name for name in wanted if name not in names]:
    raise DataError(f"{path}: {near_names.missing_columns(missing, names)}")


def parquet_names(path: str, columns: Columns) -> list[str]:
  """Returns the names of all columns, none where the file has no rows; see `open_parquet`."""
  with open_parquet(path, columns) as file:
    return file.schema_arrow.names if file.metadata.num_rows else []


def present(schema: pa.Schema, columns: Columns) -> list[str]:
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


def read_parquet(
  path: str, columns: Columns, size: int
) -> Iterator[tuple[pa.Table, dict[str, np.ndarray]]]:
  """Yields up to `size` rows at a time, and by column which hold bytes that are not UTF-8.

  Texts and labels become strings of 64-bit offsets, null where a value is absent or not UTF-8.
  Numbers become float64.

  Raises:
    DataError: the file is unreadable, now or halfway, or a column is missing or of another type.
  """
  with open_parquet(path, columns) as file:
    names = present(file.schema_arrow, columns)
    try:
      for batch in file.iter_batches(size, columns=names):
        yield cast(pa.table(batch), columns.numbers)
    except (pa.ArrowException, OSError) as error:
      raise DataError(f"{path}: damaged parquet file: {error}") from error


def cast(table: pa.Table, numbers: Sequence[str] = ()) -> tuple[pa.Table, dict[str, np.ndarray]]:
  """Returns a table with float64 numbers and valid strings, and by column which are invalid."""
  invalid: dict[str, np.ndarray] = {}
  for place, name in enumerate(table.column_names):
    column = table[name].combine_chunks()
    column = column.cast(_decoded(column.type))
    if name in numbers:
      column = column.cast(pa.float64(), safe=False)
    else:
      column, invalid[name] = _valid(column)
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
