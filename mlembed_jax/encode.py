"""Writes the vectors of the texts of a file, of any size, with an exported model.

  python -m mlembed_jax.encode --model DIR --input texts.jsonl --out vectors.npy

A part is written at a time. The same command goes on after a stop: parts whose texts and settings
are the same are not encoded again.
"""

import hashlib
import io
import json
import pathlib
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any, TextIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from absl import flags
from tqdm import tqdm

from mlembed_jax import cli
from mlembed_jax.errors import ConfigError, DataError
from mlembed_jax.quantize import LEAST_TEXTS, LEVELED, PRECISIONS, check_precision, quantize, ranges

MODEL = flags.DEFINE_string(
  "model", None, "Folder in Hugging Face layout, or hf:ORG/NAME.", required=True
)
INPUT = flags.DEFINE_string(
  "input", None, "File .parquet, .jsonl or of one text per line; - reads such lines.", required=True
)
COLUMN = flags.DEFINE_string("column", "text", "Field of a .jsonl or .parquet file.")
OUT = flags.DEFINE_string("out", None, "File .npy or .parquet to write.", required=True)
PROMPT_NAME = flags.DEFINE_string("prompt_name", None, "Prompt of the model before every text.")
PROMPT = flags.DEFINE_string("prompt", None, "Another prompt.")
DEPTH = flags.DEFINE_integer("depth", None, "Layers to use; a trained exit.")
RANK = flags.DEFINE_integer("rank", None, "Rank of the token table; a trained one.")
DIM = flags.DEFINE_integer("dim", None, "Dimensions; a trained size.")
UNTRAINED = flags.DEFINE_bool("untrained", False, "Allow sizes that were not trained.")
PRECISION = flags.DEFINE_enum("precision", "float32", PRECISIONS, "Of the vectors.")
POOLED_TOKEN = flags.DEFINE_string(
  "pooled_token", None, "Token that ends every text, of a folder that does not say which."
)
PART = flags.DEFINE_integer("part", 16_384, "Texts of a part.", lower_bound=1)


def read_texts(name: str, column: str) -> Iterator[str]:
  """Yields the texts of a file in their order.

  Raises:
    DataError: the file cannot be read, or a row has no text; the message names it.
  """
  try:
    if name == "-":
      yield from _lines(io.TextIOWrapper(sys.stdin.buffer, encoding="utf-8"))
    elif name.endswith(".parquet"):
      yield from _parquet(name, column)
    else:
      with open(name, encoding="utf-8") as file:
        yield from (_json(file, name, column) if name.endswith(".jsonl") else _lines(file))
  except (OSError, UnicodeDecodeError, pa.ArrowException) as error:
    raise DataError(f"--input: {name} cannot be read: {error}") from error


def _lines(file: TextIO) -> Iterator[str]:
  return (line.rstrip("\n") for line in file)


def _parquet(name: str, column: str) -> Iterator[str]:
  file = pq.ParquetFile(name)
  if column not in file.schema_arrow.names:
    found = ", ".join(file.schema_arrow.names)
    raise DataError(f"--column: {name} has no column {column!r}; it has {found}")
  row = 0
  for batch in file.iter_batches(columns=[column]):
    for text in batch[column].to_pylist():
      yield _checked(text, f"{name}, row {row}")
      row += 1


def _json(file: TextIO, name: str, column: str) -> Iterator[str]:
  for number, line in enumerate(file, start=1):
    where = f"{name}, line {number}"
    try:
      found = json.loads(line)
    except ValueError as error:
      raise DataError(f"{where}: {error}") from error
    if isinstance(found, dict) and column not in found:
      raise DataError(f"--column: {where} has no field {column!r}; it has {', '.join(found)}")
    yield _checked(found[column] if isinstance(found, dict) else found, where)


def _checked(text: Any, where: str) -> str:
  if not isinstance(text, str):
    raise DataError(f"{where}: a text is expected, found {type(text).__name__}")
  return text


def parts_of(texts: Iterator[str], size: int) -> Iterator[list[str]]:
  """Yields lists of `size` texts; the last one may be shorter."""
  part: list[str] = []
  for text in texts:
    part.append(text)
    if len(part) == size:
      yield part
      part = []
  if part:
    yield part


class Parts:
  """The folder OUT.parts: a file of vectors for each part, named by its number and content."""

  def __init__(self, out: pathlib.Path, settings: dict[str, Any]):
    self.folder = out.with_name(out.name + ".parts")
    self._settings = json.dumps(settings, sort_keys=True)
    self.files: list[pathlib.Path] = []
    self.ranges_file = self.folder / f"ranges-{_digest(self._settings)}.npy"

  def next(self, texts: Sequence[str]) -> pathlib.Path:
    """Returns the file of the next part; it exists where an earlier run wrote it."""
    name = f"{len(self.files):08d}-{_digest(self._settings, *texts)}.npy"
    self.files.append(self.folder / name)
    return self.files[-1]

  def ranges(self, vectors: np.ndarray, stored: np.ndarray | None) -> np.ndarray:
    """Returns the ranges that all parts share: those of the model, else of the first part.

    Raises:
      ConfigError: the model has none, and the first part has fewer than 100 texts.
    """
    if not self.ranges_file.is_file():
      if stored is None and len(vectors) < LEAST_TEXTS:
        raise ConfigError(
          f"--precision: the model has no ranges of int8 vectors, and the first part has "
          f"{len(vectors)} texts; at least {LEAST_TEXTS} are needed (--part, --input)"
        )
      _save(self.ranges_file, ranges(vectors) if stored is None else stored)
    return np.load(self.ranges_file)


def _digest(*texts: str) -> str:
  found = hashlib.sha256()
  for text in texts:
    found.update(f"{len(text)} {text}".encode("utf-8", "surrogatepass"))
  return found.hexdigest()[:24]


def _save(file: pathlib.Path, array: np.ndarray) -> None:
  file.parent.mkdir(exist_ok=True)
  temporary = file.with_suffix(".new")
  with temporary.open("wb") as opened:
    np.save(opened, array)
  temporary.rename(file)


def join_parts(files: Sequence[pathlib.Path], out: pathlib.Path) -> int:
  """Writes the vectors of all parts to `out`, and returns their number."""
  temporary = out.with_name(f".{out.name}.new")
  rows = [np.load(file, mmap_mode="r") for file in files]
  write = _join_parquet if out.suffix == ".parquet" else _join_npy
  write(rows, temporary)
  temporary.rename(out)
  return sum(map(len, rows))


def _join_npy(rows: Sequence[np.ndarray], path: pathlib.Path) -> None:
  header = {
    "descr": np.lib.format.dtype_to_descr(rows[0].dtype),
    "fortran_order": False,
    "shape": (sum(map(len, rows)), rows[0].shape[1]),
  }
  with path.open("wb") as file:
    np.lib.format.write_array_header_2_0(file, header)
    for part in rows:
      file.write(np.ascontiguousarray(part).data)


def _join_parquet(rows: Sequence[np.ndarray], path: pathlib.Path) -> None:
  kind = pa.list_(pa.from_numpy_dtype(rows[0].dtype), rows[0].shape[1])
  with pq.ParquetWriter(path, pa.schema([("vector", kind)])) as file:
    for part in rows:
      values = pa.array(np.asarray(part).reshape(-1))
      column = pa.FixedSizeListArray.from_arrays(values, part.shape[1])
      file.write_table(pa.table({"vector": column}))


def check_out(out: pathlib.Path) -> None:
  """Makes the folder of `out`.

  Raises:
    ConfigError: vectors cannot be written there, or would replace the texts.
  """
  if out.suffix not in (".npy", ".parquet"):
    raise ConfigError(f"--out: {out} ends neither in .npy nor in .parquet")
  if out.is_dir():
    raise ConfigError(f"--out: {out} is a folder; name a file")
  if out.exists() and INPUT.value != "-" and out.resolve() == pathlib.Path(INPUT.value).resolve():
    raise ConfigError(f"--out: {out} is also --input, which it would replace; choose another")
  try:
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=out.parent):
      pass
  except OSError as error:
    raise ConfigError(f"--out: {out} cannot be written: {error.strerror}") from error


def main() -> None:
  """Reads the flags, encodes part by part, and joins the parts."""
  # Imported here, jax does not slow down --help.
  from mlembed_jax.inference import Encoder

  out = pathlib.Path(OUT.value).absolute()
  check_out(out)
  encoder = Encoder.load(MODEL.value, pooled_token=POOLED_TOKEN.value)
  options: dict[str, Any] = {"prompt_name": PROMPT_NAME.value, "prompt": PROMPT.value}
  options |= {"depth": DEPTH.value, "rank": RANK.value, "dim": DIM.value}
  options |= {"untrained": UNTRAINED.value}
  try:
    # What cannot be meant is refused before any work.
    dim = encoder.encode(["a"], **options).shape[1]
    check_precision(PRECISION.value, LEAST_TEXTS, dim)
  except ValueError as error:
    raise ConfigError(f"--{error}") from error
  settings = {"precision": PRECISION.value, "pooled_token": POOLED_TOKEN.value}
  settings |= {"model": encoder.fingerprint}
  parts, leveled = Parts(out, options | settings), PRECISION.value in LEVELED
  stored = encoder.ranges(DEPTH.value, DIM.value) if leveled else None
  with tqdm(unit=" texts", disable=None) as bar:
    for texts in parts_of(read_texts(INPUT.value, COLUMN.value), PART.value):
      file = parts.next(texts)
      if not file.is_file():
        vectors = encoder.encode(texts, **options)
        calibration = parts.ranges(vectors, stored) if leveled else None
        _save(file, quantize(vectors, PRECISION.value, calibration))
      bar.update(len(texts))
  if not parts.files:
    raise DataError(f"--input: {INPUT.value} has no texts")
  count = join_parts(parts.files, out)
  if parts.ranges_file.is_file():
    parts.ranges_file.replace(out.with_name(out.stem + ".ranges.npy"))
  shutil.rmtree(parts.folder)
  cut = f", of which {encoder.truncated:,} were cut" if encoder.truncated else ""
  print(f"{count:,} vectors{cut}: {out}")


if __name__ == "__main__":
  cli.run(main)
