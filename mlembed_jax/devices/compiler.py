"""Options of the XLA compiler that the update is compiled with; those of TPUs stand in tpu.py."""

from typing import Any

import jax

from mlembed_jax.devices import tpu

GPU = {"xla_gpu_enable_latency_hiding_scheduler": "true"}


def check_known(device: Any) -> None:
  """Prints a warning for a kind of TPU whose options are not known."""
  if device.platform == "tpu" and not options(device) and jax.process_index() == 0:
    print(f"no compiler options are known for {device.device_kind}: exchanges may not be hidden")


def options(device: Any) -> dict[str, str]:
  """Returns `compiler_options` for `jax.jit` on such devices; {} where nothing is known."""
  if device.platform == "gpu":
    return GPU
  found = tpu.find_tpu(device.device_kind)
  return dict(found.compiler_options) if found else {}
