"""What stands beside a file of vectors: how its texts were encoded. Knows no jax."""

import dataclasses
import pathlib
from typing import Any, Self

from mlembed_jax import typed
from mlembed_jax.errors import ConfigError
from mlembed_jax.files import read_json, read_object, storage_errors, write_object

FORMAT = 1


def encoding_path(vectors: pathlib.Path) -> pathlib.Path:
  """Returns the file that says how the vectors of a file were made."""
  return vectors.with_name(vectors.name + ".json")


def is_encoding(path: pathlib.Path) -> bool:
  """Returns whether a file says how vectors were made, also where it does not say it right."""
  try:
    found = read_json(path, path)
  except ConfigError:
    return False
  return isinstance(found, dict) and "encoding" in found and "format_version" in found


@dataclasses.dataclass(frozen=True)
class Encoding:
  """What `Encoder` was told beside the texts and the dimension; None: all there is."""

  prompt: str
  depth: typed.Size | None
  rank: typed.Size | None
  untrained: bool
  pooled_token: str | None  # that ends a text, of a folder that does not say which

  def write(self, vectors: pathlib.Path) -> None:
    """Writes it beside a file of vectors; those of another encoding are removed first."""
    try:
      same = self.read(vectors) == self
    except ConfigError:
      same = False
    if not same:
      with storage_errors(vectors):
        vectors.unlink(missing_ok=True)
    value = {"format_version": FORMAT, "encoding": dataclasses.asdict(self)}
    write_object(encoding_path(vectors), value)

  @classmethod
  def read(cls, vectors: pathlib.Path) -> Self | None:
    """Returns what stands beside a file of vectors, None where nothing does.

    Raises:
      ConfigError: it is damaged.
    """
    path = encoding_path(vectors)
    if not path.exists():
      return None
    found = read_object(path, FORMAT).get("encoding")
    try:
      return typed.from_json(cls, found, "encoding")
    except ValueError as error:
      raise ConfigError(f"{path}: {error}") from error

  @property
  def options(self) -> dict[str, Any]:
    """Those of `Encoder.encode`."""
    return {
      "prompt": self.prompt,
      "depth": self.depth,
      "rank": self.rank,
      "untrained": self.untrained,
    }
