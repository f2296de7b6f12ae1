"""Starting jax's devices: without noise of what is not there, and with a remedy where one fails."""

import contextlib
import functools
import glob
import importlib.util
import os
import pathlib
import sys
from collections.abc import Sequence
from importlib.metadata import entry_points
from typing import Any

import jax

from mlembed_jax.errors import ConfigError

NVIDIA = ("/dev/nvidia0", "/dev/nvidiactl", "/dev/dxg")  # the last one: under Windows
CUDA_PLUGINS = ("jax_cuda13_plugin", "jax_cuda12_plugin")
PCI = "/sys/bus/pci/devices/*"
GOOGLE = "0x1ae0"  # on the PCI bus; its network cards (gVNIC) and disks are no TPUs
OTHERS_OF_GOOGLE = ("0x0042", "0x001f")
EXTRAS = {"cuda": "cuda", "gpu": "cuda", "tpu": "tpu"}  # platform -> what brings it


def start_devices() -> list[Any]:
  """Returns the devices of all processes, which jax starts at the first call.

  Prints a warning where an accelerator of this machine is left alone.

  Raises:
    ConfigError: a platform that is asked for, as by JAX_PLATFORMS, cannot be started.
  """
  asked = jax.config.values["jax_platforms"]
  if not asked and _is_without_accelerator():
    jax.config.update("jax_platforms", "cpu")
  try:
    found = jax.devices()
  except (RuntimeError, AssertionError) as error:
    raise ConfigError(_why(asked, str(error))) from error
  if not asked and found[0].platform == "cpu":
    _warn()
  return found


def _is_without_accelerator() -> bool:
  """Returns whether jax need not look for any: libtpu prints six lines where it finds no TPU."""
  plugins = entry_points(group="jax_plugins") or importlib.util.find_spec("jax_plugins")
  return not (plugins or "PJRT_NAMES_AND_LIBRARY_PATHS" in os.environ or has_tpu())


def has_tpu() -> bool:
  """Returns whether a TPU is on the PCI bus of this machine."""
  return any(
    _read(path, "vendor") == GOOGLE and _read(path, "device") not in OTHERS_OF_GOOGLE
    for path in glob.glob(PCI)
  )


def _read(path: str, name: str) -> str:
  with contextlib.suppress(OSError):  # a device may be gone by now
    return pathlib.Path(path, name).read_text(encoding="ascii").strip()
  return ""


def _why(asked: str | None, error: str) -> str:
  said = error.splitlines()[0] if error else "it does not say why"
  if not asked:
    return f"jax cannot start the devices of this machine ({said}); JAX_PLATFORMS=cpu takes the CPU"
  extras = [extra for name, extra in EXTRAS.items() if name in asked.split(",")]
  plugins = "".join(f'; its plugin comes with pip install "mlembed_jax[{e}]"' for e in extras)
  return (
    f"JAX_PLATFORMS={asked}: jax cannot start it ({said}){plugins}; JAX_PLATFORMS=cpu takes the "
    "CPU, and without it jax takes what is there"
  )


@functools.cache
def _warn() -> None:
  """Says once which accelerator is left alone."""
  hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
  if not hidden and any(os.path.exists(path) for path in NVIDIA):
    _say("an NVIDIA GPU", "cuda", CUDA_PLUGINS)
  elif has_tpu():
    _say("a TPU", "tpu", ("libtpu",))


def _say(what: str, extra: str, packages: Sequence[str]) -> None:
  there = any(importlib.util.find_spec(package) for package in packages)
  why = (
    f"JAX_PLATFORMS={extra} says why; another process may hold it"
    if there
    else f'pip install "mlembed_jax[{extra}]" brings what is missing'
  )
  print(
    f"WARNING: this machine has {what}, which jax cannot use: the CPU computes. {why}. "
    "JAX_PLATFORMS=cpu says that the CPU is meant",
    file=sys.stderr,
    flush=True,
  )
