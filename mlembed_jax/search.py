"""Finds the nearest texts of a file to queries, by the vectors that `encode` wrote.

  python -m mlembed_jax.search --model DIR --vectors vectors.npy --texts texts.jsonl \\
    --query "how do I reset my password?"

Every vector is compared, in float32, so nothing is missed: for a first look, and for up to some
millions of texts. Queries are encoded with the depth and rank of the texts, unless they are told
another. Some texts are encoded again, to see that model, texts and vectors belong together.
"""

import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
from absl import flags

from mlembed_jax import cli
from mlembed_jax.data.text_files import KNOWN
from mlembed_jax.data.texts import read_texts
from mlembed_jax.errors import ConfigError, DataError
from mlembed_jax.nearest import nearest
from mlembed_jax.quantize import LEVELED, Ranges, check_ranges, decoded, quantize, ranges_path, unit
from mlembed_jax.vector_files import Encoding, encoding_path

if TYPE_CHECKING:
  from mlembed_jax.inference import Encoder

# The least cosine of a vector of the file and of the same text, encoded now and rounded by the same
# ranges. bfloat16 leaves more than 0.999, another model almost always less.
SAME = 0.99
CHECKED = 32  # texts are encoded again, at most

MODEL = flags.DEFINE_string(
  "model", None, "Folder in Hugging Face layout, or hf:ORG/NAME.", required=True
)
VECTORS = flags.DEFINE_string(
  "vectors", None, "File .npy that `encode` wrote, float32, int8 or uint8.", required=True
)
TEXTS = flags.DEFINE_string(
  "texts", None, f"Their texts, in the same order: the --input of `encode`, {KNOWN}.", required=True
)
COLUMN = flags.DEFINE_string("column", "text", "Field or column that holds the texts.")
QUERY = flags.DEFINE_multi_string("query", None, "A query; may be given several times.")
K = flags.DEFINE_integer("k", 10, "Texts to show of each query.", lower_bound=1)
PROMPT_NAME = flags.DEFINE_string(
  "prompt_name", None, "Prompt before the queries. Default: `query`, where the model has it."
)
DEPTH = flags.DEFINE_integer(
  "depth", None, "Layers to use for queries; a trained exit. Default: that of the texts."
)
RANK = flags.DEFINE_integer(
  "rank", None, "Rank of the token table for queries; a trained one. Default: that of the texts."
)
POOLED_TOKEN = flags.DEFINE_string(
  "pooled_token", None, "Token that ends every text, of a folder that does not say which."
)
UNTRAINED = flags.DEFINE_bool("untrained", False, "Allow sizes that were not trained.")


def read_vectors(path: pathlib.Path) -> tuple[np.ndarray, np.ndarray | None]:
  """Returns the vectors of a file, mapped, and the ranges of codes.

  Raises:
    ConfigError: the file cannot be read, or holds something else; or codes have no ranges.
  """
  if path.suffix != ".npy":
    raise ConfigError(f"--vectors: {path} is no .npy; write one with `encode --out FILE.npy`")
  found = _load(path, "r")
  if found.ndim != 2 or found.dtype.name not in ("float32", *LEVELED):
    shape = f"{found.dtype} {list(found.shape)}"
    raise ConfigError(f"--vectors: {path} holds {shape}, expected [N, D] float32, int8 or uint8")
  if not len(found):
    raise ConfigError(f"--vectors: {path} has no vectors")
  if found.dtype.name not in LEVELED:
    return found, None
  if not ranges_path(path).is_file():
    raise ConfigError(
      f"--vectors: {path} holds {found.dtype}, and there is no {ranges_path(path)}; search reads "
      "float32, and int8 and uint8 beside their ranges, but no bits"
    )
  calibration = _load(ranges_path(path))
  try:
    check_ranges(calibration, found.shape[1])
  except ValueError as error:
    raise ConfigError(f"--vectors: {ranges_path(path)}: {error}") from error
  return found, calibration


def _load(path: pathlib.Path, mmap_mode: Literal["r"] | None = None) -> np.ndarray:
  try:
    return np.asanyarray(np.load(path, mmap_mode=mmap_mode))
  except OSError as error:
    raise ConfigError(f"--vectors: {path} cannot be read: {error}") from error
  except (ValueError, EOFError) as error:
    raise ConfigError(f"--vectors: {path} is no whole .npy file of numbers") from error


def pick(rows: set[int], count: int) -> dict[int, str]:
  """Returns the texts of some rows; raises DataError where there are not `count` texts in all."""
  found, seen = {}, 0
  for text in read_texts(TEXTS.value, COLUMN.value, "--texts"):
    if seen in rows:
      found[seen] = text
    seen += 1
  if seen != count:
    raise DataError(
      f"--texts: {TEXTS.value} has {seen:,} texts, --vectors {VECTORS.value} {count:,} vectors; "
      "name the file that was encoded"
    )
  return found


def check_same(
  encoder: "Encoder",
  encoding: Encoding,
  documents: np.ndarray,
  calibration: Ranges | None,
  texts: Mapping[int, str],
) -> None:
  """Raises ConfigError where the vectors of these rows are not those of the texts."""
  rows = list(texts)
  options = encoding.options | {"dim": documents.shape[1]}
  found = encoder.encode([texts[row] for row in rows], **options)
  stored = np.asarray(documents[rows])
  if calibration is not None:
    codes = quantize(found, documents.dtype.name, calibration)  # beyond the ranges values are cut
    found, stored = decoded(codes, calibration), decoded(stored, calibration)
  cosines = np.sum(unit(found) * unit(stored), axis=1)
  worst = int(np.argmin(cosines))
  if not cosines[worst] >= SAME:
    raise ConfigError(
      f"--vectors: row {rows[worst]} of {VECTORS.value} is not what --model {MODEL.value} makes of "
      f"that text of --texts {TEXTS.value} (cosine {cosines[worst]:.2f}); name the model and the "
      "texts that `encode` was given, or encode them again"
    )


def check_sizes(
  encoder: "Encoder", encoding: Encoding | None, path: pathlib.Path, dim: int
) -> None:
  """Raises ConfigError where the model cannot have given the vectors of a file, by their sizes."""
  said = f"name the model that `encode` was given; --model {MODEL.value} is another"
  if dim > encoder.dim:
    raise ConfigError(f"--vectors: {path} has {dim} dimensions, the model {encoder.dim}; {said}")
  try:
    if encoding:
      encoder.check(encoding.depth, encoding.rank, dim, encoding.untrained)
  except ValueError as error:
    raise ConfigError(f"{encoding_path(path)}: {error}; {said}") from error


def encode_queries(
  encoder: "Encoder", queries: Sequence[str], encoding: Encoding | None, dim: int
) -> np.ndarray:
  """Returns the vectors of queries; raises ConfigError where a flag cannot be meant."""
  named = {"depth": DEPTH, "rank": RANK, "untrained": UNTRAINED}
  options = encoding.options if encoding else {}
  options |= {name: flag.value for name, flag in named.items() if flag.present}
  options |= {"prompt": None, "prompt_name": PROMPT_NAME.value, "dim": dim}
  try:
    return encoder.encode_query(queries, **options)
  except ValueError as error:
    raise ConfigError(f"--{error}") from error


def main() -> None:
  """Reads the flags, and prints the nearest texts of each query."""
  if not QUERY.value or not all(QUERY.value):
    raise ConfigError("--query: give at least one, none of them empty")
  path = pathlib.Path(VECTORS.value)
  documents, calibration = read_vectors(path)
  if (encoding := Encoding.read(path)) is None:
    print(
      f"note: {encoding_path(path)} is not there, so nothing says whether the vectors are of this "
      "model and of these texts; give the --depth and --rank that they were encoded with",
      file=sys.stderr,
    )
  # Imported here, jax does not slow down --help.
  from mlembed_jax.inference import Encoder

  pooled_token = POOLED_TOKEN.value or (encoding.pooled_token if encoding else None)
  encoder = Encoder.load(MODEL.value, pooled_token=pooled_token)
  check_sizes(encoder, encoding, path, documents.shape[1])
  queries = encode_queries(encoder, QUERY.value, encoding, documents.shape[1])
  scores, rows = nearest(queries, documents, K.value, calibration)
  # What is shown is checked, and both ends, where texts are moved or missing.
  shown, ends = rows.ravel().tolist(), {0, len(documents) - 1}
  texts = pick({*shown, *ends}, len(documents))
  if encoding:
    checked = list(dict.fromkeys([*ends, *shown]))[:CHECKED]
    check_same(encoder, encoding, documents, calibration, {row: texts[row] for row in checked})
  for query, best, places in zip(QUERY.value, scores, rows, strict=True):
    print(query)
    for score, row in zip(best.tolist(), places.tolist(), strict=True):
      print(f"  {score:.4f}  {row}  {' ↵ '.join(texts[row].splitlines())}")


if __name__ == "__main__":
  cli.run(main)
