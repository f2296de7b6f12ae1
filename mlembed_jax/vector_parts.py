"""Arrays in files whose names have digests of their origin and bytes, for commands that go on."""

import contextlib
import fcntl
import hashlib
import pathlib
import re
import shutil
import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

import numpy as np

from mlembed_jax.errors import ConfigError
from mlembed_jax.files import digest, save_npy

Item = TypeVar("Item")

DIGITS = 24  # of a digest in a name
LOCK = "lock"
# What stands in a folder of parts: arrays, those that are being written, the lock.
OF_PARTS = re.compile(rf"{LOCK}|(?:ranges|\d{{8}})-[0-9a-f]{{{DIGITS}}}(?:\.new|(?:-\w+)?\.npy)")


def parts_of(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
  """Yields lists of `size` items; the last one may be shorter."""
  part: list[Item] = []
  for item in items:
    part.append(item)
    if len(part) == size:
      yield part
      part = []
  if part:
    yield part


class Parts:
  """The folder OUT.parts: arrays in files whose names have digests of their origin and bytes."""

  def __init__(self, out: pathlib.Path):
    """Takes the parts of `out`; raises ConfigError where the folder holds anything else."""
    self.folder = out.with_name(out.name + ".parts")
    if self.folder.exists() and not self.folder.is_dir():
      raise ConfigError(f"--out: {self.folder} is a file; remove it, or choose another name")
    names = [path.name for path in self.folder.glob("*")]
    if others := [name for name in names if not OF_PARTS.fullmatch(name)]:
      raise ConfigError(
        f"--out: {self.folder}, which is removed at the end, holds {others[0]}, which is no "
        "part of vectors; choose another name"
      )
    self._there: dict[str, pathlib.Path] = {}

  @contextlib.contextmanager
  def held(self) -> Iterator[None]:
    """Keeps other commands out of the folder; raises ConfigError where one is at work there."""
    self.folder.mkdir(exist_ok=True)
    with (self.folder / LOCK).open("w") as lock:
      try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # a killed process holds it no more
      except BlockingIOError as error:
        raise ConfigError(
          f"--out: another command is writing {self.folder}; wait for it"
        ) from error
      self._there = {path.stem.rpartition("-")[0]: path for path in self.folder.glob("*.npy")}
      try:
        yield
      finally:
        if not any(self.folder.glob("*.npy")):
          shutil.rmtree(self.folder, ignore_errors=True)

  def find(self, name: str) -> pathlib.Path | None:
    """Returns the file of an array that an earlier run wrote; a damaged one is removed."""
    path = self._there.get(name)
    if path is None:
      return None
    if digest(path).startswith(path.stem.rpartition("-")[2]):
      return path
    print(f"{path} is damaged; its texts are encoded again", file=sys.stderr, flush=True)
    path.unlink()
    return None

  def save(self, name: str, array: np.ndarray) -> pathlib.Path:
    """Writes an array; returns its file."""
    temporary = self.folder / f"{name}.new"
    save_npy(temporary, array)
    return temporary.rename(self.folder / f"{name}-{digest(temporary)[:DIGITS]}.npy")


def digest_of_texts(*texts: str) -> str:
  """Returns a digest of texts in their order, for the name of a part."""
  found = hashlib.sha256()
  for text in texts:
    found.update(f"{len(text)} {text}".encode("utf-8", "surrogatepass"))
  return found.hexdigest()[:DIGITS]
