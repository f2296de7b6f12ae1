"""One tensor of a file that torch.save wrote, without torch and without running what is in it."""

import pathlib
import pickle
import zipfile
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from mlembed_jax.errors import LoadError

DTYPES = {
  "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
  "HalfStorage": np.dtype(np.float16),
  "FloatStorage": np.dtype(np.float32),
}


def read_tensor(path: pathlib.Path) -> np.ndarray:
  """Returns the tensor or parameter that the file holds.

  Raises:
    LoadError: the file holds anything else, or is not of the zip format of torch 1.6 and later.
  """
  try:
    with zipfile.ZipFile(path) as archive:
      root = next(n for n in archive.namelist() if n.endswith("/data.pkl")).partition("/")[0]
      with archive.open(f"{root}/data.pkl") as file:
        found = _Reader(file, lambda key: archive.read(f"{root}/data/{key}")).load()
  except (OSError, zipfile.BadZipFile, StopIteration, KeyError, pickle.UnpicklingError) as error:
    raise LoadError(f"E104 file: {path} is no tensor that torch.save wrote: {error}") from error
  if not isinstance(found, np.ndarray):
    raise LoadError(f"E104 file: {path} holds a {type(found).__name__}, not a tensor")
  return found


class _Reader(pickle.Unpickler):
  """Knows tensors of three dtypes and nothing else."""

  def __init__(self, file: Any, storage: Callable[[str], bytes]):
    super().__init__(file)
    self._storage = storage

  def find_class(self, module: str, name: str) -> Any:
    if module == "torch" and name in DTYPES:
      return DTYPES[name]
    if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
      return _tensor
    if (module, name) == ("torch._utils", "_rebuild_parameter"):
      return lambda data, *_: data
    if (module, name) == ("collections", "OrderedDict"):
      return dict
    raise pickle.UnpicklingError(f"it names {module}.{name}")

  def persistent_load(self, pid: Any) -> np.ndarray:
    tag, dtype, key, *_ = pid
    if tag != "storage":
      raise pickle.UnpicklingError(f"it refers to a {tag}")
    return np.frombuffer(self._storage(key), dtype)


def _tensor(storage: np.ndarray, offset: int, size: Any, stride: Any, *_: Any) -> np.ndarray:
  strides = [step * storage.itemsize for step in stride]
  if offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) >= storage.size:
    raise pickle.UnpicklingError("a tensor is larger than its storage")
  return np.lib.stride_tricks.as_strided(storage[offset:], size, strides)
