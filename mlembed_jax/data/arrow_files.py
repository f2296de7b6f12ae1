"""Arrow IPC files of texts: the streams that `datasets` saves, and files such as Feather's."""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from mlembed_jax.data.manifest import open_input
from mlembed_jax.data.parquet_files import Columns, cast, check_schema, present
from mlembed_jax.errors import DataError

MAGIC = b"ARROW1"  # begins a file, which can be read at random; a stream begins without a name
END = b"\xff\xff\xff\xff\0\0\0\0"  # ends a stream
DAMAGED = (pa.ArrowException, OSError, EOFError, UnicodeDecodeError)  # the last of a name
BYTES = {
  pa.string(): pa.binary(),
  pa.large_string(): pa.large_binary(),
  pa.string_view(): pa.binary_view(),
}


@contextlib.contextmanager
def _told(path: str, what: str) -> Iterator[None]:
  """Turns what pyarrow raises for a file of strangers into a DataError."""
  try:
    yield
  except MemoryError as error:  # also where a damaged size asks for terabytes
    raise DataError(f"{path}: {what} Arrow file, or a batch too large for the memory") from error
  except DAMAGED as error:
    raise DataError(f"{path}: {what} Arrow file: {error}") from error


@contextlib.contextmanager
def open_arrow(path: str, columns: Columns) -> Iterator[tuple[pa.Schema, Iterator[pa.RecordBatch]]]:
  """Yields the schema of a file, which has these columns, and its rows in batches of these.

  Raises:
    DataError: the file is missing or unreadable, now or halfway, or a column is missing or of
      another type.
  """
  with open_input(path, None) as source:
    with _told(path, "not a readable"):
      is_file = source.read(len(MAGIC)) == MAGIC
      if not is_file:
        _check_end(source)
      source.seek(0)
      reader = pa.ipc.open_file(source) if is_file else pa.ipc.open_stream(source)
      reader.schema.names  # noqa: B018  (decodes them)
    check_schema(path, reader.schema, columns)
    yield reader.schema, _batches(path, reader, present(reader.schema, columns))


def _check_end(source: Any) -> None:
  """Raises EOFError where a stream has no end mark.

  pyarrow 25 takes one that ends between two batches, as a killed writer leaves it, for whole.
  """
  source.seek(-min(len(END), source.seek(0, os.SEEK_END)), os.SEEK_END)
  if source.read() != END:
    raise EOFError("the end of the stream is missing; its writer was stopped, so write it again")


def _batches(path: str, reader: Any, names: list[str]) -> Iterator[pa.RecordBatch]:
  """Yields these columns of the batches of a reader, of a stream or of a file."""
  is_file = isinstance(reader, pa.ipc.RecordBatchFileReader)
  with _told(path, "damaged"):
    for batch in map(reader.get_batch, range(reader.num_record_batches)) if is_file else reader:
      chosen = batch.select(names)
      for column in chosen.columns:
        # A text outside of its buffer would end the process. As bytes, for what is no UTF-8
        # leaves its row out and is no damage.
        _as_bytes(column).validate(full=True)
      yield chosen


def _as_bytes(column: Any) -> Any:
  """Returns a column whose texts, or categories, are bytes in the same buffers."""
  if pa.types.is_dictionary(column.type):
    return pa.DictionaryArray.from_arrays(column.indices, _as_bytes(column.dictionary))
  return column.view(BYTES[column.type]) if column.type in BYTES else column


def arrow_names(path: str, columns: Columns) -> list[str]:
  """Returns the names of all columns, none where the file has no rows; see `open_arrow`."""
  with open_arrow(path, columns) as (schema, batches):
    return schema.names if any(batch.num_rows for batch in batches) else []


def read_arrow(
  path: str, columns: Columns, size: int
) -> Iterator[tuple[pa.Table, dict[str, np.ndarray]]]:
  """Yields up to `size` rows at a time, as `parquet_files.read_parquet` does; see `open_arrow`."""
  with open_arrow(path, columns) as (_, batches):
    for table in _in_sizes(batches, size):
      yield cast(table, columns.numbers)


def _in_sizes(batches: Iterator[pa.RecordBatch], size: int) -> Iterator[pa.Table]:
  """Yields the rows in tables of `size`; `datasets` writes batches of 1,000."""
  held, rows = [], 0
  for batch in batches:
    start = 0
    while start < batch.num_rows:
      part = batch.slice(start, size - rows)
      held.append(part)
      start, rows = start + part.num_rows, rows + part.num_rows
      if rows == size:
        yield pa.Table.from_batches(held)
        held, rows = [], 0
  if held:
    yield pa.Table.from_batches(held)
