"""Memory and time of importing a Hugging Face folder into sharded arrays.

    python -m tests.benchmarks.importing --config configs/8b.py --folder /tmp/random_8b

Writes a checkpoint of random bfloat16 weights of this shape in shards of 2 GB, unless the folder is
there, and imports it on simulated devices, whose arrays lie in the same memory. A host of a pod
holds its part of the arrays and what is listed as beyond them. Mapped pages of the files, which the
system takes back when it needs memory, are no part of it.
"""

import argparse
import dataclasses
import json
import math
import pathlib
import threading
import time
from collections.abc import Iterator

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import safetensors.numpy

from mlembed_jax.config_fields import Config, ModelConfig
from mlembed_jax.hf import param_mapping
from mlembed_jax.hf.file_names import INDEX
from mlembed_jax.hf.load import load_params
from mlembed_jax.parallel.sharding import logical_rules, make_mesh
from mlembed_jax.training import train_state
from tests.benchmarks import common

SHARD_BYTES = 2e9
HEADER = (
  *("parameters", "tensors", "arrays GiB", "largest tensor GiB", "peak beyond arrays GiB"),
  *("allowed GiB", "seconds"),
)


def write_checkpoint(folder: pathlib.Path, model: ModelConfig) -> None:
  """Writes random weights; they repeat every 16 million values, which nothing here notices."""
  folder.mkdir(parents=True)
  values = np.random.default_rng(0).normal(scale=0.02, size=2**24).astype(ml_dtypes.bfloat16)
  shards: list[list[param_mapping.Tensor]] = [[]]
  for t in param_mapping.tensors(model):
    if sum(2 * math.prod(x.shape) for x in [*shards[-1], t]) > SHARD_BYTES:
      shards.append([])
    shards[-1].append(t)
  placed = {}
  for i, tensors in enumerate(shards):
    file = f"model-{i:05}.safetensors"
    arrays = {t.name: np.resize(values, t.shape) for t in tensors}
    safetensors.numpy.save_file(arrays, folder / file, metadata={"format": "pt"})
    placed |= dict.fromkeys(arrays, file)
  (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": placed}))
  fields = {key: getattr(model, field) for field, key in param_mapping.CONFIG_KEYS.items()}
  fields |= {"model_type": model.family, "rope_theta": model.rope_theta}
  (folder / "config.json").write_text(json.dumps(fields))


class Peak:
  """The most anonymous memory of this process, sampled by a thread."""

  def __init__(self) -> None:
    self.bytes, self._done = 0, threading.Event()
    self._thread = threading.Thread(target=self._watch)

  def __enter__(self) -> "Peak":
    self._thread.start()
    return self

  def __exit__(self, *_: object) -> None:
    self._done.set()
    self._thread.join()

  def _watch(self) -> None:
    while not self._done.wait(0.01):
      self.bytes = max(self.bytes, anonymous())


def anonymous() -> int:
  """Returns the bytes of memory that no file backs."""
  status = pathlib.Path("/proc/self/status").read_text()
  return 1024 * int(status.split("RssAnon:")[1].split()[0])


def rows(config: Config, folder: pathlib.Path) -> Iterator[tuple[str, ...]]:
  mesh = make_mesh(config)
  with jax.set_mesh(mesh), nn.logical_axis_rules(logical_rules()):
    like = train_state.abstract(config, optax.identity(), mesh).params
    like = jax.tree.map(lambda x: x.update(dtype=jnp.bfloat16), like)
    before, start = anonymous(), time.perf_counter()
    with Peak() as peak:
      params = jax.block_until_ready(load_params(folder, config.model, like))
    seconds = time.perf_counter() - start
  size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
  tensors = param_mapping.tensors(config.model)
  largest = 2 * max(math.prod(t.shape) for t in tensors)
  count = sum(leaf.size for leaf in jax.tree.leaves(params))
  beyond = peak.bytes - before - size
  sizes = (x / 2**30 for x in (size, largest, beyond, 2 * largest + 2**30))
  yield f"{count:,}", str(len(tensors)), *(f"{x:.2f}" for x in sizes), f"{seconds:.0f}"


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument("--config", default=str(common.CONFIGS / "8b.py"))
  parser.add_argument("--folder", type=pathlib.Path, required=True)
  parser.add_argument("--devices", type=int, default=8)
  args = parser.parse_args()
  jax.config.update("jax_num_cpu_devices", args.devices)
  jax.config.update("jax_platforms", "cpu")
  config = common.load_config(args.config)
  # A full table, as it is stored; factors are another program.
  config = dataclasses.replace(config, model=dataclasses.replace(config.model, rank=0))
  if not args.folder.exists():
    write_checkpoint(args.folder, config.model)
  common.print_table(HEADER, rows(config, args.folder))


if __name__ == "__main__":
  main()
