"""Compiled programs that are kept on disk: a damaged one is removed before jax reads it.

jax gives a kept program to the compiler's runtime as it is; damage can end the process there. So
each has the SHA-256 of its content beside it, and one without is compiled anew.
"""

import contextlib
import os
import pathlib
import sys
import threading

import jax

from mlembed_jax import files

KEPT = "*-cache"  # how jax names them
SUFFIX = ".sha256"
MISS = "/jax/compilation_cache/cache_misses"  # jax says so before it compiles

_compiled = threading.Event()  # a program was compiled that has no digest yet


def keep(folder: pathlib.Path, *, writes: bool = True) -> None:
  """Keeps compiled programs in a folder, unless JAX_COMPILATION_CACHE_DIR names another.

  Those that are damaged, or that a killed process could not note, are removed, and counted in a
  sentence. `writes` is whether this process does that.
  """
  if "JAX_COMPILATION_CACHE_DIR" in os.environ:
    return
  if writes and (removed := _remove_damaged(folder)):
    said = f"{folder}: {removed} kept programs are damaged or not noted; they are compiled again"
    print(said, file=sys.stderr, flush=True)
  jax.config.update("jax_compilation_cache_dir", str(folder))
  jax.monitoring.register_event_listener(_listen)


def _listen(event: str, **_: object) -> None:
  if event == MISS:
    _compiled.set()


def note_new() -> None:
  """Writes the digests of programs that were compiled since; costs nothing where none was."""
  if not _compiled.is_set():
    return
  _compiled.clear()
  folder = jax.config.values["jax_compilation_cache_dir"]
  for program in pathlib.Path(folder).glob(KEPT) if folder else ():
    if not _beside(program).exists():
      with contextlib.suppress(FileNotFoundError):  # another process removed it
        files.write_text(_beside(program), files.digest(program))


def _remove_damaged(folder: pathlib.Path) -> int:
  damaged = [program for program in folder.glob(KEPT) if not _is_whole(program)]
  for program in damaged:
    program.unlink(missing_ok=True)
    _beside(program).unlink(missing_ok=True)
  return len(damaged)


def _is_whole(program: pathlib.Path) -> bool:
  try:
    return _beside(program).read_text() == files.digest(program)
  except (OSError, ValueError):
    return False


def _beside(program: pathlib.Path) -> pathlib.Path:
  return program.with_name(program.name + SUFFIX)
