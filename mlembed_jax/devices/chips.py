"""What one device can do, by the name that jax gives it. No jax."""

import dataclasses

from mlembed_jax.devices import tpu
from mlembed_jax.devices.tpu import GIB


@dataclasses.dataclass(frozen=True)
class Chip:
  """Limits of one device, as its maker gives them."""

  bf16_flops: float  # per second, dense bfloat16 products with float32 sums
  hbm_bytes: int  # of memory; what programs may use is a few percent less


# By `device_kind`, with NVIDIA's data sheets; where those give only "with sparsity", half of it.
GPUS: dict[str, Chip] = {
  "NVIDIA A100-SXM4-40GB": Chip(312e12, 40 * GIB),  # A100 data sheet, all four forms
  "NVIDIA A100-PCIE-40GB": Chip(312e12, 40 * GIB),
  "NVIDIA A100-SXM4-80GB": Chip(312e12, 80 * GIB),
  "NVIDIA A100 80GB PCIe": Chip(312e12, 80 * GIB),
  "NVIDIA H100 80GB HBM3": Chip(989.4e12, 80 * GIB),  # SXM; H100 data sheet: 1,979 sparse
  "NVIDIA H100 PCIe": Chip(756.5e12, 80 * GIB),  # 1,513 sparse, fewer cores and a lower clock
  "NVIDIA H100 NVL": Chip(835.5e12, 94 * GIB),  # 1,671 sparse
  "NVIDIA GH200 480GB": Chip(989.4e12, 96 * GIB),  # GH200 data sheet; the 480 are of the CPU
  "NVIDIA H200": Chip(989.4e12, 141 * GIB),  # SXM; H200 data sheet: 1,979 sparse
  "NVIDIA H200 NVL": Chip(835.5e12, 141 * GIB),  # 1,671 sparse
  "NVIDIA B200": Chip(2250e12, 180 * GIB),  # HGX B200 data sheet: 4,500 sparse
  "NVIDIA GB200": Chip(2500e12, 186 * GIB),  # GB200 NVL72 data sheet: 5,000 sparse
  "NVIDIA L4": Chip(121e12, 24 * GIB),  # L4 data sheet: 242 sparse
  "NVIDIA L40S": Chip(362e12, 48 * GIB),  # L40S data sheet: 362.05
  "NVIDIA GeForce RTX 4090": Chip(165.2e12, 24 * GIB),  # Ada whitepaper, float32 accumulation
}


def find(device_kind: str) -> Chip | None:
  """Returns the limits of a jax `device_kind`; None, not a guess, for one that is not known."""
  if generation := tpu.find(device_kind):
    return Chip(generation.peak_flops, generation.hbm_bytes)
  return GPUS.get(device_kind)
