"""Puts exported folders on the Hugging Face Hub."""

import contextlib
import pathlib
from collections.abc import Iterator
from typing import Any

from mlembed_jax.errors import ExportError
from mlembed_jax.files import readable_size
from mlembed_jax.hf import own_file
from mlembed_jax.hf.extras import require
from mlembed_jax.hf.folder import HUB

OF_EVERY_REPOSITORY = {".gitattributes"}
LOGIN = "log in by `hf auth login`, or set HF_TOKEN"


def repository(target: str, suffix: str = "") -> str:
  """Returns ORG/NAME of hf:ORG/NAME, with the suffix of a variant.

  Raises:
    ExportError: the target is of another form, the Hub allows no such name, or the package
      huggingface_hub is not installed.
  """
  if not target.startswith(HUB) or target.count("/") != 1:
    raise ExportError(f"push: {target!r} is no repository; write {HUB}ORG/NAME")
  name = target.removeprefix(HUB) + suffix
  try:
    require("huggingface_hub.utils", "hub").validate_repo_id(name)
  except ValueError as error:
    raise ExportError(f"push: {name}: {error}") from error
  return name


def check(name: str) -> None:
  """Raises ExportError where the Hub gives no answer, nobody is logged in, or the name is taken."""
  hub = _hub()
  with _told(name):
    api = hub.HfApi()
    api.whoami()
    if not api.repo_exists(name):
      return
    there = set(api.list_repo_files(name)) - OF_EVERY_REPOSITORY
  if there and own_file.NAME not in there:
    raise ExportError(f"push: {name} holds something else than an export; choose another name")


def listing(folder: pathlib.Path, name: str) -> str:
  """Returns what would be put into a repository, a line for each file."""
  files = sorted(path for path in folder.rglob("*") if path.is_file())
  sizes = [(path.relative_to(folder).as_posix(), path.stat().st_size) for path in files]
  lines = [f"  {readable_size(size):>12}  {file}" for file, size in sizes]
  total = readable_size(sum(size for _, size in sizes))
  return "\n".join([f"{HUB}{name}, {len(sizes)} files, {total}:", *lines])


def push(folder: pathlib.Path, name: str, private: bool) -> str:
  """Puts a folder into a repository, which is made if it is not there; returns its address.

  Files of an earlier export that this one lacks are removed, in the same commit.

  Raises:
    ExportError: the Hub refuses it or cannot be reached; the folder stays, and the same command
      goes on.
  """
  own = own_file.read(folder)
  message = (
    f"Step {own.training.step}, exported by mlembed_jax {own.library.version}" if own else ""
  )
  with _told(name):
    api = _hub().HfApi()
    api.create_repo(name, private=private, exist_ok=True)
    api.upload_folder(
      repo_id=name,
      folder_path=folder,
      commit_message=message or None,
      delete_patterns="*",
    )
  return f"https://huggingface.co/{name}"


def _hub() -> Any:
  return require("huggingface_hub", "hub")


@contextlib.contextmanager
def _told(name: str) -> Iterator[None]:
  """Turns the errors of the Hub, of its client and of the network into one sentence."""
  try:
    yield
  except ExportError:
    raise
  except Exception as error:
    said = next(iter(str(error).splitlines()), "") or type(error).__name__
    raise ExportError(f"push: {name}: {said.rstrip('.')}; {LOGIN}") from error
