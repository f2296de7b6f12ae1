"""The files that an entry of a manifest names: one, its shards, or a folder of `datasets`."""

from typing import Any

import fsspec

from mlembed_jax.data.manifest import File, open_input
from mlembed_jax.errors import DataError
from mlembed_jax.files import parse_json

STATE, SPLITS = "state.json", "dataset_dict.json"  # that save_to_disk writes into a folder


def paths_of(file: File) -> list[str]:
  """Returns the files that hold the rows of a file of a manifest, in the order of its rows.

  Those of a pattern with * are sorted by name, those of a folder stand as `save_to_disk` of Hugging
  Face datasets wrote them.

  Raises:
    DataError: a pattern matches nothing, or a folder is of another sort.
  """
  if "*" in file.path:
    return _matching(file)
  return _saved(file) if _is_folder(file.path) else [file.path]


def _matching(file: File) -> list[str]:
  inner, chain, outer = file.path.partition("::")  # zip://train-*.parquet::gs://archive
  if "*" in outer:
    raise DataError(f"{file.name}: {file.path}: * may stand before the first :: alone")
  filesystem, pattern = _opened(file.path)
  try:
    found = sorted(filesystem.glob(pattern))
  except Exception as error:  # each store has errors of its own
    raise DataError(f"{file.name}: {file.path} cannot be listed: {error}") from error
  if not found:
    raise DataError(f"{file.name}: {file.path} matches no file; * stands for any letters but /")
  named = map(str, found if "://" not in inner else map(filesystem.unstrip_protocol, found))
  return [name + chain + outer for name in named]


def _opened(path: str) -> tuple[Any, str]:
  try:
    return fsspec.core.url_to_fs(path)
  except FileNotFoundError as error:  # the archive that holds the file
    raise DataError(f"{path} does not exist") from error
  except (ImportError, ValueError) as error:  # a protocol without its package, or an unknown one
    raise DataError(f"{path}: {error}") from error
  except Exception as error:  # each store has errors of its own, as has an archive
    raise DataError(f"{path} cannot be read: {error}") from error


def _is_folder(path: str) -> bool:
  if path.startswith("http"):  # where whole files would be fetched to look for links in them
    return False
  filesystem, inner = _opened(path)
  try:
    return filesystem.isdir(inner)
  except Exception:  # of a store: `open_input` says what it is
    return False


def _saved(file: File) -> list[str]:
  """Returns the files of a folder that `save_to_disk` wrote."""
  folder = file.path.rstrip("/")
  filesystem, inner = _opened(folder)
  inner = inner.rstrip("/")
  if filesystem.exists(f"{inner}/{SPLITS}"):
    splits = _read(f"{folder}/{SPLITS}").get("splits", [])
    named = " or ".join(f"{folder}/{split}" for split in splits)
    raise DataError(f"{file.name}: {folder} holds several splits; give one as path: {named}")
  if not filesystem.exists(f"{inner}/{STATE}"):
    raise DataError(
      f"{file.name}: {folder} is a folder, and none of datasets.save_to_disk; name its files, as "
      f"in path: {folder}/*.parquet"
    )
  try:
    names = [shard["filename"] for shard in _read(f"{folder}/{STATE}")["_data_files"]]
    paths = [folder + "/" + name for name in names]
  except (KeyError, TypeError):
    paths = []
  if not paths:
    raise DataError(f"{file.name}: {folder}/{STATE} names no files; save the dataset again")
  return paths


def _read(path: str) -> dict[str, Any]:
  with open_input(path) as opened:
    found = parse_json(opened.read(), path, DataError)
  if not isinstance(found, dict):
    raise DataError(f"{path} holds no JSON object")
  return found
