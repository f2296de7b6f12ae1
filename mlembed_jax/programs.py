"""Compiled programs that are kept on disk: a damaged one is removed before jax reads it.

jax gives a kept program to the compiler's runtime as it is; damage can end the process there. So
each has the SHA-256 of its content beside it, and one without is compiled anew.
"""

import contextlib
import functools
import os
import pathlib
import sys
import time

import jax

from mlembed_jax import files

KEPT = "*-cache"  # how jax names them
SUFFIX = ".sha256"
MISS = "/jax/compilation_cache/cache_misses"  # jax says so before it writes a program

SETTLE_S = 0.1  # a file that grows meanwhile is being written by another process

# For each program that this process compiled and that has no digest yet, the names that were there
# before it was written.
_compiled: list[set[str]] = []


def remove_damaged(folder: pathlib.Path) -> bool:
  """Returns whether all compiled programs that a folder keeps can be read.

  Those that are damaged, or that a killed process could not note, are removed, and counted in a
  sentence. Another one says why the folder cannot be used, where one cannot be removed. False, and
  nothing is looked at, where JAX_COMPILATION_CACHE_DIR names another folder.
  """
  if "JAX_COMPILATION_CACHE_DIR" in os.environ:
    return False
  damaged = [program for program in folder.glob(KEPT) if not _is_whole(program)]
  try:
    for program in damaged:
      program.unlink(missing_ok=True)
      _beside(program).unlink(missing_ok=True)
  except OSError as error:
    _say(f"{error.filename} is damaged and not removed ({error.strerror}): no programs are kept")
    return False
  if damaged:
    _say(
      f"{folder}: {len(damaged)} kept programs are damaged or not noted; they are compiled again"
    )
  return True


def _say(sentence: str) -> None:
  print(sentence, file=sys.stderr, flush=True)


def keep(folder: pathlib.Path) -> None:
  """Keeps compiled programs in a folder, of which `remove_damaged` returned True."""
  jax.config.update("jax_compilation_cache_dir", str(folder))
  _register()


@functools.cache
def _register() -> None:
  """Registers the listener once, as it counts what is compiled."""
  jax.monitoring.register_event_listener(_listen)


def _listen(event: str, **_: object) -> None:
  if event == MISS:
    _compiled.append({program.name for program in _kept()})


def _kept() -> list[pathlib.Path]:
  folder = jax.config.values["jax_compilation_cache_dir"]
  return list(pathlib.Path(folder).glob(KEPT)) if folder else []


def note_new() -> None:
  """Writes the digests of programs that this process compiled since; costs nothing without any.

  jax does not say which files it wrote. Where more came than this process compiled, another one
  writes there, too, and none is noted: it might be killed in the middle of one. Nor is anything
  where the folder cannot be written to, as the programs can be compiled again.
  """
  if not _compiled:
    return
  before, count = _compiled[0], len(_compiled)
  _compiled.clear()
  with contextlib.suppress(OSError):
    new = [path for path in _kept() if path.name not in before and not _beside(path).exists()]
    sizes = [path.stat().st_size for path in new]
    time.sleep(SETTLE_S)
    if len(new) <= count and sizes == [path.stat().st_size for path in new]:
      for program in new:
        files.write_text(_beside(program), files.digest(program))


def _is_whole(program: pathlib.Path) -> bool:
  try:
    return _beside(program).read_text() == files.digest(program)
  except (OSError, ValueError):
    return False


def _beside(program: pathlib.Path) -> pathlib.Path:
  return program.with_name(program.name + SUFFIX)
