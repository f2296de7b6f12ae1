"""Files of texts in the forms that people have: what their names say, and their rows one by one.

  .jsonl .ndjson     a JSON value per line; blank lines are none
  .json              one array of JSON values, or as .jsonl
  .csv .tsv          fields with a header, quoted as in RFC 4180; blank lines are none
  .txt, a pipe       a text per line, also where it is blank
  .parquet .arrow    see `parquet_files` and `arrow_files`

After each may follow .gz, .bz2, .xz or .zst; capitals do not matter. Text is UTF-8, with or without
a mark. Bytes that are no UTF-8 become lone surrogates here, which no text may have.
"""

import csv
import gzip
import io
import json
import lzma
import re
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import pyarrow as pa

from mlembed_jax.data.manifest import open_input
from mlembed_jax.errors import DataError
from mlembed_jax.files import once

COMPRESSIONS = {"gz": "gzip", "bz2": "bz2", "xz": "xz", "zst": "zstd"}
PARQUET, ARROW, JSON_LINES, JSON = "parquet", "arrow", "jsonl", "json"
CSV, TSV, TXT = "csv", "tsv", "txt"
FORMS = {name: name for name in (PARQUET, ARROW, JSON_LINES, JSON, CSV, TSV, TXT)} | {
  "ndjson": JSON_LINES
}
KNOWN = (
  ".parquet, .arrow, .jsonl, .ndjson, .json, .csv, .tsv or .txt, and .gz, .bz2, .xz or .zst after "
  "it"
)
MARK = b"\xef\xbb\xbf"
# How files of another kind begin, and what they are.
OTHERS = {
  b"\xff\xfe": "UTF-16; convert it: iconv -f UTF-16 -t UTF-8",
  b"\xfe\xff": "UTF-16; convert it: iconv -f UTF-16 -t UTF-8",
  b"PAR1\x15": "a parquet file; name it .parquet",
  b"ARROW1\0\0": "an Arrow file; name it .arrow",
  b"\x1f\x8b": "compressed by gzip; add .gz to its name",
  b"\xfd7zXZ": "compressed by xz; add .xz to its name",
  b"\x28\xb5\x2f\xfd": "compressed by zstd; add .zst to its name",
  b"PK\x03\x04": "a zip archive; unpack it, or save a sheet of Excel as CSV",
} | {b"BZh%d1AY&SY" % i: "compressed by bzip2; add .bz2 to its name" for i in range(1, 10)}
CHUNK = 1 << 20  # bytes read at a time


class _Xz(io.RawIOBase):
  """Reads all streams of an xz file, where `lzma.LZMAFile` ends silently at a damaged one."""

  def __init__(self, raw: Any):
    """`raw` is the file as it is stored."""
    self._raw, self._stream = raw, lzma.LZMADecompressor(lzma.FORMAT_XZ)

  def readable(self) -> bool:
    """Returns True."""
    return True

  def readinto(self, buffer: Any) -> int:
    """Fills the buffer from its start; returns the number of bytes, 0 at the end of the file."""
    found = b""
    while not found:
      if self._stream.eof:
        data = self._next_stream()
        if not data:
          return 0
        self._stream = lzma.LZMADecompressor(lzma.FORMAT_XZ)
      else:
        data = self._raw.read(CHUNK) if self._stream.needs_input else b""
        if self._stream.needs_input and not data:
          raise EOFError("it ends within a stream")
      found = self._stream.decompress(data, len(buffer))
    buffer[: len(found)] = found
    return len(found)

  def _next_stream(self) -> bytes:
    """Returns the first bytes of the stream after this one and its padding, none at the end."""
    rest = self._stream.unused_data.lstrip(b"\0")
    while not rest and (data := self._raw.read(CHUNK)):
      rest = data.lstrip(b"\0")
    return rest


def _arrow(codec: str) -> Callable[[Any], Any]:
  return lambda raw: pa.CompressedInputStream(pa.PythonFile(raw, "r"), codec)


UNPACKED: dict[str, Callable[[Any], Any]] = {
  "gzip": lambda raw: gzip.GzipFile(fileobj=raw),
  "bz2": _arrow("bz2"),  # `bz2.BZ2File` ends silently where a stream after the first is damaged
  "xz": _Xz,
  "zstd": _arrow("zstd"),
}
DAMAGED = (OSError, EOFError, zlib.error, lzma.LZMAError, pa.ArrowException)


class Record(NamedTuple):
  """A row of a file: where it stands, and its value, or why it has none."""

  where: str  # such as "line 3"
  value: Any
  problem: str = ""


class Form(NamedTuple):
  """What the name of a file says of its content."""

  kind: str  # a value of FORMS
  compression: str | None  # as fsspec calls it


def form_of(path: str) -> Form:
  """Returns the form of a file by its name, and by its first bytes where that says nothing.

  Raises:
    DataError: neither says what the file is.
  """
  inner = path.partition("::")[0]  # of zip://rows.jsonl.gz::gs://archive.zip
  match = re.search(r"\.(\w+?)(?:\.(gz|bz2|xz|zst))?$", inner.lower())
  kind, packed = match.groups() if match else ("", None)
  if kind in FORMS:
    return Form(FORMS[kind], COMPRESSIONS.get(packed or ""))
  with open_input(path, None) as file:
    if file.read(4) == b"PAR1":
      return Form(PARQUET, None)
  raise DataError(f"{path}: its name does not say what it holds; it should end in {KNOWN}")


def read_records(path: str) -> Iterator[Record]:
  """Yields the rows of a file that is not parquet; of .csv and .tsv as dictionaries.

  Raises:
    DataError: the file is missing, damaged, or begins as one of another kind.
  """
  form = form_of(path)
  with open_input(path, None) as raw:
    file = _decompressed(raw, form.compression)
    try:
      yield from READERS[form.kind](path, _checked_start(path, file))
    except DAMAGED as error:
      raise DataError(f"{path}: damaged file: {error}") from error


def read_pipe(file: io.BufferedReader, name: str) -> Iterator[Record]:
  """Yields the lines of a pipe as texts; raises DataError where it is no text."""
  yield from _text_lines(name, _checked_start(name, file))


def check_text(text: Any, where: str) -> str:
  """Returns a text; raises DataError where it is no string, or has a lone half of a surrogate."""
  if not isinstance(text, str):
    raise DataError(f"{where}: a text is expected, found {type(text).__name__}")
  if not is_valid(text):
    raise DataError(f"{where}: it has bytes that are not UTF-8, or half a surrogate pair")
  return text


def is_valid(text: str) -> bool:
  """Returns whether UTF-8 can write a text: it has no lone half of a surrogate pair."""
  try:
    text.encode()
  except UnicodeEncodeError:
    return False
  return True


def _decompressed(raw: Any, compression: str | None) -> io.BufferedReader:
  """Returns the content of an opened file."""
  return io.BufferedReader(UNPACKED[compression](raw) if compression else raw)


def _checked_start(path: str, file: io.BufferedReader) -> io.BufferedReader:
  """Returns the file after its mark; raises DataError where it begins as one of another kind."""
  start = file.peek(16)[:16]
  for magic, what in OTHERS.items():
    if start.startswith(magic):
      raise DataError(f"{path}: begins as {what}")
  if b"\x00" in start:
    raise DataError(f"{path}: begins with a zero byte; it is no text in UTF-8")
  if start.startswith(MARK):
    file.read(len(MARK))
  return file


def _lines(file: io.BufferedReader) -> Iterator[str]:
  for line in file:
    yield line.removesuffix(b"\n").removesuffix(b"\r").decode("utf-8", "surrogateescape")


def _text_lines(path: str, file: io.BufferedReader) -> Iterator[Record]:
  for number, line in enumerate(_lines(file), start=1):
    if number == 1 and isinstance(_parsed(line), dict):
      raise DataError(f"{path}: line 1 is a JSON object; name a file of such lines .jsonl")
    yield Record(f"line {number}", line)


def _parsed(line: str) -> Any:
  try:
    return json.loads(line)
  except (ValueError, RecursionError):
    return None


def _json_lines(path: str, file: io.BufferedReader) -> Iterator[Record]:
  first = True
  for number, line in enumerate(_lines(file), start=1):
    if line.isspace() or not line:
      continue
    if first and line.lstrip().startswith("["):
      raise DataError(f"{path}: line {number} begins an array; name a file of one array .json")
    first = False
    yield _json_record(f"line {number}", line)


def _json_record(where: str, line: str) -> Record:
  try:
    return Record(where, json.loads(line, object_pairs_hook=once))
  except (ValueError, RecursionError) as error:
    return Record(where, None, str(error))


def _json(path: str, file: io.BufferedReader) -> Iterator[Record]:
  if not re.match(rb"\s*\[", file.peek()):
    return _json_lines(path, file)
  return _json_array(path, file)


def _json_array(path: str, file: io.BufferedReader) -> Iterator[Record]:
  try:
    values = json.loads(file.read().decode("utf-8", "surrogateescape"), object_pairs_hook=once)
  except (ValueError, RecursionError) as error:
    raise DataError(f"{path}: is not JSON: {error}") from error
  for number, value in enumerate(values, start=1):
    yield Record(f"item {number}", value)


def _fields(path: str, file: io.BufferedReader, separator: str) -> Iterator[Record]:
  """Yields the rows of a table as dictionaries by the names of its header."""
  csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # else 131,072 letters
  text = io.TextIOWrapper(file, "utf-8", "surrogateescape", newline="")
  reader, line = csv.reader(text, delimiter=separator, strict=True), 1
  try:
    header = next(reader, [])
    _check_header(path, header, separator)
    line = reader.line_num + 1
    for row in reader:
      where, line = f"line {line}", reader.line_num + 1
      if len(row) == len(header):
        yield Record(where, dict(zip(header, row, strict=True)))
      elif row:
        yield Record(where, None, f"it has {len(row)} fields, the header {len(header)}")
  except csv.Error as error:
    if "unexpected end of data" in str(error):
      raise DataError(f"{path}: line {line}: a quote that opens there is never closed") from error
    raise DataError(f"{path}: line {reader.line_num}: {error}") from error


def _check_header(path: str, header: Sequence[str], separator: str) -> None:
  # One column of plain words: a column of texts may be called "question; in short".
  if len(header) == 1 and (match := re.fullmatch(r"\w+([;,\t])\w+(?:\1\w+)*", header[0])):
    raise DataError(
      f"{path}: its header has {match[1]!r} between its fields, expected {separator!r}; write the "
      "file with that, or give it the ending of the other, .csv for commas and .tsv for tabs"
    )
  if twice := [name for name in header if header.count(name) > 1]:
    raise DataError(f"{path}: its header has the column {twice[0]!r} twice; rename one")


READERS: dict[str, Callable[[str, io.BufferedReader], Iterator[Record]]] = {
  JSON_LINES: _json_lines,
  JSON: _json,
  CSV: lambda path, file: _fields(path, file, ","),
  TSV: lambda path, file: _fields(path, file, "\t"),
  TXT: _text_lines,
}
