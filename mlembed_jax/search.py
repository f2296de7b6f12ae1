"""Finds the nearest texts of a file to queries, by the vectors that `encode` wrote.

  python -m mlembed_jax.search --model DIR --vectors vectors.npy --texts texts.jsonl \\
    --query "how do I reset my password?"

Every vector is compared, in float32, so nothing is missed: for a first look, and for up to some
millions of texts. Give the --depth and --rank that the texts were encoded with.
"""

import pathlib
from typing import Literal

import numpy as np
from absl import flags

from mlembed_jax import cli
from mlembed_jax.data.text_files import KNOWN
from mlembed_jax.data.texts import read_texts
from mlembed_jax.errors import ConfigError, DataError
from mlembed_jax.nearest import nearest
from mlembed_jax.quantize import LEVELED, check_ranges, ranges_path

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
DEPTH = flags.DEFINE_integer("depth", None, "Layers to use for queries; a trained exit.")
RANK = flags.DEFINE_integer("rank", None, "Rank of the token table for queries; a trained one.")
UNTRAINED = flags.DEFINE_bool("untrained", False, "Allow sizes that were not trained.")


def read_vectors(path: pathlib.Path) -> tuple[np.ndarray, np.ndarray | None]:
  """Returns the vectors of a file, mapped, and the ranges of codes.

  Raises:
    ConfigError: the file cannot be read, or holds something else; or codes have no ranges.
  """
  found = _load(path, "r")
  if found.ndim != 2 or found.dtype.name not in ("float32", *LEVELED):
    shape = f"{found.dtype} {list(found.shape)}"
    raise ConfigError(f"--vectors: {path} holds {shape}, expected [N, D] float32, int8 or uint8")
  if found.dtype.name not in LEVELED:
    return found, None
  calibration = _load(ranges_path(path))
  try:
    check_ranges(calibration, found.shape[1])
  except ValueError as error:
    raise ConfigError(f"--vectors: {ranges_path(path)}: {error}") from error
  return found, calibration


def _load(path: pathlib.Path, mmap_mode: Literal["r"] | None = None) -> np.ndarray:
  try:
    return np.asanyarray(np.load(path, mmap_mode=mmap_mode))
  except (OSError, ValueError, EOFError) as error:
    raise ConfigError(f"--vectors: {path} cannot be read: {error}") from error


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


def main() -> None:
  """Reads the flags, and prints the nearest texts of each query."""
  if not QUERY.value:
    raise ConfigError("--query: give at least one")
  documents, calibration = read_vectors(pathlib.Path(VECTORS.value))
  # Imported here, jax does not slow down --help.
  from mlembed_jax.inference import Encoder

  encoder = Encoder.load(MODEL.value)
  try:
    queries = encoder.encode_query(
      QUERY.value,
      prompt_name=PROMPT_NAME.value,
      depth=DEPTH.value,
      rank=RANK.value,
      dim=documents.shape[1],
      untrained=UNTRAINED.value,
    )
  except ValueError as error:
    raise ConfigError(f"--{error}") from error
  scores, rows = nearest(queries, documents, K.value, calibration)
  texts = pick(set(rows.ravel().tolist()), len(documents))
  for query, best, places in zip(QUERY.value, scores, rows, strict=True):
    print(query)
    for score, row in zip(best.tolist(), places.tolist(), strict=True):
      print(f"  {score:.4f}  {row}  {texts[row]}")


if __name__ == "__main__":
  cli.run(main)
