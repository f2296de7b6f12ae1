"""Writing files and folders so that none is ever half written. No jax."""

import concurrent.futures
import contextlib
import errno
import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

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
    error: it is no JSON object, of a format that this code does not know, or not what
      `write_object` wrote.
  """
  try:
    value = json.loads(path.read_text(encoding="utf-8"))
  except ValueError as cause:
    raise error(f"{path}: {cause}") from cause
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


def storage_message(path: pathlib.Path, error: OSError) -> str:
  """Returns one sentence about a path that cannot be read or written."""
  named = pathlib.Path(error.filename) if isinstance(error.filename, str) else path
  there = next((folder for folder in [named, *named.parents] if folder.exists()), pathlib.Path("/"))
  free = shutil.disk_usage(there).free / 1e9
  room = f" ({free:,.2f} GB are free)" if error.errno in FULL else ""
  remedy = STORAGE.get(error.errno or 0, "look at the disk")
  return f"{named}: {error.strerror}{room}; {remedy}, then run the same command again"


def write_text(path: pathlib.Path, text: str) -> None:
  """Writes UTF-8 text so that readers see all of the file or nothing, see `new_file`."""
  with new_file(path) as new:
    new.write_text(text, encoding="utf-8")


def write_json(path: pathlib.Path, value: Any) -> None:
  """Writes a value as JSON so that readers see all of the file or nothing, see `new_file`."""
  write_text(path, json.dumps(value, ensure_ascii=False, indent=1) + "\n")


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
