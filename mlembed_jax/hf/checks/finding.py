"""A folder under examination, its files read once; checks, and what they find in it."""

import dataclasses
import enum
import functools
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import safetensors

from mlembed_jax.errors import LoadError
from mlembed_jax.families import FAMILIES, Family
from mlembed_jax.files import read_json
from mlembed_jax.hf import file_names, own_file, param_mapping
from mlembed_jax.hf.own_file import OwnFile

OK, SKIPPED, WARNING, ERROR = LEVELS = ("ok", "skipped", "warning", "error")
AGAIN = "Take the folder as it was exported."


class File(enum.StrEnum):
  """The small files of an exported folder, in the order in which check_files misses them."""

  CONFIG = file_names.CONFIG
  TOKENIZER = file_names.TOKENIZER
  TOKENIZER_CONFIG = file_names.TOKENIZER_CONFIG
  MODULES = file_names.MODULES
  PROMPTS = file_names.PROMPTS
  BERT = file_names.BERT
  POOLING = f"1_Pooling/{file_names.CONFIG}"
  CARD = file_names.CARD
  OWN = own_file.NAME


@dataclasses.dataclass(frozen=True)
class Finding:
  """What a check found in one file; the table of `consumers` says whom its fact concerns."""

  level: str  # one of LEVELS
  file: str
  found: str
  remedy: str = ""
  fact: str = ""  # that is broken; "" stands for that of the check
  check: str = ""  # code of the check; `examine` fills it in, and the next
  name: str = ""


CheckFunction = Callable[["Subject"], Iterator[Finding]]


@dataclasses.dataclass(frozen=True)
class Check:
  """One check; `run` yields nothing where all is well."""

  code: str
  name: str  # a word for people
  run: CheckFunction
  fact: str  # that is broken where a finding names none; "" concerns no program
  needs: tuple[str, ...] = ()  # files without which it is skipped; check_files says they are absent


class Subject:
  """The files of a folder by name.

  JSON that is absent or no object is {} here: check_files and check_json say so.
  """

  def __init__(self, path: pathlib.Path):
    self.path = path
    self._parsed = functools.cache(self._parse)

  def parse(self, file: str) -> Any:
    """Returns the content of a JSON file; raises LoadError where there is none."""
    return self._parsed(file)

  def _parse(self, file: str) -> Any:
    return read_json(self.path / file, file, LoadError)

  def json(self, file: str) -> dict[str, Any]:
    """Returns the object of a JSON file."""
    found = self._content(file)
    return found if isinstance(found, dict) else {}

  def _content(self, file: str) -> Any:
    try:
      return self.parse(file)
    except (OSError, ValueError):
      return None

  def has(self, file: str) -> bool:
    """Returns whether there is such a file."""
    return (self.path / file).is_file()

  @property
  def config(self) -> dict[str, Any]:
    """Returns config.json."""
    return self.json(File.CONFIG)

  @functools.cached_property
  def own(self) -> OwnFile | None:
    """Returns mlembed.json; None where others wrote the folder or check_json finds damage."""
    try:
      return own_file.read(self.path)
    except LoadError:
      return None

  @property
  def kind(self) -> str:
    """Returns the name of the architecture, also of a folder of factors."""
    return str(self.config.get("model_type")).removeprefix(param_mapping.REMOTE)

  @property
  def family(self) -> Family | None:
    """Returns the model family, None of an architecture that is not known."""
    return FAMILIES.get(self.kind)

  @property
  def is_remote(self) -> bool:
    """Returns whether the token table is stored as factors, which needs code of the folder."""
    return str(self.config.get("model_type")).startswith(param_mapping.REMOTE)

  def modules(self) -> list[dict[str, Any]]:
    """Returns the entries of modules.json that are objects."""
    listed = self._content(File.MODULES)
    return [m for m in listed if isinstance(m, dict)] if isinstance(listed, list) else []

  def module(self, kind: str) -> str | None:
    """Returns the folder of the module whose type ends in `kind`, None without it."""
    for entry in self.modules():
      if str(entry.get("type")).rpartition(".")[2] == kind:
        return str(entry.get("path"))
    return None

  @property
  def prompts(self) -> dict[str, Any]:
    """Returns the prompts by name."""
    found = self.json(File.PROMPTS).get("prompts")
    return found if isinstance(found, dict) else {}

  @property
  def is_export(self) -> bool:
    """Returns whether mlembed.json says that the folder was written here; it may be damaged."""
    return self.has(File.OWN) and self._content(File.OWN) != {}

  @property
  def allowed(self) -> int | None:
    """Returns the most tokens of a text."""
    found = self.json(File.BERT).get("max_seq_length")
    return found if isinstance(found, int) else None

  def stored(self) -> dict[str, tuple[str, dict[str, str]]]:
    """Returns {tensor: (file, metadata of the file)} of the weights that can be opened."""
    found = {}
    for path in sorted(self.path.glob("*.safetensors")):
      try:
        with safetensors.safe_open(path, "np") as file:
          found |= dict.fromkeys(file.keys(), (path.name, file.metadata() or {}))
      except (OSError, safetensors.SafetensorError):
        continue  # check_tensors says so
    return found
