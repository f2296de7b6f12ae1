"""Writing files and folders so that none is ever half written. No jax."""

import contextlib
import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import safetensors.numpy

from mlembed_jax.errors import ConfigError, MlembedError


def make_writable_folder(path: str | os.PathLike[str], flag: str) -> pathlib.Path:
  """Returns the folder that a flag names, made if needed.

  Raises:
    ConfigError: it is a URL, or cannot be made or written to.
  """
  if "://" in str(path):  # it would be taken for a folder below this one
    raise ConfigError(f"{flag}: {path} is not a path; mount the bucket, for example by gcsfuse")
  workdir = pathlib.Path(path).absolute()
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    probe = workdir / f".write_test_{os.getpid()}"
    probe.touch()
    probe.unlink(missing_ok=True)  # in containers all processes may have one number
  except OSError as error:
    raise ConfigError(f"{flag}: {path} is not writable: {error.strerror}") from error
  return workdir


def check_format(
  path: pathlib.Path, found: Any, newest: int, error: type[MlembedError] = ConfigError
) -> None:
  """Raises `error` where a file has a `format_version` that this code does not know.

  Args:
    path: the file that is read.
    found: its `format_version`; None in files that were written before there was one.
    newest: the newest version that this code reads.
    error: the class of the error, that of the reader.
  """
  if found is None or (type(found) is int and 1 <= found <= newest):
    return
  raise error(
    f"{path}: format_version {found!r} is none that this mlembed_jax reads (1 to {newest}); if a "
    "newer one wrote the file, upgrade mlembed_jax"
  )


def read_object(
  path: pathlib.Path, newest: int, error: type[MlembedError] = ConfigError
) -> dict[str, Any]:
  """Returns the object that a JSON file holds.

  Args:
    path: the file, which is there.
    newest: the newest `format_version` that this code reads.
    error: the class of the errors, that of the reader.

  Raises:
    error: it is no JSON object, or of a format that this code does not know.
  """
  try:
    value = json.loads(path.read_text(encoding="utf-8"))
  except ValueError as cause:
    raise error(f"{path}: {cause}") from cause
  if not isinstance(value, dict):
    raise error(f"{path}: no JSON object")
  check_format(path, value.get("format_version"), newest, error)
  return value


def digest(path: pathlib.Path) -> str:
  """Returns the SHA-256 of a file's content in hexadecimal."""
  with path.open("rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def new_file(path: pathlib.Path) -> Iterator[pathlib.Path]:
  """Yields a temporary path that is renamed to `path` at the end, unless there is an error.

  So readers see all of a file or nothing.
  """
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_name(f".{path.name}.{os.getpid()}")
  try:
    yield temporary
    temporary.replace(path)
  finally:
    temporary.unlink(missing_ok=True)


def write_text(path: pathlib.Path, text: str) -> None:
  """Writes UTF-8 text so that readers see all of the file or nothing, see `new_file`."""
  with new_file(path) as new:
    new.write_text(text, encoding="utf-8")


def write_json(path: pathlib.Path, value: Any) -> None:
  """Writes a value as JSON so that readers see all of the file or nothing, see `new_file`."""
  write_text(path, json.dumps(value, ensure_ascii=False, indent=1) + "\n")


def write_safetensors(path: pathlib.Path, tensors: Mapping[str, np.ndarray]) -> None:
  """Writes a safetensors file so that readers see all of it or nothing, see `new_file`.

  Arrays may lie in memory in any order. safetensors 0.8 copies their memory as it lies under a
  row-major shape, without a word (its issue 825); and what a device gave is often laid out by
  columns, which `numpy.asarray` keeps.
  """
  rows = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
  with new_file(path) as new:
    safetensors.numpy.save_file(rows, new, metadata={"format": "pt"})


def copy_file(source: pathlib.Path, target: pathlib.Path) -> None:
  """Copies a file so that readers of `target` see all of it or nothing.

  Nothing is done where both paths are one file.
  """
  if target.exists() and target.samefile(source):
    return
  with new_file(target) as new:
    shutil.copyfile(source, new)


def replace_folder(new: pathlib.Path, target: pathlib.Path) -> None:
  """Puts the complete folder `new` at `target`; what stood there is removed after that."""
  old = new.with_name(new.name + ".old")
  shutil.rmtree(old, ignore_errors=True)
  if target.exists():
    target.rename(old)
  try:
    new.rename(target)
  except OSError:
    if old.exists():
      old.rename(target)
    raise
  shutil.rmtree(old, ignore_errors=True)
