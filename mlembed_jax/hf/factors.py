"""The token table of a folder as two factors: those it was trained with, or new ones by SVD.

New factors of a large table take minutes, so they are kept on disk by the hash of the table.
"""

import hashlib
import math
import os
import pathlib
import time
from collections.abc import Sequence

import jax
import numpy as np

from mlembed_jax.errors import LoadError
from mlembed_jax.files import write_safetensors
from mlembed_jax.hf import torch_file
from mlembed_jax.hf.folder import Folder, open_file
from mlembed_jax.matryoshka import default_ranks, factorize

FACTORS = "mlembed/uv.safetensors"  # of our own exports: tensors U [vocab, rank], V [rank, width]
RELEASED = ("U.pth", "V.pth")  # of the released ML-Embed folders, the same pair
# Product of the trained factors against the stored table, which may be rounded to bfloat16 (2^-9);
# the second is for sums in another order, relative to the largest value.
RTOL, ATOL = 2**-8, 1e-5
FORMAT = 2  # of kept factors; those of the first may be permuted, and are not read
ROWS = 1024  # so many rows of the table are compared

Factors = tuple[np.ndarray, np.ndarray]


def table(folder: Folder) -> np.ndarray:
  """Returns the token table [rows, width]: as it is stored, or the float32 product of factors."""
  return folder.taken(_whole(folder))


def _whole(folder: Folder) -> np.ndarray:
  """Returns the table with all rows that are stored."""
  if not folder.rank:
    return folder.tensors[0][1].read()
  u, v = _stored(folder)
  return u @ v


def of_folder(folder: Folder, rank: int) -> Factors:
  """Returns U [rows, rank] and V [rank, width], float32.

  Trained factors are used where they reach the rank: their columns stand in the order of training,
  which a new factorisation of their product would lose.

  Raises:
    LoadError: trained factors are not those of the table, or the table is not finite.
  """
  whole = _whole(folder)
  if not np.isfinite(whole).all():
    raise LoadError(f"E107 not finite: the token table of {folder.path} has NaN or infinite values")
  if trained := _trained(folder):
    source, u, v = trained
    if not multiply_to(u, v, whole):
      raise LoadError(
        f"E108 factors: U @ V of {source} is not the table of the weights beside it, which changed "
        "since it was written. Delete the file to factorise the table anew."
      )
    if u.shape[1] >= rank:
      return folder.taken(u)[:, :rank], v[:rank]
  return _kept(folder.taken(whole), rank)


def _stored(folder: Folder) -> Factors:
  """Returns the factors of a folder that holds no table."""
  (t, u), (t_up, v) = folder.tensors[:2]
  return t.from_hf(u.read().astype(np.float32)), t_up.from_hf(v.read().astype(np.float32))


def _trained(folder: Folder) -> tuple[pathlib.Path, np.ndarray, np.ndarray] | None:
  """Returns (file or folder, U, V) of trained factors, None where the folder has none."""
  path = folder.path
  if folder.rank:
    return path, *_stored(folder)
  if (file := path / FACTORS).is_file():
    opened = open_file(file)
    if opened.keys() != {"U", "V"}:
      raise LoadError(f"E108 factors: {file} has {sorted(opened)}, expected U and V")
    u, v = _matrices(file, (opened["U"].read(), opened["V"].read()))
    return file, u, v
  if all((path / name).is_file() for name in RELEASED):
    u, v = _matrices(path, [torch_file.read_tensor(path / name) for name in RELEASED])
    # Which of them is stored transposed is not said: the rank is what they have in common.
    if u.shape[0] < u.shape[1]:
      u = u.T
    return path / RELEASED[0], u, v if v.shape[0] == u.shape[1] else v.T
  return None


def _matrices(path: pathlib.Path, found: Sequence[np.ndarray]) -> Factors:
  """Returns a pair of factors in float32; raises LoadError where one is no matrix."""
  if shapes := [list(factor.shape) for factor in found if factor.ndim != 2 or not factor.size]:
    raise LoadError(f"E108 factors: {path} has a factor of shape {shapes[0]}, expected a matrix")
  u, v = (factor.astype(np.float32) for factor in found)
  return u, v


def multiply_to(u: np.ndarray, v: np.ndarray, table: np.ndarray) -> bool:
  """Returns whether U @ V are the leading rows of `table`; a sample of them is compared."""
  if len(u) > len(table) or u.shape[1] != len(v) or v.shape[1] != table.shape[1]:
    return False
  rows = np.arange(0, len(u), max(1, len(u) // ROWS))
  product = u[rows] @ v
  return np.allclose(product, table[rows].astype(np.float32), RTOL, ATOL * np.abs(product).max())


def cache_folder() -> pathlib.Path:
  """Returns where factors are kept: mlembed_jax in $XDG_CACHE_HOME, else in ~/.cache."""
  home = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
  return pathlib.Path(home) / "mlembed_jax"


def _kept(table: np.ndarray, rank: int) -> Factors:
  digest = hashlib.sha256(f"{FORMAT} {table.dtype} {table.shape} {rank} ".encode())
  digest.update(np.ascontiguousarray(table).view(np.uint8).data)
  file = cache_folder() / f"factors-{digest.hexdigest()[:32]}.safetensors"
  if file.is_file():
    print(f"token table: factors of rank {rank} from {file}", flush=True)
    stored = open_file(file)
    return stored["U"].read(), stored["V"].read()
  u, v = _factorised(table, rank)
  write_safetensors(file, {"U": u, "V": v})
  return u, v


def _factorised(table: np.ndarray, rank: int) -> Factors:
  """Returns the best factors; prints how long it took, and what each rank leaves out."""
  start = time.perf_counter()
  on_device = jax.device_put(table, jax.local_devices()[0])
  u, v, singular = jax.jit(factorize, static_argnums=1)(on_device, rank)
  square = np.square(np.asarray(singular, np.float64))
  errors = ", ".join(
    f"{r}: {math.sqrt(square[r:].sum() / square.sum()):.1%}" for r in default_ranks(rank)
  )
  found = np.asarray(u), np.asarray(v)
  print(
    f"token table {table.shape[0]:,} x {table.shape[1]:,} factorised in "
    f"{time.perf_counter() - start:.0f} s; error by rank: {errors}",
    flush=True,
  )
  return found
