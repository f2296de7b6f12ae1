"""Facts about TPU generations."""

from mlembed_jax.devices import tpu
from mlembed_jax.estimate.estimate import Target


def test_a_torus_is_read_from_its_chips():
  for name, found in (("v5p:2x2x4", (2, 2, 4)), ("v6e:4x8", (4, 8, 1))):
    devices = Target.parse(name, 1).devices()
    assert tpu.torus([d.coords for d in devices]) == found
    assert tpu.find(devices[0].device_kind) == tpu.TPUS[name[:3]]
  assert tpu.find("TPU v5p") == tpu.TPUS["v5p"] and tpu.find("NVIDIA H200") is None
