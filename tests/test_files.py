"""What the storage may do to a file that is written: one sentence, and nothing half written."""

import errno
import os

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
