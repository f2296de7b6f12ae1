"""Writing files and folders so that none is ever half written. No jax."""

import collections
import concurrent.futures
import contextlib
import errno
import hashlib
import itertools
import json
import os
import pathlib
import re
import shutil
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

import numpy as np
import safetensors
import safetensors.numpy

from mlembed_jax.errors import ConfigError, MlembedError, StorageError

SEAL = "sha256"  # field of a JSON object that holds the digest of the others

DIGEST_THREADS = 8
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# What a person can do about a fault of the storage; every other OSError is a fault of the program.
STORAGE = {
  **dict.fromkeys(FULL, "free space or raise the quota"),
  errno.EROFS: "mount it for writing, or choose another folder",
  **dict.fromkeys((errno.EACCES, errno.EPERM), "give this user the right to it"),
  **dict.fromkeys(
    (errno.ENOENT, errno.ENOTDIR, errno.ESTALE, errno.ENODEV, errno.ENOTCONN),
    "bring the folder back, for example by mounting it again",
  ),
  **dict.fromkeys((errno.EIO, errno.ETIMEDOUT), "check the disk or the network"),
}

MOST_NESTED = 100  # levels of JSON; ours have 6, Python's own functions fail at about 1,000


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
    probe(workdir)
  except OSError as error:
    why = "it is a file" if workdir.is_file() else error.strerror
    raise ConfigError(f"{flag}: {path} is not writable: {why}") from error
  return workdir


def probe(folder: pathlib.Path) -> None:
  """Raises OSError where nothing can be written into a folder."""
  file = folder / f".write_test_{os.getpid()}"
  file.touch()
  file.unlink(missing_ok=True)  # in containers all processes may have one number


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


def read_json(path: pathlib.Path, where: Any, error: type[MlembedError] = ConfigError) -> Any:
  """Returns the value that a JSON file holds; raises `error` as `parse_json`, or without a file."""
  try:
    if not path.is_file():  # a pipe would be waited for
      raise FileNotFoundError("there is no such file")
    text = path.read_bytes()
  except OSError as cause:
    raise error(f"{where} cannot be read: {cause}") from cause
  return parse_json(text, where, error)


def parse_json(text: str | bytes, where: Any, error: type[MlembedError] = ConfigError) -> Any:
  """Returns the value of a JSON text, which may come from a stranger.

  Args:
    text: the JSON; bytes are UTF-8.
    where: begins the message: the file, and what else says where the text stands.
    error: the class of the errors, that of the reader.

  Raises:
    error: it is no JSON, is nested deeper than 100 levels, has a name twice in an object, or half a
      surrogate pair, which no text holds.
  """
  try:
    text = text.decode() if isinstance(text, bytes) else text
    value = json.loads(text, object_pairs_hook=once)
    if "\\ud" in text.lower():  # all but valid pairs fail
      json.dumps(value, ensure_ascii=False).encode()
  except RecursionError as cause:
    raise error(f"{where}: nested without end") from cause
  except (json.JSONDecodeError, UnicodeDecodeError) as cause:
    raise error(f"{where} is not JSON: {cause}") from cause
  except ValueError as cause:
    raise error(f"{where}: {cause}") from cause
  if _is_deep(value):
    raise error(f"{where}: nested deeper than {MOST_NESTED} levels")
  return value


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  """Returns the pairs of a JSON object, which would else lose one of two equal names.

  Raises:
    ValueError: a name stands there twice.
  """
  found = dict(pairs)
  if len(found) < len(pairs):
    names = collections.Counter(name for name, _ in pairs)
    raise ValueError(f"{names.most_common(1)[0][0]!r} stands there twice; keep one")
  return found


def _is_deep(value: Any) -> bool:
  """Returns whether a value is nested so deep that those who walk through it may not come back."""
  level = [value]
  for _ in range(MOST_NESTED):
    inner = (v.values() if isinstance(v, dict) else v for v in level if isinstance(v, dict | list))
    level = list(itertools.chain.from_iterable(inner))
  return bool(level)


def read_object(
  path: pathlib.Path, newest: int, error: type[MlembedError] = ConfigError
) -> dict[str, Any]:
  """Returns the object that a JSON file holds.

  Args:
    path: the file, which is there.
    newest: the newest `format_version` that this code reads.
    error: the class of the errors, that of the reader.

  Raises:
    error: it is no JSON object, of a format that this code does not know, or not what
      `write_object` wrote.
  """
  value = read_json(path, path, error)
  if not isinstance(value, dict):
    raise error(f"{path}: no JSON object")
  check_format(path, value.get("format_version"), newest, error)
  if value.pop(SEAL, (seal := _seal(value))) != seal:  # absent in files of earlier versions
    raise error(
      f"{path} is not what was written: its {SEAL} is that of other content. Restore it from a "
      f"copy; after a change by hand, delete the field {SEAL}"
    )
  return value


def write_object(path: pathlib.Path, value: dict[str, Any]) -> None:
  """Writes a JSON object with a digest of its content, which `read_object` checks."""
  plain = json.loads(json.dumps(value))  # as it will be read
  write_json(path, plain | {SEAL: _seal(plain)})


def _seal(value: dict[str, Any]) -> str:
  rest = {name: field for name, field in value.items() if name != SEAL}
  return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def digest(path: pathlib.Path) -> str:
  """Returns the SHA-256 of a file's content in hexadecimal."""
  with path.open("rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def new_file(path: pathlib.Path) -> Iterator[pathlib.Path]:
  """Yields a temporary path that is renamed to `path` at the end, unless there is an error.

  So readers see all of a file or nothing.

  Raises:
    StorageError: the file cannot be written; what stood there still does.
  """
  temporary = path.with_name(f".{path.name}.{os.getpid()}")
  with storage_errors(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
      yield temporary
      temporary.replace(path)
    finally:
      with contextlib.suppress(OSError):
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def storage_errors(path: pathlib.Path) -> Iterator[None]:
  """Turns an OSError of the system into a StorageError that names the path and what to do."""
  try:
    yield
  except StorageError:
    raise
  except OSError as error:
    if error.errno not in STORAGE:
      raise
    raise StorageError(storage_message(path, error)) from error


def storage_message(path: pathlib.Path | None, error: OSError) -> str:
  """Returns one sentence about what cannot be read or written; None: only the error may name it."""
  named = pathlib.Path(error.filename) if isinstance(error.filename, str) else path
  free = _free_bytes(named) if named and error.errno in FULL else None
  room = "" if free is None else f" ({readable_size(free)} are free)"
  remedy = STORAGE.get(error.errno or 0, "look at the disk")
  return f"{named or 'a file'}: {error.strerror}{room}; {remedy}, then run the same command again"


def readable_size(count: int) -> str:
  """Returns so many bytes in the unit that people read, such as "96.31 GB" or "0.12 MB"."""
  return f"{count / 1e9:,.2f} GB" if count >= 1e8 else f"{count / 1e6:,.2f} MB"


def _free_bytes(path: pathlib.Path) -> int | None:
  """Returns what is free where a path is or would be, None where the system does not say."""
  for folder in [path, *path.parents]:
    with contextlib.suppress(OSError):  # not there, or a mount that is gone, or a right that lacks
      return shutil.disk_usage(folder).free
  return None


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
    try:
      safetensors.numpy.save_file(rows, new, metadata={"format": "pt"})
    except safetensors.SafetensorError as error:
      raise _as_os_error(error) from error


def _as_os_error(error: safetensors.SafetensorError) -> Exception:
  """Returns the error of the system that safetensors hides in a message, else the error itself."""
  number = re.search(r"\(os error (\d+)\)", str(error))
  return OSError(int(number[1]), os.strerror(int(number[1]))) if number else error


def save_npy(path: pathlib.Path, array: np.ndarray) -> None:
  """Writes an array as .npy to a path that is renamed by the caller.

  Into an open file numpy writes by itself, and its error on a full disk does not say which it is.

  Raises:
    StorageError: it cannot be written.
  """
  with storage_errors(path), path.open("wb") as file:
    np.save(_Written(file), array)


class _Written:
  """No more of a file than its `write`."""

  def __init__(self, file: BinaryIO):
    self._file = file

  def write(self, data: bytes, /) -> int:
    return self._file.write(data)


def copy_file(source: pathlib.Path, target: pathlib.Path) -> None:
  """Copies a file so that readers of `target` see all of it or nothing.

  Nothing is done where both paths are one file.
  """
  if target.exists() and target.samefile(source):
    return
  with new_file(target) as new:
    shutil.copyfile(source, new)


def digests(folder: pathlib.Path) -> dict[str, str]:
  """Returns the digest of every file below a folder by its relative path, see `digest`."""
  paths = sorted(path for path in folder.rglob("*") if path.is_file())
  with concurrent.futures.ThreadPoolExecutor(DIGEST_THREADS) as threads:  # hashing frees Python
    return {
      path.relative_to(folder).as_posix(): found
      for path, found in zip(paths, threads.map(digest, paths), strict=True)
    }


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
