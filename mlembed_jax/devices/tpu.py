"""TPU generations: one record of all that this project knows of each. No jax.

A new generation is a record here and, for its tuned settings, a row of PODS in configs/base.py.
Imports the standard library alone, as launch/gke/jobset.py runs where nothing else is installed.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence

GIB = 2**30

# Exchanges of weights run beside products instead of between them.
ASYNC_COLLECTIVES = {
  "xla_enable_async_all_gather": "true",
  "xla_tpu_enable_async_collective_fusion": "true",
  "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "true",
  "xla_tpu_enable_async_collective_fusion_multiple_steps": "true",
  "xla_tpu_overlap_compute_collective_tc": "true",
  # On few chips XLA would gather weights in pieces, between products too small to be fast.
  "xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000",
}
# Room for the tiles of one operation, KiB. With the default of 16 MiB a product [T, 4096] x
# [4096, 12288] alone reaches 0.85 of the peak on v5p (T = 8,192) by the compiler's estimate, and
# 0.62 on v6e (T = 16,384); with 64 MiB 0.98 and 0.91. On v6e 96 MiB make a step of the 8B another
# 1.4 % faster; on v5p 64 MiB are all that a core has. Compiling takes longer. v5e gains nothing
# (0.98, 0.99).
TILES = "xla_tpu_scoped_vmem_limit_kib"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tpu:
  """One generation. Figures are of a chip, from cloud.google.com/tpu/docs unless said otherwise."""

  device_kinds: tuple[str, ...]  # jax's `device_kind`; newer versions of jax have other names
  chip_flops: float  # per second, dense bfloat16 products with float32 sums
  chip_hbm_bytes: int  # what programs may use is a few percent less
  devices_per_chip: int = 1  # that jax shows
  link_bytes_per_second: float  # of one link, one way; "How to scale your model" (jax-ml)
  ring: int  # an axis of the torus is closed to a ring from this length on
  largest: tuple[int, ...]  # axes of the largest topology
  pod: tuple[int, ...] = ()  # axes of the slice that configurations are tuned for; (): none are
  gke_accelerator: str  # the node label cloud.google.com/gke-tpu-accelerator
  compiler_options: Mapping[str, str]
  # libtpu's name of the setting in which programs for chips that are not here see those devices.
  chip_config: str = "default"
  # The estimate of time needs the two figures below, and refuses a generation without them.
  not_estimated: str = ""  # why they are missing
  clock_hz: float = math.nan  # of the cycles that the compiler counts: from peak and MXU count
  # What an attention kernel reaches of the peak, of the products that a causal mask needs: an
  # assumption. Bounds at head width 128 and 1,024 tokens in one block: 0.5, as masked scores are
  # computed too; 0.25 on v6e, whose 256-wide arrays are half used. Exponentials come on top.
  kernel_efficiency: float = math.nan

  @property
  def peak_flops(self) -> float:
    """Per second, of one device in bfloat16."""
    return self.chip_flops / self.devices_per_chip

  @property
  def hbm_bytes(self) -> int:
    """Memory of one device."""
    return self.chip_hbm_bytes // self.devices_per_chip

  def gather_tokens(self, torus: Sequence[int], group: int) -> float:
    """Returns the tokens on a device whose products take as long as gathering their weights.

    Both are 2 per parameter and token: FLOPs, and bytes of bfloat16 that `group` devices share.
    What one device of a chip receives it is taken to hand to the others beside the links.
    """
    return self.peak_flops / (self.links(torus, group) * self.link_bytes_per_second)

  def links(self, torus: Sequence[int], group: int) -> int:
    """Returns over how many links a chip receives in an exchange among `group` devices.

    An axis that the group takes whole, and that is closed to a ring, counts twice.
    """
    taken = zip(self.axes(torus, group), sorted(torus, reverse=True), strict=False)
    return max(1, sum(2 if n == axis >= self.ring else 1 for n, axis in taken))

  def axes(self, torus: Sequence[int], group: int) -> list[int]:
    """Returns how many chips of each axis a group of devices takes, the longest axis first."""
    taken, chips = [], math.ceil(group / self.devices_per_chip)
    for axis in sorted(torus, reverse=True):
      if chips > 1:
        taken.append(min(axis, chips))
        chips = math.ceil(chips / axis)
    return taken


# By the name that libtpu gives topologies, as in v5p:4x4x4.
TPUS = {
  "v4": Tpu(
    device_kinds=("TPU v4",),
    chip_flops=275e12,
    chip_hbm_bytes=32 * GIB,
    link_bytes_per_second=45e9,
    ring=4,
    largest=(12, 16, 16),
    gke_accelerator="tpu-v4-podslice",
    compiler_options=ASYNC_COLLECTIVES,
    chip_config="megacore",  # by default each of the two cores would be a device, with half of all
    clock_hz=1.05e9,
    kernel_efficiency=0.3,
  ),
  "v5e": Tpu(
    device_kinds=("TPU v5 lite", "TPU v5e"),
    chip_flops=197e12,
    chip_hbm_bytes=16 * GIB,
    link_bytes_per_second=45e9,
    ring=16,
    largest=(16, 16),
    pod=(16, 16),
    gke_accelerator="tpu-v5-lite-podslice",
    compiler_options=ASYNC_COLLECTIVES,
    clock_hz=1.5e9,
    kernel_efficiency=0.3,
  ),
  "v5p": Tpu(
    device_kinds=("TPU v5", "TPU v5p"),
    chip_flops=459e12,
    chip_hbm_bytes=95 * GIB,
    link_bytes_per_second=90e9,
    ring=4,
    largest=(16, 20, 28),
    pod=(4, 4, 4),
    gke_accelerator="tpu-v5p-slice",
    compiler_options=ASYNC_COLLECTIVES | {TILES: "65536"},
    clock_hz=1.75e9,
    kernel_efficiency=0.3,
  ),
  "v6e": Tpu(
    device_kinds=("TPU v6 lite", "TPU v6e"),
    chip_flops=918e12,
    chip_hbm_bytes=32 * GIB,
    link_bytes_per_second=90e9,
    ring=16,
    largest=(16, 16),
    pod=(16, 16),
    gke_accelerator="tpu-v6e-slice",
    compiler_options=ASYNC_COLLECTIVES | {TILES: "98304"},
    clock_hz=1.75e9,
    kernel_efficiency=0.15,
  ),
  "tpu7x": Tpu(  # Ironwood
    device_kinds=("TPU7x",),
    chip_flops=2307e12,
    chip_hbm_bytes=192 * GIB,
    devices_per_chip=2,
    # Google states 1,200 GB/s per chip, in both directions over the links of a torus of three axes,
    # for it and for v5p.
    link_bytes_per_second=90e9,
    ring=4,
    largest=(16, 24, 24),  # 9,216 chips; the axes are those of MaxText's table of slices
    gke_accelerator="tpu7x",
    compiler_options={},  # none were tried
    not_estimated="the clock behind the compiler's cycles is not public",
  ),
}


def find(device_kind: str) -> Tpu | None:
  """Returns the generation of a jax `device_kind`, None for one that has no record."""
  return next((tpu for tpu in TPUS.values() if device_kind in tpu.device_kinds), None)


def torus(coords: Iterable[Sequence[int]]) -> tuple[int, ...]:
  """Returns how many chips lie along each axis of a slice whose devices have these coordinates."""
  return tuple(1 + max(axis) for axis in zip(*coords, strict=True))
