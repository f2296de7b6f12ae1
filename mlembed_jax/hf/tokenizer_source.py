"""Where a tokenizer.json lies that a command is given."""

import pathlib

from mlembed_jax.data.names import TOKENIZER
from mlembed_jax.errors import DataError, LoadError


def tokenizer_path(source: str) -> pathlib.Path:
  """Returns the tokenizer.json of a file or folder; raises DataError or LoadError without one."""
  path = pathlib.Path(source)
  if path.is_file() or (path.suffix == ".json" and not path.is_dir()):
    return path
  from mlembed_jax.hf.folder import resolve  # with jax, for which --help need not wait

  try:
    path = resolve(source, (TOKENIZER,)) / TOKENIZER
  except LoadError as error:
    raise LoadError(f"--tokenizer: {error}") from error
  if not path.is_file():
    raise DataError(
      f"--tokenizer: {source} has no {TOKENIZER}; AutoTokenizer.from_pretrained(...) of "
      "transformers writes one by save_pretrained"
    )
  return path
