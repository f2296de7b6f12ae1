"""Ranges of the coordinates of training texts, which round vectors to int8 and uint8.

Two vectors that were rounded by different ranges cannot be compared, and the ranges of a few texts
say nothing. So an export measures them once, for every trained depth and dimension of the folder,
and whoever encodes with it rounds by the same ones.
"""

import pathlib
import re
from collections.abc import Sequence

from mlembed_jax.config_fields import ModelConfig
from mlembed_jax.errors import LoadError
from mlembed_jax.files import write_safetensors
from mlembed_jax.hf import own_file, parity
from mlembed_jax.hf.config_files import Variant
from mlembed_jax.hf.folder import open_file
from mlembed_jax.models.flops import forward_flops
from mlembed_jax.quantize import LEAST_TEXTS, Ranges, check_ranges, ranges, unit

FILE = "mlembed/ranges.safetensors"  # no weights: those stand beside config.json
TOKENS = 64  # a text is cut to so many
MOST_TEXTS = 1000
FLOPS = 1e13  # of all texts, unless 100 need more: two cores do a tenth of it in a second


def texts(model: ModelConfig) -> tuple[int, int]:
  """Returns (texts to measure ranges on, their most tokens): 1,000, of large models down to 100."""
  flops = forward_flops(model, TOKENS, TOKENS * (TOKENS + 1))
  return max(LEAST_TEXTS, min(MOST_TEXTS, int(FLOPS / flops))), TOKENS


def write(
  folder: pathlib.Path, variant: Variant, params: parity.Params, ids: Sequence[Sequence[int]]
) -> str | None:
  """Writes the ranges of unit vectors of texts, and returns the path of the file in the folder.

  With fewer than 100 texts nothing is written, which is said, and None is returned.

  Args:
    folder: the folder of the variant.
    variant: what the folder holds.
    params: its weights.
    ids: token ids of the texts, at most 64 each.
  """
  if len(ids) < LEAST_TEXTS:
    print(
      f"{variant.name}: no ranges of int8 vectors are stored, as {len(ids)} training texts are at "
      f"hand and {LEAST_TEXTS} are needed",
      flush=True,
    )
    return None
  depths = _sizes_up_to(variant.axes.exits, variant.depth)
  dims = _sizes_up_to(variant.axes.dims, variant.dim)
  states_END = parity.states(params, variant.body, ids, depths)
  found = {
    f"l{depth}-d{dim}": ranges(unit(states_ND[:, :dim]))
    for depth, states_ND in zip(depths, states_END, strict=True)
    for dim in dims
  }
  write_safetensors(folder / FILE, found)
  return FILE


def read(folder: pathlib.Path) -> dict[tuple[int, int], Ranges]:
  """Returns the ranges [2, dim] by depth and dim, none where the folder has none.

  Raises:
    LoadError: the file that mlembed.json names is absent, damaged or another one.
  """
  own = own_file.read(folder)
  if own is None or own.ranges_file is None:
    return {}
  path = folder / FILE
  if own.ranges_file != FILE:
    raise LoadError(
      f"{folder / own_file.NAME}: ranges_file is {own.ranges_file!r}, expected {FILE}"
    )
  found = {name: stored.read() for name, stored in open_file(path).items()}
  try:
    for name, ranges_2D in found.items():
      check_ranges(ranges_2D, _sizes_of(name)[1])
  except ValueError as error:
    raise LoadError(f"E104 file: {path}: {error}; export the folder again") from error
  return {_sizes_of(name): ranges_2D for name, ranges_2D in found.items()}


def _sizes_up_to(trained: Sequence[int], size: int) -> list[int]:
  return sorted({*(smaller for smaller in trained if smaller < size), size})


def _sizes_of(name: str) -> tuple[int, int]:
  if not (found := re.fullmatch(r"l([1-9]\d{0,8})-d([1-9]\d{0,8})", name)):
    raise ValueError(f"{name!r} names no depth and dim")
  return int(found[1]), int(found[2])
