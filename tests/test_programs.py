"""Kept compiled programs, in processes of their own: no damage reaches jax."""

import os
import pathlib
import subprocess
import sys

import pytest

from mlembed_jax import programs

ROOT = pathlib.Path(__file__).parent.parent
PROGRAM = """
import pathlib, sys
import jax, jax.numpy as jnp
from mlembed_jax import programs
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
folder = pathlib.Path(sys.argv[1])
if programs.remove_damaged(folder):
  programs.keep(folder)
hits = []
jax.monitoring.register_event_listener(lambda name, **_: hits.append(name))
f = jax.jit(lambda x: jnp.sin(x) @ jnp.cos(x).T)
print(float(f(jnp.ones((8, 8))).sum()))
print(sum("cache_hits" in name for name in hits), "hits")
if len(sys.argv) == 2:
  programs.note_new()
"""


def run(folder, *more, program=PROGRAM):
  environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
  environment.pop("JAX_COMPILATION_CACHE_DIR", None)
  command = [sys.executable, "-c", program, str(folder), *more]
  found = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
  return found.stdout if not found.stderr else found.stderr + found.stdout


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
  folder = tmp_path_factory.mktemp("kept")
  first = run(folder)
  assert "0 hits" in first
  return folder, first


def test_whole_programs_are_used_and_damaged_ones_compiled_again(kept):
  folder, first = kept
  entries = list(folder.glob(programs.KEPT))
  assert entries and run(folder) == first.replace("0 hits", f"{len(entries)} hits")
  for entry in entries:
    content = bytearray(entry.read_bytes())
    content[len(content) // 2] ^= 1
    entry.write_bytes(content)
  again = run(folder)
  assert again.startswith(f"{folder}: {len(entries)} kept programs are damaged")
  assert again.endswith(first)
  assert run(folder).endswith(f"{len(entries)} hits\n")


def test_programs_that_a_killed_process_did_not_note_are_compiled_again(tmp_path):
  first = run(tmp_path, "killed")
  assert run(tmp_path).endswith(first)


SHARED = """
import pathlib, resource, sys, threading
import jax, jax.numpy as jnp
from mlembed_jax import programs
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
folder = pathlib.Path(sys.argv[1])
for _ in range(2):  # as in the second run of a process
  programs.keep(folder)

def names():
  return {path.name for path in folder.glob("*cache*")}

def compiled(number):  # returns the programs that it adds
  before = names()
  jax.jit(lambda x: jnp.sin(x) * number)(1.0)
  return names() - before

def noted():
  before = names()
  programs.note_new()
  return {name.removesuffix(programs.SUFFIX) for name in names() - before}

assert noted() == set()
(folder / "killed-cache").write_text("half of ")
assert len(ours := compiled(2.0)) > 0 and noted() == ours
ours = compiled(3.0)
(folder / "another-cache").write_text("half of ")
assert len(ours) > 0 and noted() == set()
(growing,) = compiled(4.0)
threading.Timer(programs.SETTLE_S / 2, (folder / growing).write_bytes, [b"half of "]).start()
assert noted() == set()
assert len(compiled(5.0)) == 1
resource.setrlimit(resource.RLIMIT_FSIZE, (1, resource.RLIM_INFINITY))
assert noted() == set()  # the disk is full
"""


def test_only_whole_programs_of_this_process_are_noted(tmp_path):
  assert run(tmp_path, program=SHARED) == ""


def test_nothing_is_kept_where_a_damaged_program_stays(kept):
  folder, first = kept
  (folder / "x-cache").mkdir()  # it cannot be unlinked, as in a folder that is only read
  again = run(folder)
  (folder / "x-cache").rmdir()
  assert again.startswith(f"{folder}/x-cache is damaged and not removed (Is a directory): no ")
  assert again.endswith(first) and run(folder).endswith("hits\n")


def test_another_folder_of_the_caller_is_left_alone(tmp_path, monkeypatch):
  monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/elsewhere")
  (tmp_path / "x-cache").touch()
  assert not programs.remove_damaged(tmp_path)
  assert (tmp_path / "x-cache").exists()
