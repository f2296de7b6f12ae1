"""mlembed.json: what an exported folder says of itself beside what other programs read.

The only place that knows the keys of the file: they are the fields of `OwnFile`, in their order.
"""

import dataclasses
import pathlib
from typing import Any

from mlembed_jax import typed
from mlembed_jax.errors import LoadError
from mlembed_jax.files import read_object, write_json
from mlembed_jax.typed import Count, Size

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
  hidden: Size
  layers_trained: Size
  layers: Size
  parameters: Size


@dataclasses.dataclass(frozen=True)
class AxisSizes:
  """The trained and the exported sizes of one axis, dimensions or layers."""

  trained: tuple[Size, ...]
  exported: Size


@dataclasses.dataclass(frozen=True)
class Table:
  """The token table."""

  form: str  # full, merged or uv, see Variant.table_form in config_files
  rank_trained: Size | None  # None: it was never factorised
  ranks: tuple[Size, ...]  # trained
  rank_exported: Size | None
  uv_file: str | None  # of the trained factors of a merged table


@dataclasses.dataclass(frozen=True)
class TrimmedVocabulary:
  """What is left of the vocabulary, and the texts that need it."""

  rows_trained: Size  # of the token table
  tokens: Size  # that are kept
  texts: tuple[str, ...]  # languages of training rows, and names of files; empty: all rows
  changed_share: float  # of a sample of these texts, is split into other pieces

  def said(self, rows: int, width: int, dtype: str) -> str:
    """Returns what a table of so many rows of numbers of `dtype` keeps, saves and changes."""
    saved = (self.rows_trained - rows) * width * {"bfloat16": 2, "float32": 4}[dtype]
    texts = ", ".join(self.texts) or "all training rows"
    return (
      f"{self.tokens:,} tokens, those that the texts of {texts} need; {rows:,} of "
      f"{self.rows_trained:,} rows, {saved / 1e6:,.1f} MB less. Of a sample of these texts "
      f"{self.changed_share:.2%} are split into other pieces than before; other texts may be split "
      "into smaller ones"
    )


@dataclasses.dataclass(frozen=True)
class Pooling:
  """Which state of a text is its embedding, and lengths of texts in tokens."""

  kind: str
  token: str  # ends every text
  token_id: Count
  trained_length: Size
  max_seq_length: Size


@dataclasses.dataclass(frozen=True)
class Training:
  """The run that the weights come from."""

  recipe: str
  step: Count
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
  prompt_template: str  # "": the prompts are those of the embedder that this is a copy of
  training: Training
  files: dict[str, Digest]  # all others of the folder
  ranges_file: str | None = None  # of the ranges of int8 vectors; folders of 0.1.0 have none
  onnx: str = ""  # precision of the weights in onnx/model.onnx; "": there is none
  gguf: tuple[str, ...] = ()  # GGUF files
  vocabulary: TrimmedVocabulary | None = None  # None: the whole vocabulary


def write(folder: pathlib.Path, content: OwnFile) -> None:
  """Writes mlembed.json, after every other file, as it holds their digests."""
  write_json(folder / NAME, {"format_version": FORMAT, **dataclasses.asdict(content)})


def read(folder: pathlib.Path) -> OwnFile | None:
  """Returns the content of the file, None where the folder has none or an empty object.

  Raises:
    LoadError: it is damaged, or a newer version of the package wrote it; the message names the
      field.
  """
  if not (value := _json_object(folder / NAME)):
    return None
  value.pop("format_version", None)
  try:
    own = typed.from_json(OwnFile, value)
    _check_sizes(own)
  except ValueError as error:
    raise LoadError(f"{folder / NAME}: {error}; export the folder again") from error
  return own


def _check_sizes(own: OwnFile) -> None:
  """Raises ValueError where a size is beyond that of the model, or sizes do not ascend."""
  body, table = own.body, own.table
  _check_ascending("dims.trained", own.dims.trained, body.hidden)
  _check_ascending("exits.trained", own.exits.trained, body.layers_trained)
  _check_ascending("table.ranks", table.ranks, table.rank_trained or 0)
  for name, size, most in (
    ("dims.exported", own.dims.exported, body.hidden),
    ("exits.exported", own.exits.exported, body.layers),
    ("body.layers", body.layers, body.layers_trained),
    ("table.rank_exported", table.rank_exported or 0, table.rank_trained or 0),
  ):
    if size > most:
      raise ValueError(f"{name} is {size}, but the model has {most}")


def _check_ascending(name: str, sizes: tuple[int, ...], most: int) -> None:
  if list(sizes) != sorted(set(sizes)) or any(size > most for size in sizes):
    raise ValueError(f"{name} is {list(sizes)}, expected ascending sizes of up to {most}")


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
  if not path.exists():
    return {}
  try:
    return read_object(path, FORMAT, LoadError)
  except LoadError as error:
    raise LoadError(f"{error}; export the folder again") from error
