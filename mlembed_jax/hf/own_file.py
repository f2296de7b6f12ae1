"""mlembed.json: what an exported folder says of itself beside what other programs read."""

import json
import pathlib
from typing import Any

from mlembed_jax.errors import LoadError
from mlembed_jax.files import check_format

NAME = "mlembed.json"  # marks a folder as written here
FORMAT = 1


def read(folder: pathlib.Path) -> dict[str, Any]:
  """Returns the content of the file, empty where the folder has none.

  Raises:
    LoadError: it is damaged, or a newer version of the package wrote it.
  """
  path = folder / NAME
  if not path.is_file():
    return {}
  try:
    value = json.loads(path.read_text(encoding="utf-8"))
  except ValueError as error:
    raise LoadError(f"{path}: {error}; export the folder again") from error
  if not isinstance(value, dict):
    raise LoadError(f"{path} is no JSON object; export the folder again")
  check_format(path, value.get("format_version"), FORMAT, LoadError)
  return value
