"""What stands in the folder of a prepared dataset beside its records, and reading it.

  catalog.json          files, shards, runs of languages: all that training must know of the rows
  prepare_report.json   rows read, kept and dropped by reason, per file; documents; tokens
  tokenizer.json        a copy of the one that made the ids
  features.json, dataset_info.json            read by TensorFlow Datasets
  mlembed-{train,validation,documents}.array_record-*   the records
  mlembed-*.lengths.npy, mlembed-*.vectors.npy          token counts and a teacher's vectors, by row
  mlembed-*.vectors.npy.crc32.npy                       checksums of the vectors, by row

catalog.json is written last: a folder that has it is complete. It holds size and digest of all
other files, and a digest of itself.
"""

import dataclasses
import hashlib
import json
import pathlib
import sys
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

from mlembed_jax import typed
from mlembed_jax.data import records
from mlembed_jax.data.file_digests import FileDigest, digest_of, problem, problems
from mlembed_jax.data.manifest import File, check_entry
from mlembed_jax.data.names import (
  CATALOG,
  CHECKSUMS,
  DATASET,
  METADATA,
  TOKENIZER,
  VECTORS,
  names_of_rows,
  shard_name,
)
from mlembed_jax.data.transforms import LanguageRun, Made, RowShard, Written
from mlembed_jax.errors import DataError
from mlembed_jax.files import read_object, write_object, write_text

VERSION = 1  # raise it when the same input would give other files
FORMAT = 1  # of catalog.json
FIRST_KEYS = {"plan", "shards", "documents", "fingerprint"}  # all that 0.1.0 wrote
KEYS = FIRST_KEYS | {"files", "cut_texts"}
REMEDY = "delete the folder and prepare the dataset again"


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
  digests: dict[str, FileDigest]  # of all files; {} where an earlier version prepared the folder

  @property
  def tokenizer(self) -> pathlib.Path:
    """The file of the tokenizer that made the ids."""
    return self.folder / TOKENIZER

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
  digests: Mapping[str, FileDigest],
  cut: Mapping[str, int],
) -> None:
  """Writes what TensorFlow Datasets reads, then catalog.json.

  Args:
    folder: of the dataset.
    recipe: what decides it.
    shards: of rows, by split.
    documents: the shards of documents.
    digests: of all files that are there already.
    cut: how many texts of a shard are not stored whole, by its name; others have none.
  """
  _write_metadata(
    folder,
    {split: [shard.written for shard in split_shards] for split, split_shards in shards.items()}
    | {records.DOCUMENTS: documents},
  )
  digests = {**digests, **{name: digest_of(folder / name) for name in METADATA}}
  value: dict[str, Any] = {
    "plan": recipe.as_json(),
    "shards": {
      split: [dataclasses.asdict(s) for s in split_shards] for split, split_shards in shards.items()
    },
    "documents": [written.records for written in documents],
    "files": {name: dataclasses.asdict(digests[name]) for name in sorted(digests)},
    "cut_texts": dict(sorted(cut.items())),
  }
  value["fingerprint"] = fingerprint(recipe, shards, documents)
  write_object(folder / CATALOG, value)


def fingerprint(
  recipe: Recipe, shards: Mapping[str, Sequence[RowShard]], documents: Sequence[Written]
) -> str:
  """Returns a hash of all records and of what decides them."""
  digests = [shard.written.digest for split_shards in shards.values() for shard in split_shards]
  digests += [written.digest for written in documents]
  decides = recipe.as_json() | {"inputs": digests}  # what was in the files, not when
  return hashlib.sha256(json.dumps(decides).encode()).hexdigest()


def cut_of(documents: Sequence[Made], rows: Sequence[Made]) -> dict[str, int]:
  """Returns how many texts of each shard are not stored whole, by its name; without zeros."""
  return {
    shard_name(split, i, len(parts)): made.cut
    for split, parts in ((records.DOCUMENTS, documents), (records.TRAIN, rows))
    for i, made in enumerate(parts)
    if made.cut
  }


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
      (temporary / shard_name(split, 0, len(shards))).touch()  # it looks for such names
    infos = [
      tfds.core.SplitInfo(
        name=split,
        shard_lengths=[shard.records for shard in shards],
        num_bytes=sum(shard.size for shard in shards),
        filename_template=tfds.core.ShardedFileTemplate(
          data_dir=temporary,
          dataset_name=DATASET,
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
  path = folder / CATALOG
  if not path.is_file():
    return None
  try:
    value = read_object(path, FORMAT, DataError)
  except DataError as error:
    raise DataError(f"{error}. If it cannot be mended, {REMEDY}") from error
  try:
    version = value["plan"]["version"]
  except (KeyError, TypeError) as error:
    raise _damaged(path, error) from error
  if version != VERSION:
    raise DataError(
      f"{folder} was prepared by another version ({version}, this is {VERSION}); prepare it again"
    )
  # With a damaged name, the digest of the content would be one field more, and not be compared.
  if value.keys() not in (FIRST_KEYS, KEYS):
    raise _damaged(path, f"its fields are {', '.join(value)}")
  return value


def _damaged(path: pathlib.Path, reason: Any) -> DataError:
  return DataError(f"{path} is damaged: {reason}; restore it, or {REMEDY}")


def digests_of(value: dict[str, Any]) -> dict[str, FileDigest]:
  """Returns the digests of the files of a catalog.json; {} where an earlier version wrote it."""
  return {name: FileDigest(**digest) for name, digest in value.get("files", {}).items()}


def load_catalog(folder: pathlib.Path) -> Catalog:
  """Returns the opened folder.

  Raises:
    DataError: it is no finished dataset of this version, or one of its files is missing, of another
      size than was written or, in the case of the tokenizer, damaged.
  """
  if (value := read_catalog(folder)) is None:
    raise DataError(
      f"data.dataset: {folder} is no prepared dataset; write one with "
      "python -m mlembed_jax.prepare --manifest FILE --tokenizer FILE --out DIR"
    )
  catalog = opened(folder, value)
  _check_files(catalog)
  return catalog


def opened(folder: pathlib.Path, value: dict[str, Any]) -> Catalog:
  """Returns the folder with what its catalog.json says, without looking at its other files."""
  path = folder / CATALOG
  try:
    content = typed.from_json(_Content, value)
    files = {
      name: File(name, check_entry(str(path), name, entry), "")
      for name, entry in content.plan["files"].items()
    }
    _check_content(content, files)
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise _damaged(path, error) from error
  return Catalog(
    folder,
    files,
    content.shards,
    content.documents,
    content.plan["max_tokens"],
    content.fingerprint,
    content.files,
  )


@dataclasses.dataclass(frozen=True)
class _Content:
  """The content of catalog.json."""

  plan: dict[str, Any]
  shards: dict[str, list[RowShard]]  # by split
  documents: list[typed.Count]
  fingerprint: str
  files: dict[str, FileDigest] = dataclasses.field(default_factory=dict)
  cut_texts: dict[str, typed.Count] = dataclasses.field(default_factory=dict)


def _check_content(content: _Content, files: Mapping[str, File]) -> None:
  """Raises ValueError where parts of a catalog do not belong together."""
  if unknown := {s.file for of in content.shards.values() for s in of} - files.keys():
    raise ValueError(f"a shard is of {sorted(unknown)[0]}, which is none of its files")
  if {records.TRAIN, records.VALIDATION} - content.shards.keys():
    raise ValueError("a split is missing")
  tokens = content.plan["max_tokens"]
  if type(tokens) is not int or tokens < 1:
    raise ValueError("plan.max_tokens is no count")


def row_shard(value: dict[str, Any]) -> RowShard:
  """Returns a shard of rows as catalog.json describes it."""
  runs = [LanguageRun(**run) for run in value["runs"]]
  return RowShard(value["file"], Written(**value["written"]), value["longest"], runs)


def expected_names(catalog: Catalog) -> list[str]:
  """Returns the names of all files that training reads.

  Earlier versions wrote no checksums of vectors; these are expected where the catalog lists them.
  """
  documents = len(catalog.documents)
  names = [TOKENIZER, *(shard_name(records.DOCUMENTS, i, documents) for i in range(documents))]
  for split, split_shards in catalog.shards.items():
    for i, shard in enumerate(split_shards):
      names += names_of_rows(catalog.files[shard.file], split, i, len(split_shards))
  return [name for name in names if not name.endswith(CHECKSUMS) or name in catalog.digests]


def _check_files(catalog: Catalog) -> None:
  there = {path.name for path in catalog.folder.iterdir()}
  names = expected_names(catalog)
  wrong = {name: "is missing" for name in names if name not in there}
  if catalog.digests:
    if unknown := sorted(set(names) - set(catalog.digests)):
      raise _damaged(catalog.folder / CATALOG, f"it does not list {unknown[0]}")
    wrong |= problems(catalog.folder, {name: catalog.digests[name] for name in names}, quick=True)
    if damaged := problem(catalog.tokenizer, catalog.digests[TOKENIZER]):
      wrong[TOKENIZER] = damaged
  elif not wrong:
    print(f"note: {unchecked(catalog.folder)}", file=sys.stderr)
  if not wrong and missing_checksums(catalog.digests):
    print(
      f"note: {catalog.folder} was prepared by an earlier version, which kept no checksums of a "
      "teacher's vectors; damaged bytes of them may not be noticed, until the command that "
      "prepared it is run again and writes them",
      file=sys.stderr,
    )
  if wrong:
    raise DataError(
      f"{catalog.folder}: {described(wrong)}; copy the whole folder again, or run the command that "
      "prepared it: it writes what is missing or damaged"
    )


def described(wrong: Mapping[str, str]) -> str:
  """Returns what is wrong with the first file, and how many there are."""
  name, what = next(iter(wrong.items()))
  return f"{name} {what}" + (f" ({len(wrong)} files in all)" if len(wrong) > 1 else "")


def unchecked(folder: pathlib.Path) -> str:
  """Returns what is to be said of a folder that 0.1.0 prepared."""
  return (
    f"{folder} was prepared by an earlier version, which kept no digests; damaged bytes of its "
    "files may not be noticed"
  )


def missing_checksums(digests: Mapping[str, FileDigest]) -> list[str]:
  """Returns the names of the checksums that an earlier version did not write beside vectors."""
  names = [name + CHECKSUMS for name in digests if name.endswith(VECTORS)]
  return [name for name in names if name not in digests]
