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


def run(folder, *more):
  environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
  environment.pop("JAX_COMPILATION_CACHE_DIR", None)
  command = [sys.executable, "-c", PROGRAM, str(folder), *more]
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


def test_another_folder_of_the_caller_is_left_alone(tmp_path, monkeypatch):
  monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/elsewhere")
  (tmp_path / "x-cache").touch()
  assert not programs.remove_damaged(tmp_path)
  assert (tmp_path / "x-cache").exists()
