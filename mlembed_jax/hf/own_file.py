"""mlembed.json: what an exported folder says of itself beside what other programs read.

The only place that knows the keys of the file: they are the fields of `OwnFile`, in their order.
"""

import dataclasses
import json
import pathlib
import types
import typing
from typing import Any

from mlembed_jax.errors import LoadError
from mlembed_jax.files import check_format, write_json

NAME = "mlembed.json"  # marks a folder as written here
FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Library:
  """The package that wrote the folder."""

  name: str
  version: str


@dataclasses.dataclass(frozen=True)
class BaseModel:
  """What training started from."""

  id: str | None  # name of the folder; None: random weights


@dataclasses.dataclass(frozen=True)
class Body:
  """The stored encoder."""

  family: str  # model_type
  hidden: int
  layers_trained: int
  layers: int
  parameters: int


@dataclasses.dataclass(frozen=True)
class AxisSizes:
  """The trained and the exported sizes of one axis, dimensions or layers."""

  trained: tuple[int, ...]
  exported: int


@dataclasses.dataclass(frozen=True)
class Table:
  """The token table."""

  form: str  # see FORMS in config_files
  rank_trained: int | None  # None: it was never factorised
  ranks: tuple[int, ...]  # trained
  rank_exported: int | None
  uv_file: str | None  # of the trained factors of a merged table


@dataclasses.dataclass(frozen=True)
class Pooling:
  """Which state of a text is its embedding, and lengths of texts in tokens."""

  kind: str
  token: str  # ends every text
  token_id: int
  trained_length: int
  max_seq_length: int


@dataclasses.dataclass(frozen=True)
class Training:
  """The run that the weights come from."""

  recipe: str
  step: int
  config_sha256: str
  manifest_sha256: str
  switches: dict[str, Any]  # values of the fields in which the recipes differ


@dataclasses.dataclass(frozen=True)
class Digest:
  """The content of one file."""

  sha256: str


@dataclasses.dataclass(frozen=True)
class OwnFile:
  """The content of mlembed.json, but for its format version."""

  name: str
  library: Library
  base_model: BaseModel
  body: Body
  dims: AxisSizes
  exits: AxisSizes
  table: Table
  pooling: Pooling
  prompt_template: str
  training: Training
  files: dict[str, Digest]  # all others of the folder
  ranges_file: str | None = None  # of the ranges of int8 vectors; folders of 0.1.0 have none


def write(folder: pathlib.Path, content: OwnFile) -> None:
  """Writes mlembed.json, after every other file, as it holds their digests."""
  write_json(folder / NAME, {"format_version": FORMAT, **dataclasses.asdict(content)})


def read(folder: pathlib.Path) -> OwnFile | None:
  """Returns the content of the file, None where the folder has none or an empty object.

  Raises:
    LoadError: it is damaged, or a newer version of the package wrote it; the message names the
      field.
  """
  path, value = folder / NAME, _json_object(folder / NAME)
  try:
    return _object(OwnFile, value, "") if value else None
  except LoadError as error:
    raise LoadError(f"{path}: {error}; export the folder again") from error


def listed_files(folder: pathlib.Path) -> set[str]:
  """Returns the paths of all files of an export, none where the folder is no export.

  The other fields need not be there, as an export that lacks one can still be replaced.

  Raises:
    LoadError: the file is no JSON object, or a newer version of the package wrote it.
  """
  files = _json_object(folder / NAME).get("files")
  return {NAME, *files} if isinstance(files, dict) else set()


def _json_object(path: pathlib.Path) -> dict[str, Any]:
  """Returns the content of a JSON file, nothing where there is none."""
  if not path.is_file():
    return {}
  try:
    value = json.loads(path.read_text(encoding="utf-8"))
  except (OSError, ValueError) as error:
    raise LoadError(f"{path}: {error}; export the folder again") from error
  if not isinstance(value, dict):
    raise LoadError(f"{path} is no JSON object; export the folder again")
  check_format(path, value.get("format_version"), FORMAT, LoadError)
  return value


def _object(cls: Any, value: dict[str, Any], prefix: str) -> Any:
  """Returns a JSON object as a dataclass; keys without a field are ignored."""
  fields = [f for f in dataclasses.fields(cls) if f.name in value or f.default is f.default_factory]
  if missing := [field.name for field in fields if field.name not in value]:
    raise LoadError(f"{prefix}{missing[0]} is missing")
  return cls(**{f.name: _typed(f.type, value[f.name], prefix + f.name) for f in fields})


def _typed(hint: Any, value: Any, name: str) -> Any:
  """Returns the JSON value of a field as its type `hint`, which may end in `| None`."""
  if isinstance(hint, types.UnionType):
    return None if value is None else _typed(typing.get_args(hint)[0], value, name)
  if hint is Any:
    return value
  container = dict if dataclasses.is_dataclass(hint) else typing.get_origin(hint)
  wanted: Any = list if container is tuple else container or hint
  if type(value) is not wanted:  # True is no int here
    raise LoadError(f"{name} is {value!r}, expected {wanted.__name__}")
  if dataclasses.is_dataclass(hint):
    return _object(hint, value, f"{name}.")
  items = typing.get_args(hint)
  if container is tuple:
    return tuple(_typed(items[0], item, f"{name}[{i}]") for i, item in enumerate(value))
  if container is dict:
    return {key: _typed(items[1], item, f"{name}.{key}") for key, item in value.items()}
  return value
