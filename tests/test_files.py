"""What the storage may do to a file that is written: one sentence, and nothing half written."""

import errno
import os
import resource
import signal

import numpy as np
import pytest

from mlembed_jax import files
from mlembed_jax.errors import StorageError


@pytest.mark.parametrize("number", [errno.ENOTCONN, errno.ESTALE, errno.EACCES])
def test_a_path_that_cannot_even_be_looked_at_is_named(tmp_path, monkeypatch, number):
  """As of a mount whose server is gone: asking whether the path exists is an error, too."""
  look = os.stat

  def gone(path, *args, **options):
    if str(path).startswith(str(tmp_path)):
      raise OSError(number, os.strerror(number), str(path))
    return look(path, *args, **options)

  monkeypatch.setattr(os, "stat", gone)
  with (
    pytest.raises(StorageError, match=f"run.json: {os.strerror(number)}; .*same command again"),
    files.storage_errors(tmp_path / "run.json"),
  ):
    raise OSError(number, os.strerror(number), str(tmp_path / "run.json"))


@pytest.fixture
def full(monkeypatch):
  """No file may have more than 10,000 bytes."""
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # so that writing is an error
  resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
  yield
  resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  signal.signal(signal.SIGXFSZ, before)


@pytest.mark.usefixtures("full")
@pytest.mark.parametrize(
  "write",
  [files.save_npy, lambda path, array: files.write_safetensors(path, {"a": array})],
  ids=["npy", "safetensors"],
)
def test_an_array_that_has_no_room_is_told_in_one_sentence(tmp_path, write):
  with pytest.raises(StorageError, match=r"array: File too large .* [GM]B are free\); free"):
    write(tmp_path / "array", np.zeros(20_000, np.float32))


@pytest.mark.parametrize("array", [np.arange(6.0).reshape(2, 3).T, np.zeros((0, 4), np.int8)])
def test_an_array_is_read_as_it_was(tmp_path, array):
  files.save_npy(tmp_path / "array", array)
  np.testing.assert_array_equal(np.load(tmp_path / "array"), array)
