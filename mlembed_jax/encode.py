"""Writes the vectors of the texts of a file, of any size, with an exported model.

  python -m mlembed_jax.encode --model DIR --input texts.jsonl --out vectors.npy

A part is written at a time, under a name with digests of its texts, settings and bytes. The same
command goes on after a stop: parts whose texts and settings are the same are not encoded again,
unless their bytes are damaged.
"""

import hashlib
import io
import itertools
import json
import pathlib
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from absl import flags

from mlembed_jax import cli, progress
from mlembed_jax.data.text_files import KNOWN, TXT
from mlembed_jax.data.texts import form_of_file, read_texts
from mlembed_jax.errors import ConfigError, DataError
from mlembed_jax.files import new_file, storage_errors
from mlembed_jax.quantize import (
  LEAST_TEXTS,
  LEVELED,
  PRECISIONS,
  RANGES_SUFFIX,
  outside,
  quantize,
  ranges,
  ranges_path,
)
from mlembed_jax.vector_files import Encoding, encoding_path, is_encoding
from mlembed_jax.vector_parts import Parts, digest_of_texts, parts_of

MODEL = flags.DEFINE_string(
  "model", None, "Folder in Hugging Face layout, or hf:ORG/NAME.", required=True
)
INPUT = flags.DEFINE_string(
  "input", None, f"File {KNOWN}; .txt and - (a pipe) have a text per line.", required=True
)
COLUMN = flags.DEFINE_string("column", "text", "Field or column that holds the texts.")
OUT = flags.DEFINE_string(
  "out",
  None,
  "File .npy or .parquet to write. Beside it goes how the texts were encoded, v.npy.json, and the "
  "ranges of int8 and uint8: v.ranges.npy for both v.npy and v.parquet, which can stand in one "
  "folder only where they share them.",
  required=True,
)
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
RANGES = flags.DEFINE_string(
  "ranges",
  None,
  "File .npy [2, D] of the least and the largest value of each dimension, for int8 and uint8. "
  "Without it, those of the folder of the model, or of the first part.",
)
PART = flags.DEFINE_integer("part", 16_384, "Texts of a part.", lower_bound=1)

MOST_CLIPPED = 0.04  # of the coordinates, beyond their ranges; a larger share is said


Encode = Callable[[Sequence[str]], np.ndarray]


def encode_parts(
  texts: Iterable[list[str]],
  parts: Parts,
  encode: Encode,
  settings: dict[str, Any],
  given: np.ndarray | None,
) -> tuple[list[pathlib.Path], np.ndarray | None]:
  """Returns the files of all parts, and the ranges that they are rounded by, if they are.

  Args:
    texts: of each part; there is one at least.
    parts: the folder, which may have parts of an earlier run.
    encode: returns vectors of texts.
    settings: all that decides the vectors, and `precision`.
    given: ranges of the user, if there are.

  Raises:
    ConfigError: there are no ranges, and too few texts to take them from.
  """
  texts = iter(texts)
  first = next(texts)
  precision, origin = settings["precision"], json.dumps(settings, sort_keys=True)
  calibration, encoded = given, None
  if precision in LEVELED and calibration is None:
    calibration, encoded = find_ranges(parts, encode, first, settings)
  if calibration is not None:
    # Parts that were rounded by other ranges have other names, so that none is ever taken.
    origin += hashlib.sha256(calibration.tobytes()).hexdigest()
  files: list[pathlib.Path] = []
  clipped = coordinates = 0  # of parts that are encoded now
  with progress.count("encoding", unit=" texts") as bar:
    for part in itertools.chain([first], texts):
      name = f"{len(files):08d}-{digest_of_texts(origin, *part)}"
      if (file := parts.find(name)) is None:
        vectors = encoded if encoded is not None and not files else encode(part)
        if calibration is not None:
          clipped, coordinates = clipped + outside(vectors, calibration), coordinates + vectors.size
        file = parts.save(name, quantize(vectors, precision, calibration))
      files.append(file)
      bar.update(len(part))
  if said := clipped_text(clipped, coordinates, precision):
    print(said, file=sys.stderr, flush=True)
  return files, calibration


def find_ranges(
  parts: Parts, encode: Encode, texts: Sequence[str], settings: dict[str, Any]
) -> tuple[np.ndarray, np.ndarray | None]:
  """Returns the ranges of the first part, and its vectors where they had to be computed.

  Raises:
    ConfigError: the part has too few texts.
  """
  if len(texts) < LEAST_TEXTS:
    raise ConfigError(
      f"--precision: {settings['precision']} needs ranges of at least {LEAST_TEXTS} texts, and the "
      f"first part has {len(texts)}; name a file by --ranges, or give more texts, and a larger "
      "--part"
    )
  name = f"ranges-{digest_of_texts(json.dumps(settings, sort_keys=True), *texts)}"
  if file := parts.find(name):
    return np.load(file), None
  vectors = encode(texts)
  found = ranges(vectors).astype(np.float32)
  parts.save(name, found)
  return found, vectors


def read_ranges(path: str, dim: int) -> np.ndarray:
  """Returns the ranges of a file, [2, D] float32; raises ConfigError where they cannot be used."""
  if PRECISION.value not in LEVELED:
    raise ConfigError(f"--ranges: --precision {PRECISION.value} has none; drop one of the flags")
  try:
    found = np.load(path)
  except OSError as error:
    raise ConfigError(f"--ranges: {path} cannot be read: {error}") from error
  except (ValueError, EOFError) as error:
    raise ConfigError(f"--ranges: {path} cannot be read: it is no whole .npy of numbers") from error
  if not isinstance(found, np.ndarray) or found.dtype.kind != "f" or found.shape != (2, dim):
    shape = f"{found.dtype} {list(found.shape)}" if isinstance(found, np.ndarray) else "an archive"
    raise ConfigError(f"--ranges: {path} holds {shape}, expected float32 [2, {dim}]")
  if not (np.isfinite(found).all() and (found[0] <= found[1]).all()):
    raise ConfigError(
      f"--ranges: {path} holds a number that is not finite, or a least value above the largest"
    )
  return found.astype(np.float32)


def check_ranges(out: pathlib.Path, precision: str, given: np.ndarray | None) -> None:
  """Refuses what would leave vectors beside ranges that are not theirs.

  Args:
    out: the file of vectors to write.
    precision: of the vectors.
    given: their ranges, None where they have none or those of the first part, not yet known.

  Raises:
    ConfigError: vectors of the same stem in the other form have the same file of ranges, and it
      would change.
  """
  other = out.with_suffix(".parquet" if out.suffix == ".npy" else ".npy")
  path = ranges_path(out)
  unknown = precision in LEVELED and given is None
  if other.exists() and (unknown or _npy(given) != _content(path)):
    remedy = f", or round by --ranges {path}" if precision in LEVELED and path.is_file() else ""
    raise ConfigError(
      f"--out: {other}, which stands beside {out.name}, would be left with ranges that are not its "
      f"own, as both have {path.name}; choose another name{remedy}"
    )


def _npy(array: np.ndarray | None) -> bytes:
  """Returns the content of the file of an array; of none, nothing."""
  file = io.BytesIO()
  if array is not None:
    np.save(file, array)
  return file.getvalue()


def _content(path: pathlib.Path) -> bytes:
  return path.read_bytes() if path.is_file() else b""


def write_ranges(calibration: np.ndarray | None, out: pathlib.Path) -> None:
  """Writes the ranges beside `out`; without any, removes those of an earlier run.

  Where they change, `out` is removed first, so that vectors never stand beside ranges that are not
  theirs, at whatever point the command is killed.
  """
  path, content = ranges_path(out), _npy(calibration)
  if content == _content(path):
    return
  if content:
    with new_file(path) as new:
      new.write_bytes(content)
      out.unlink(missing_ok=True)
  else:
    with storage_errors(path):
      out.unlink(missing_ok=True)
      path.unlink()


def clipped_text(clipped: int, coordinates: int, precision: str) -> str:
  """Returns what is to be said where many coordinates lie beyond their ranges; else nothing."""
  if clipped <= MOST_CLIPPED * coordinates:
    return ""
  return (
    f"note: {clipped / coordinates:.0%} of the coordinates lie beyond their ranges, where "
    f"{precision} cannot tell them apart; encode in float32, take `mlembed_jax.quantize.ranges` of "
    "these vectors, and give them by --ranges"
  )


def join_parts(files: Sequence[pathlib.Path], out: pathlib.Path) -> int:
  """Writes the vectors of all parts to `out`, and returns their number."""
  rows = [np.load(file, mmap_mode="r") for file in files]
  write = _join_parquet if out.suffix == ".parquet" else _join_npy
  with new_file(out) as new:
    write(rows, new)
  return sum(map(len, rows))


def finish(
  parts: Parts,
  files: Sequence[pathlib.Path],
  calibration: np.ndarray | None,
  encoding: Encoding,
  out: pathlib.Path,
) -> int:
  """Writes `out` and what stands beside it, removes the parts, returns the number of vectors."""
  write_ranges(calibration, out)
  encoding.write(out)
  count = join_parts(files, out)
  shutil.rmtree(parts.folder)
  return count


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
  if out.name.endswith(RANGES_SUFFIX):
    raise ConfigError(f"--out: {out} is a name of ranges, {RANGES_SUFFIX}; choose another")
  written = [out, encoding_path(out), ranges_path(out)]
  if INPUT.value != "-" and pathlib.Path(INPUT.value).resolve() in [p.resolve() for p in written]:
    raise ConfigError(f"--out: {INPUT.value} is also --input, which it would replace")
  if (beside := encoding_path(out)).exists() and not is_encoding(beside):
    raise ConfigError(
      f"--out: {beside} would be replaced, and is not what `encode` wrote; remove it, or choose "
      "another name"
    )
  try:
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=out.parent):
      pass
  except OSError as error:
    raise ConfigError(f"--out: {out} cannot be written: {error.strerror}") from error


def check_flags() -> None:
  """Raises ConfigError where a flag would change nothing."""
  if PROMPT.present and PROMPT_NAME.present:
    raise ConfigError("--prompt, --prompt_name: only one can stand before a text; drop one of them")
  if COLUMN.present and (INPUT.value == "-" or form_of_file(INPUT.value, "--input") == TXT):
    raise ConfigError(
      f"--column: {INPUT.value} has a text per line, and no columns; drop the flag, or name a file "
      "of another form"
    )


def main() -> None:
  """Reads the flags, encodes part by part, and joins the parts."""
  # Imported here, jax does not slow down --help.
  from mlembed_jax.inference import Encoder

  out = pathlib.Path(OUT.value).absolute()
  check_out(out)
  check_flags()
  encoder = Encoder.load(MODEL.value, pooled_token=POOLED_TOKEN.value)
  options: dict[str, Any] = {"prompt_name": PROMPT_NAME.value, "prompt": PROMPT.value}
  options |= {"depth": DEPTH.value, "rank": RANK.value, "dim": DIM.value}
  options |= {"untrained": UNTRAINED.value}
  try:
    # What cannot be meant is refused before any work.
    probe = encoder.encode(["a"], **options)
    quantize(probe, PRECISION.value, ranges(probe))
  except ValueError as error:
    raise ConfigError(f"--{error}") from error
  settings = {"precision": PRECISION.value, "pooled_token": POOLED_TOKEN.value}
  settings |= {"model": encoder.fingerprint}
  given = read_ranges(RANGES.value, probe.shape[1]) if RANGES.value else None
  if given is None and PRECISION.value in LEVELED:
    given = encoder.ranges(DEPTH.value, DIM.value)  # of the folder, if the export stored them
  check_ranges(out, PRECISION.value, given)
  parts = Parts(out)
  texts = parts_of(read_texts(INPUT.value, COLUMN.value), PART.value)
  if (first := next(texts, None)) is None:
    raise DataError(f"--input: {INPUT.value} has no texts")
  encoding = Encoding(
    encoder.prompt(PROMPT_NAME.value) if PROMPT.value is None else PROMPT.value,
    DEPTH.value,
    RANK.value,
    UNTRAINED.value,
    POOLED_TOKEN.value,
  )
  with parts.held():
    files, calibration = encode_parts(
      itertools.chain([first], texts),
      parts,
      lambda part: encoder.encode(part, **options),
      options | settings,
      given,
    )
    count = finish(parts, files, calibration, encoding, out)
  cut = f", of which {encoder.truncated:,} were cut" if encoder.truncated else ""
  print(f"{count:,} vectors{cut}: {out}")


if __name__ == "__main__":
  cli.run(main)
