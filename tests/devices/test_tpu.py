"""The records of TPU generations, each held against the compiler for TPUs."""

import math

import jax
import pytest

from mlembed_jax.config import load_module
from mlembed_jax.devices import chips, compiler, tpu
from mlembed_jax.devices.tpu import GIB, TPUS
from mlembed_jax.errors import ConfigError
from mlembed_jax.estimate.estimate import Target
from tests.material import CONFIGS


def devices_of(name, axes):
  """Returns the devices of a slice, also of a generation that is not estimated."""
  return Target(f"{name}:{'x'.join(map(str, axes))}", TPUS[name], axes, 1).devices()


def smallest(name):
  return (2, 2) if len(TPUS[name].largest) == 2 else (2, 2, 1)


@pytest.mark.parametrize("name", TPUS)
def test_a_record_is_found_by_what_jax_calls_its_devices(name):
  kinds = {device.device_kind for device in devices_of(name, smallest(name))}
  assert kinds <= set(TPUS[name].device_kinds)
  for kind in TPUS[name].device_kinds:
    assert tpu.find(kind) is TPUS[name]


@pytest.mark.parametrize("name", TPUS)
def test_the_smallest_the_pod_and_the_largest_topology_have_their_devices(name):
  for axes in filter(None, (smallest(name), TPUS[name].pod, TPUS[name].largest)):
    devices = devices_of(name, axes)
    assert len(devices) == math.prod(axes) * TPUS[name].devices_per_chip
    assert tpu.torus([d.coords for d in devices])[: len(axes)] == axes


def test_a_torus_is_read_from_its_chips():
  for name, found in (("v5p:2x2x4", (2, 2, 4)), ("v6e:4x8", (4, 8, 1)), ("tpu7x:2x2x4", (2, 2, 4))):
    kind, _, axes = name.partition(":")
    devices = devices_of(kind, tuple(map(int, axes.split("x"))))
    assert tpu.torus([d.coords for d in devices]) == found


@pytest.mark.parametrize("name", TPUS)
def test_the_compiler_knows_every_option(name):
  device = devices_of(name, smallest(name))[0]
  chip = jax.sharding.SingleDeviceSharding(device)
  shape = jax.ShapeDtypeStruct((8, 128), "float32", sharding=chip)
  options = compiler.options(device)
  assert options == TPUS[name].compiler_options
  assert options or TPUS[name].not_estimated
  run = jax.jit(lambda x: x + 1, out_shardings=chip, compiler_options=options)
  assert run.lower(shape).compile().as_text()


@pytest.mark.parametrize("name", TPUS)
def test_limits_of_a_device_are_its_share_of_the_chip(name):
  chip = chips.find(TPUS[name].device_kinds[0])
  assert chip.bf16_flops * TPUS[name].devices_per_chip == TPUS[name].chip_flops > 1e14
  assert chip.hbm_bytes * TPUS[name].devices_per_chip == TPUS[name].chip_hbm_bytes >= 16 * GIB


@pytest.mark.parametrize("name", TPUS)
def test_an_estimate_needs_a_clock_or_says_why_there_is_none(name):
  axes = "x".join(map(str, smallest(name)))
  figures = TPUS[name].clock_hz, TPUS[name].kernel_efficiency
  assert {math.isnan(figure) for figure in figures} == {bool(TPUS[name].not_estimated)}
  if TPUS[name].not_estimated:
    with pytest.raises(ConfigError, match=f"--topology: {name} has no estimate, as "):
      Target.parse(f"{name}:{axes}", 1)
  else:
    assert Target.parse(f"{name}:{axes}", 1).tpu is TPUS[name]


def test_devices_of_one_chip_share_its_links():
  two, one = TPUS["tpu7x"], TPUS["v5p"]
  assert [two.links((4, 4, 4), group) for group in (2, 8, 32, 128)] == [1, 2, 4, 6]
  for group in (8, 32, 128):
    assert two.axes((4, 4, 4), group) == one.axes((4, 4, 4), group // 2)


def test_node_labels_differ():
  assert len({record.gke_accelerator for record in TPUS.values()}) == len(TPUS)


def test_configurations_are_tuned_for_the_generations_with_a_pod():
  tuned = load_module(CONFIGS / "base.py").PODS
  assert set(tuned) == {name for name, record in TPUS.items() if record.pod}
  assert {frozenset(sizes) for sizes in tuned.values()} == {frozenset(("0_6b", "1_7b", "4b", "8b"))}


def test_other_devices_have_no_record():
  assert tpu.find("NVIDIA H200") is tpu.find("TPU v9") is None
