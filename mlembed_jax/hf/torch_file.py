"""One tensor of a file that torch.save wrote, without torch and without running what is in it.

The file may come from a stranger: no more is allocated than it has bytes, and no memory is read but
its own.
"""

import io
import pathlib
import pickle
import pickletools
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
MOST_PICKLE = 2**16  # bytes; that of a tensor has 400
# All that torch.save writes of a tensor. Others can ask for any amount of memory in one byte.
OPCODES = {
  *("PROTO", "STOP", "GLOBAL", "BINPERSID", "REDUCE", "MARK", "BINPUT", "BINGET"),
  *("TUPLE", "EMPTY_TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "BINUNICODE", "NONE"),
  *("NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1"),
  *("EMPTY_DICT", "SETITEM", "SETITEMS"),  # of a state dict, which is then refused by its type
}


def read_tensor(path: pathlib.Path) -> np.ndarray:
  """Returns the tensor or parameter that the file holds.

  Raises:
    LoadError: the file holds anything else, or is not of the zip format of torch 1.6 and later.
  """
  try:
    found = _read(path)
  except Exception as error:  # zipfile and pickle raise nearly anything for a damaged file
    raise LoadError(f"E104 file: {path} is no tensor that torch.save wrote: {error}") from error
  if not isinstance(found, np.ndarray):
    raise LoadError(f"E104 file: {path} holds a {type(found).__name__}, not a tensor")
  return found


def _read(path: pathlib.Path) -> Any:
  if not path.is_file():  # a pipe would be waited for
    raise FileNotFoundError(f"No such file: {path}")
  with zipfile.ZipFile(path) as archive:
    pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
    if not pickles:
      raise ValueError("it has no data.pkl")
    root = pickles[0].partition("/")[0]
    if f"{root}/byteorder" in archive.namelist():
      order = _member(archive, f"{root}/byteorder")
      if order != b"little":
        raise ValueError(f"its byte order is {order[:20]!r}")
    pickled = _member(archive, f"{root}/data.pkl")
    _check_pickle(pickled)
    read: Callable[[str], bytes] = lambda key: _member(archive, f"{root}/data/{key}")  # noqa: E731
    return _Reader(io.BytesIO(pickled), read).load()


def _member(archive: zipfile.ZipFile, name: str) -> bytes:
  """Returns a file of an archive; torch compresses none, so none is larger than the archive."""
  stated = archive.getinfo(name)
  if stated.compress_type != zipfile.ZIP_STORED:
    raise ValueError(f"{name} is compressed")
  # zipfile allocates what is stated before it reads; the files stand before the directory.
  if max(stated.file_size, stated.compress_size) > archive.start_dir:
    raise ValueError(f"{name} is said to be larger than the archive")
  return archive.read(name)


def _check_pickle(data: bytes) -> None:
  """Raises ValueError where a pickle is not of the kind that torch.save writes of a tensor."""
  if len(data) > MOST_PICKLE:
    raise ValueError(f"its pickle has {len(data):,} bytes")
  for opcode, _, _ in pickletools.genops(data):
    if opcode.name not in OPCODES:
      raise ValueError(f"its pickle has {opcode.name}")


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

  def persistent_load(self, pid: Any) -> "_Storage":
    tag, dtype, key, _, count = pid
    if tag != "storage":
      raise pickle.UnpicklingError(f"it refers to a {tag}")
    return _Storage(np.frombuffer(self._storage(key), dtype), count)


class _Storage:
  """The numbers of a tensor in a row; none is a tensor by itself."""

  def __init__(self, numbers: np.ndarray, stated: int):
    if len(numbers) != stated:
      raise ValueError(f"a storage has {len(numbers)} numbers, but {stated} are stated")
    self.numbers = numbers


def _tensor(storage: _Storage, offset: int, size: Any, stride: Any, *_: Any) -> np.ndarray:
  numbers = storage.numbers
  if any(type(n) is not int or n < 0 for n in (offset, *size, *stride)):
    raise ValueError("a tensor has an offset, size or stride that is no count")
  count = int(np.prod(size, dtype=object))
  last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
  if count and (last >= numbers.size or count > numbers.size):
    raise ValueError("a tensor is larger than its storage")
  if not count:
    return np.empty(size, numbers.dtype)
  strides = [step * numbers.itemsize for step in stride]
  return np.lib.stride_tricks.as_strided(numbers[offset:], size, strides)
