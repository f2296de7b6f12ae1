"""An exported folder under examination: its files, read once, and what a check says of them."""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

from mlembed_jax.hf import names

OK, SKIPPED, WARNING, ERROR = "ok", "skipped", "warning", "error"


@dataclasses.dataclass(frozen=True)
class Finding:
  """What one check found in one file; `level` is one of OK, SKIPPED, WARNING and ERROR."""

  check: str
  level: str
  file: str
  found: str
  remedy: str = ""


Said = tuple[str, str, str, str]  # level, file, found, remedy
Check = Callable[["Subject"], Iterator[Said]]


class Subject:
  """The files of a folder by name; JSON that is absent or broken is empty here (D01, D02)."""

  def __init__(self, path: pathlib.Path):
    self.path = path
    self._json = functools.cache(self._read_json)

  def json(self, file: str) -> Any:
    """Returns the content of a JSON file, {} where there is none."""
    try:
      return self._json(file)
    except (OSError, ValueError):
      return {}

  def _read_json(self, file: str) -> Any:
    return json.loads((self.path / file).read_text(encoding="utf-8"))

  @property
  def config(self) -> dict[str, Any]:
    """Returns config.json."""
    return self.json("config.json")

  @property
  def ours(self) -> dict[str, Any]:
    """Returns mlembed.json."""
    return self.json("mlembed.json")

  @property
  def is_remote(self) -> bool:
    """Returns whether the token table is stored as factors, which needs code of the folder."""
    return str(self.config.get("model_type")).startswith(names.REMOTE)

  def modules(self) -> list[dict[str, Any]]:
    """Returns the entries of modules.json that are objects."""
    listed = self.json("modules.json")
    return [m for m in listed if isinstance(m, dict)] if isinstance(listed, list) else []

  def module(self, kind: str) -> str | None:
    """Returns the file config.json of the module whose type ends in `kind`, None without it."""
    for entry in self.modules():
      if str(entry.get("type")).rpartition(".")[2] == kind:
        return f"{entry.get('path')}/config.json"
    return None

  @property
  def pooled_id(self) -> int | None:
    """Returns the id whose state is the embedding."""
    stated = self.ours.get("pooling", {}).get("token_id", self.config.get("eos_token_id"))
    return stated if isinstance(stated, int) else None
