"""Devices are started without noise, and what is missing is said with its remedy."""

import os
import subprocess
import sys

import pytest

from mlembed_jax.devices import start
from tests.runs import ROOT

CODE = "from mlembed_jax.devices.start import start_devices; print(start_devices())"


def started(platforms):
  """Returns the process that starts devices as JAX_PLATFORMS says; None: it is not set."""
  environment = {k: v for k, v in os.environ.items() if k != "JAX_PLATFORMS"}
  environment |= {"PYTHONPATH": str(ROOT), **({"JAX_PLATFORMS": platforms} if platforms else {})}
  return subprocess.run(
    [sys.executable, "-c", CODE], env=environment, capture_output=True, text=True, check=False
  )


@pytest.mark.skipif(start.has_tpu(), reason="this machine has a TPU")
def test_where_no_accelerator_is_nothing_is_said():
  """The tests install libtpu, which prints its errors where jax asks it for devices."""
  done = started(None)
  assert done.stdout == "[CpuDevice(id=0)]\n"
  assert done.stderr == ""


def test_a_platform_that_is_not_there_is_one_error_with_its_extra():
  done = started("cuda")
  error = done.stderr.strip().splitlines()[-1]
  assert error.startswith("mlembed_jax.errors.ConfigError: JAX_PLATFORMS=cuda: jax cannot start it")
  assert 'pip install "mlembed_jax[cuda]"' in error


def test_a_gpu_that_jax_cannot_use_is_said_once(tmp_path, monkeypatch, capfd):
  monkeypatch.setattr(start, "NVIDIA", (str(tmp_path),))  # stands for the file of its driver
  start._warn.cache_clear()
  for _ in range(2):
    start._warn()
  said = capfd.readouterr().err
  assert said.count("WARNING: this machine has an NVIDIA GPU") == 1 and "[cuda]" in said
  start._warn.cache_clear()
  monkeypatch.setattr(start, "CUDA_PLUGINS", ("numpy",))  # stands for one that is installed
  start._warn()
  assert "JAX_PLATFORMS=cuda says why" in capfd.readouterr().err
  start._warn.cache_clear()
  monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # the CPU is meant
  start._warn()
  assert capfd.readouterr().err == ""
  start._warn.cache_clear()


def test_a_plugin_of_another_name_is_not_left_alone(monkeypatch):
  monkeypatch.setattr(start, "PCI", "/nowhere/*")
  assert start._is_without_accelerator()
  monkeypatch.setenv("PJRT_NAMES_AND_LIBRARY_PATHS", "mine:/lib/mine.so")
  assert not start._is_without_accelerator()


@pytest.mark.parametrize(
  ("device", "found"), [("0x0062", True), ("0x0042", False), ("0x001f", False)]
)
def test_network_cards_and_disks_of_google_are_no_tpus(tmp_path, monkeypatch, device, found):
  (tmp_path / "vendor").write_text("0x1ae0\n")
  (tmp_path / "device").write_text(device + "\n")
  monkeypatch.setattr(start, "PCI", str(tmp_path))
  assert start.has_tpu() == found
