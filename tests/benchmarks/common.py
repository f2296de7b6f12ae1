"""Timing, tables, configurations and meshes that the benchmarks share; not run by itself."""

import contextlib
import math
import pathlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import Mesh

from mlembed_jax.config import from_mapping, load_module
from mlembed_jax.config_fields import Config
from mlembed_jax.parallel import sharding

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"


def seconds(programs: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
  """Returns the least time of each program.

  They run in turn (A, B, A, B ...), so that a noisy minute of the machine hits all of them, and
  the minimum leaves the noise out. One round before the first measured one warms up.
  """
  best = dict.fromkeys(programs, math.inf)
  for measured in (False, *(True for _ in range(repeats))):
    for name, run in programs.items():
      start = time.perf_counter()
      jax.block_until_ready(run())
      if measured:
        best[name] = min(best[name], time.perf_counter() - start)
  return best


def temporaries(compiled: Any) -> int:
  """Returns the compiler's peak of temporary memory: without arguments and outputs."""
  return compiled.memory_analysis().temp_size_in_bytes


def mib(size: float) -> str:
  return f"{size / 2**20:,.0f}"


def tera(flops: float) -> str:
  return f"{flops / 1e12:.4g}"


def print_table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
  """Prints a markdown table line by line: a row appears once it is measured."""
  for line in (header, ["---"] * len(header)):
    print(f"| {' | '.join(line)} |", flush=True)
  for row in rows:
    print(f"| {' | '.join(map(str, row))} |", flush=True)


def machine() -> str:
  device = jax.devices()[0]
  return f"{jax.device_count()} x {device.device_kind} ({device.platform}), jax {jax.__version__}"


def load_config(path: str | pathlib.Path, **changes: Any) -> Config:
  """Returns the configuration FILE[:variant]; `changes` by dotted name. No data is read."""
  file, _, variant = str(path).partition(":")
  config = load_module(file).get_config(variant)
  no_data = {"data.builder": "", "data.dataset": "none", "data.manifest": "", "data.heldout": ()}
  config.update_from_flattened_dict(no_data | changes)
  return from_mapping(config)


@contextlib.contextmanager
def on_mesh(mesh: Mesh) -> Iterator[None]:
  with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.logical_rules()):
    yield


def random_hashes(rows: int, texts: int) -> np.ndarray:
  """Returns [rows, texts, 2]; every eighth text or so is a duplicate, so that masks do act."""
  hashes = np.zeros((rows, texts, 2), np.uint32)
  hashes[..., 0] = np.random.default_rng(0).integers(0, 8 * rows * texts, (rows, texts))
  return hashes
