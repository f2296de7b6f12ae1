"""What stands in the folder of a prepared dataset beside its records, and reading it.

  catalog.json          files, shards, runs of languages: all that training must know of the rows
  prepare_report.json   rows read, kept and dropped by reason, per file; documents; tokens
  tokenizer.json        a copy of the one that made the ids
  features.json, dataset_info.json            read by TensorFlow Datasets
  mlembed-{train,validation,documents}.array_record-*   the records
  mlembed-*.lengths.npy, mlembed-*.vectors.npy          token counts and a teacher's vectors, by row

catalog.json is written last: a folder that has it is complete.
"""

import dataclasses
import hashlib
import json
import pathlib
import tempfile
from typing import Any

from mlembed_jax import typed
from mlembed_jax.data import records
from mlembed_jax.data.manifest import File, check_entry
from mlembed_jax.data.records import TRAIN, VALIDATION
from mlembed_jax.data.transforms import RowShard, Written, suffixes
from mlembed_jax.errors import DataError
from mlembed_jax.files import read_json, write_json, write_text

VERSION = 1  # raise it when the same input would give other files
FILE = "catalog.json"


@dataclasses.dataclass(frozen=True)
class Recipe:
  """Everything that decides what a prepared folder holds."""

  files: list[File]
  inputs: dict[str, list[tuple[int, str]]]  # bytes and version of each file and its vectors
  tokenizer: str  # its fingerprint
  max_tokens: int
  partitions: int
  version: int = VERSION

  def as_json(self) -> dict[str, Any]:
    """Returns the recipe as JSON, without where the files lie, which may change."""
    entries = {f.name: {k: v for k, v in f.entry.items() if k != "path"} for f in self.files}
    return dataclasses.asdict(self) | {"files": entries}


@dataclasses.dataclass(frozen=True)
class Catalog:
  """An opened prepared folder."""

  folder: pathlib.Path
  files: dict[str, File]
  shards: dict[str, list[RowShard]]  # by split: train, validation
  documents: list[int]  # how many each shard has
  max_tokens: int  # that are stored of a text
  fingerprint: str  # of all records

  @property
  def tokenizer(self) -> pathlib.Path:
    """The file of the tokenizer that made the ids."""
    return self.folder / "tokenizer.json"

  def records(self, split: str) -> records.Records:
    """Returns random access to a split."""
    if split == records.DOCUMENTS:
      return records.Records(self.folder, split, self.documents)
    return records.Records(self.folder, split, [s.written.records for s in self.shards[split]])


def save(
  folder: pathlib.Path,
  recipe: Recipe,
  shards: dict[str, list[RowShard]],
  documents: list[Written],
) -> None:
  """Writes what TensorFlow Datasets reads, then catalog.json."""
  _write_metadata(
    folder,
    {split: [shard.written for shard in split_shards] for split, split_shards in shards.items()}
    | {records.DOCUMENTS: documents},
  )
  digests = [shard.written.digest for split_shards in shards.values() for shard in split_shards]
  digests += [written.digest for written in documents]
  value = {
    "plan": recipe.as_json(),
    "shards": {
      split: [dataclasses.asdict(s) for s in split_shards] for split, split_shards in shards.items()
    },
    "documents": [written.records for written in documents],
  }
  decides = recipe.as_json() | {"inputs": digests}  # what was in the files, not when
  value["fingerprint"] = hashlib.sha256(json.dumps(decides).encode()).hexdigest()
  write_json(folder / FILE, value)


def _write_metadata(folder: pathlib.Path, splits: dict[str, list[Written]]) -> None:
  import tensorflow_datasets as tfds

  template = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
  with tempfile.TemporaryDirectory() as name:
    temporary: Any = pathlib.Path(name)
    # TensorFlow Datasets cannot open a split without rows.
    filled = {
      split: split_shards
      for split, split_shards in splits.items()
      if any(shard.records for shard in split_shards)
    }
    for split, shards in filled.items():
      (temporary / records.file_name(split, 0, len(shards))).touch()  # it looks for such names
    infos = [
      tfds.core.SplitInfo(
        name=split,
        shard_lengths=[shard.records for shard in shards],
        num_bytes=sum(shard.size for shard in shards),
        filename_template=tfds.core.ShardedFileTemplate(
          data_dir=temporary,
          dataset_name=records.NAME,
          split=split,
          filetype_suffix="array_record",
          template=template,
        ),
      )
      for split, shards in filled.items()
    ]
    tfds.folder_dataset.write_metadata(
      data_dir=temporary,
      features=records.features(),
      split_infos=infos,
      check_data=False,
      filename_template=template,
    )
    for path in temporary.glob("*.json"):
      write_text(folder / path.name, path.read_text(encoding="utf-8"))


def read_catalog(folder: pathlib.Path) -> dict[str, Any] | None:
  """Returns catalog.json, None where the folder has none.

  Raises:
    DataError: it is not what this version writes.
  """
  path = folder / FILE
  if not path.is_file():
    return None
  value = read_json(path, path, DataError)
  try:
    version = value["plan"]["version"]
  except (KeyError, TypeError) as error:
    raise _damaged(path, error) from error
  if version != VERSION:
    raise DataError(
      f"{folder} was prepared by another version ({version}, this is {VERSION}); prepare it again"
    )
  return value


def load_catalog(folder: pathlib.Path) -> Catalog:
  """Returns the opened folder.

  Raises:
    DataError: it is no finished dataset of this version, or one of its files is missing.
  """
  if (value := read_catalog(folder)) is None:
    raise DataError(
      f"data.dataset: {folder} is no prepared dataset; write one with "
      "python -m mlembed_jax.prepare --manifest FILE --tokenizer FILE --out DIR"
    )
  try:
    catalog = _opened(folder, value)
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise _damaged(folder / FILE, error) from error
  _check_files(catalog)
  return catalog


def _damaged(path: pathlib.Path, reason: Any) -> DataError:
  return DataError(f"{path} is damaged: {reason}; prepare the dataset again")


def _opened(folder: pathlib.Path, value: dict[str, Any]) -> Catalog:
  path, content = str(folder / FILE), typed.from_json(_Content, value)
  files = {
    name: File(name, check_entry(path, name, entry), "")
    for name, entry in content.plan["files"].items()
  }
  if unknown := {s.file for of in content.shards.values() for s in of} - files.keys():
    raise ValueError(f"a shard is of {sorted(unknown)[0]}, which is none of its files")
  if {TRAIN, VALIDATION} - content.shards.keys():
    raise ValueError("a split is missing")
  tokens = content.plan["max_tokens"]
  if type(tokens) is not int or tokens < 1:
    raise ValueError("plan.max_tokens is no count")
  return Catalog(folder, files, content.shards, content.documents, tokens, content.fingerprint)


@dataclasses.dataclass(frozen=True)
class _Content:
  """The content of catalog.json."""

  plan: dict[str, Any]
  shards: dict[str, list[RowShard]]  # by split
  documents: list[typed.Count]
  fingerprint: str


def _check_files(catalog: Catalog) -> None:
  counts = {split: len(split_shards) for split, split_shards in catalog.shards.items()}
  counts[records.DOCUMENTS] = len(catalog.documents)
  there = {path.name for path in catalog.folder.iterdir()}
  names = [records.file_name(split, i, n) for split, n in counts.items() for i in range(n)]
  for split, shards in catalog.shards.items():
    for i, shard in enumerate(shards):
      beside = suffixes(catalog.files[shard.file])[1:]
      names += [records.file_name(split, i, len(shards)) + suffix for suffix in beside]
  if missing := [name for name in ["tokenizer.json", *names] if name not in there]:
    raise DataError(
      f"{catalog.folder}: {missing[0]} is missing ({len(missing)} files in all); copy the whole "
      "folder, or delete it and prepare the dataset again"
    )
