"""Options of the XLA compiler that the update is compiled with, by platform; all stand here."""

import os
import pathlib
from typing import Any

import jax

from mlembed_jax.devices import chips

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
OPTIONS = {
  "TPU v4": ASYNC_COLLECTIVES,
  "TPU v5 lite": ASYNC_COLLECTIVES,
  "TPU v5": ASYNC_COLLECTIVES | {TILES: "65536"},
  "TPU v6 lite": ASYNC_COLLECTIVES | {TILES: "98304"},
}
GPU = {"xla_gpu_enable_latency_hiding_scheduler": "true"}


def cache(folder: pathlib.Path, platform: str) -> None:
  """Keeps compiled programs in a folder, unless JAX_COMPILATION_CACHE_DIR names another.

  A run that goes on then loads what took minutes to compile. Not on
  CPU, whose programs compile in seconds and are bound to one kind of processor.
  """
  if platform != "cpu" and "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    jax.config.update("jax_compilation_cache_dir", str(folder))


def check_known(device: Any) -> None:
  """Says so where the options for a kind of TPU are not known."""
  if device.platform == "tpu" and not options(device) and jax.process_index() == 0:
    print(f"no compiler options are known for {device.device_kind}: exchanges may not be hidden")


def options(device: Any) -> dict[str, str]:
  """Returns `compiler_options` for `jax.jit` on such devices; {} where nothing is known."""
  if device.platform == "gpu":
    return GPU
  return OPTIONS.get(chips.canonical(device.device_kind), {})
