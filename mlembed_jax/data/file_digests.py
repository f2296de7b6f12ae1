"""Size and digest of the files of a folder, kept as they are written and compared later."""

import contextlib
import dataclasses
import pathlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

from mlembed_jax.files import digest

NewFile = Callable[[str], contextlib.AbstractContextManager[pathlib.Path]]


@dataclasses.dataclass(frozen=True)
class FileDigest:
  """What a file held when it was written."""

  size: int  # in bytes
  sha256: str


def digest_of(path: pathlib.Path) -> FileDigest:
  """Returns size and digest of a file as it is now."""
  return FileDigest(path.stat().st_size, digest(path))


def recorded(new_file: NewFile, digests: dict[str, FileDigest]) -> NewFile:
  """Returns what opens new files as `new_file` does and puts their digests into `digests`."""

  @contextlib.contextmanager
  def opened(name: str) -> Iterator[pathlib.Path]:
    with new_file(name) as path:
      yield path
      digests[name] = digest_of(path)

  return opened


def problem(path: pathlib.Path, expected: FileDigest, *, quick: bool = False) -> str:
  """Returns what is wrong with a file, empty where nothing is; `quick`: without reading it."""
  if not path.is_file():
    return "is missing"
  if (size := path.stat().st_size) != expected.size:
    return f"has {size:,} bytes, {expected.size:,} were written"
  if not quick and digest(path) != expected.sha256:
    return "is damaged: its bytes are not those that were written"
  return ""


def problems(
  folder: pathlib.Path, digests: Mapping[str, FileDigest], *, quick: bool = False, threads: int = 1
) -> dict[str, str]:
  """Returns {name: what is wrong} of the files of a folder that are not as they were written."""
  with ThreadPoolExecutor(threads) as pool:  # digests are computed without Python's lock
    found = pool.map(lambda name: problem(folder / name, digests[name], quick=quick), digests)
    return {name: wrong for name, wrong in zip(digests, found, strict=True) if wrong}
