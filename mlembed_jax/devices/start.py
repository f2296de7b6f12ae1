"""Starting jax's devices: without noise of what is not there, and with a remedy where one fails."""

import functools
import glob
import importlib.util
import os
import pathlib
import sys
from importlib.metadata import entry_points
from typing import Any

import jax

from mlembed_jax.errors import ConfigError

NVIDIA = ("/dev/nvidia0", "/dev/nvidiactl", "/dev/dxg")  # the last one: under Windows
PCI = "/sys/bus/pci/devices/*"
GOOGLE, NETWORK_CARD = "0x1ae0", "0x0042"  # of PCI; Google makes network cards (gVNIC), too
EXTRAS = {"cuda": "cuda", "gpu": "cuda", "tpu": "tpu"}  # platform -> what brings it


def start_devices() -> list[Any]:
  """Returns the devices of all processes, which jax starts at the first call.

  Prints a warning where an accelerator of this machine is left alone for want of a package.

  Raises:
    ConfigError: a platform that JAX_PLATFORMS names cannot be started.
  """
  if not _asked() and _is_without_accelerator():
    jax.config.update("jax_platforms", "cpu")
  try:
    found = jax.devices()
  except (RuntimeError, AssertionError) as error:
    raise ConfigError(_why(str(error))) from error
  _warn(found[0].platform)
  return found


def _asked() -> str:
  return jax.config.values["jax_platforms"] or ""


def _is_without_accelerator() -> bool:
  """Returns whether jax need not look for any: libtpu prints six lines where it finds no TPU."""
  plugins = entry_points(group="jax_plugins") or importlib.util.find_spec("jax_plugins")
  return not plugins and not has_tpu()


def has_tpu() -> bool:
  """Returns whether a TPU is on the PCI bus of this machine."""

  def read(path: str, name: str) -> str:
    return pathlib.Path(path, name).read_text(encoding="ascii").strip()

  of_google = [path for path in glob.glob(PCI) if read(path, "vendor") == GOOGLE]
  return any(read(path, "device") != NETWORK_CARD for path in of_google)


def _why(error: str) -> str:
  asked = _asked()
  said = error.splitlines()[0] if error else "jax does not say why"
  extras = [extra for name, extra in EXTRAS.items() if name in asked.split(",")]
  remedy = [f'its plugin comes with pip install "mlembed_jax[{extra}]"' for extra in extras]
  remedy.append("JAX_PLATFORMS=cpu takes the CPU, and without it jax takes what is there")
  return f"JAX_PLATFORMS={asked}: jax cannot start it ({said}); {'; '.join(remedy)}"


@functools.cache
def _warn(platform: str) -> None:
  """Says once that an accelerator is left alone, unless JAX_PLATFORMS asks for the CPU."""
  if platform != "cpu" or "JAX_PLATFORMS" in os.environ:
    return
  if any(os.path.exists(path) for path in NVIDIA):
    _say("an NVIDIA GPU", "cuda")
  elif has_tpu():
    _say("a TPU", "tpu")


def _say(what: str, extra: str) -> None:
  print(
    f"WARNING: this machine has {what}, which jax cannot use: the CPU computes. "
    f'pip install "mlembed_jax[{extra}]" brings what is missing; JAX_PLATFORMS=cpu says that the '
    "CPU is meant",
    file=sys.stderr,
    flush=True,
  )
