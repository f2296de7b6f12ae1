"""Compiler options by device."""

import types

import jax

from mlembed_jax.devices import compiler
from mlembed_jax.estimate.estimate import Target


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
