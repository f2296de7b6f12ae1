"""Compiler options by device, and where compiled programs are kept."""

import types

import jax
import pytest

from mlembed_jax.devices import compiler
from mlembed_jax.estimate.estimate import Target


@pytest.fixture
def cache_setting():
  before = jax.config.jax_compilation_cache_dir
  jax.config.update("jax_compilation_cache_dir", None)
  yield
  jax.config.update("jax_compilation_cache_dir", before)


def test_programs_are_kept_in_the_workdir(tmp_path, cache_setting, monkeypatch):
  compiler.cache(tmp_path, "cpu")
  assert jax.config.jax_compilation_cache_dir is None
  compiler.cache(tmp_path, "tpu")
  assert jax.config.jax_compilation_cache_dir == str(tmp_path)
  monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/elsewhere")
  compiler.cache(tmp_path / "other", "tpu")
  assert jax.config.jax_compilation_cache_dir == str(tmp_path)


def test_an_unknown_tpu_is_named(capsys):
  found = Target.parse("v5e:2x2", 1).devices()[0]
  unknown = types.SimpleNamespace(platform="tpu", device_kind="TPU v9")
  for device in (found, jax.devices()[0], unknown):
    compiler.check_known(device)
  assert capsys.readouterr().out.startswith("no compiler options are known for TPU v9")
  newer = types.SimpleNamespace(platform="tpu", device_kind="TPU v5e")
  assert compiler.options(newer) == compiler.options(found)


def test_cpu_has_none():
  assert compiler.options(jax.devices()[0]) == {}
