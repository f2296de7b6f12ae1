"""Seconds to score every slice of a model at once, against one slice after the other.

    python -m tests.benchmarks.grid --tokenizer tokenizer.json --tasks FOLDER

A random model of 28 layers with 7 exits, 8 dimensions and 4 ranks. Of the single slices one per
exit is measured, whole in the other axes; the sum over all slices is that times their number.
"""

import argparse
import itertools
import pathlib
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import jax

from mlembed_jax.data.tokenizer import Tokenizer
from mlembed_jax.eval import scoring
from mlembed_jax.eval.grid import Axes
from mlembed_jax.eval.tasks import HeldoutTask, load_folder
from mlembed_jax.hf.export import export_folder
from mlembed_jax.inference import Encoder
from mlembed_jax.matryoshka import Slice
from mlembed_jax.workdir import Run
from tests import material
from tests.benchmarks import common

DIMS, RANKS = (8, 16, 24, 32, 48, 64, 96, 128), (16, 32, 64, 128)
SHAPE: dict[str, Any] = {
  **{"model.width": 128, "model.ffn": 384, "model.heads": 2, "model.kv_heads": 1},
  **{"model.head_dim": 64, "model.rank": 128, "model.dtype": "float32"},
  **{"matryoshka.dims": DIMS, "matryoshka.ranks": RANKS, "data.dataset": "none"},
}


def make_model(folder: pathlib.Path, tokenizer: pathlib.Path, layers: int) -> Encoder:
  """Returns the encoder of an exported random model."""
  token = Tokenizer(tokenizer, "<|endoftext|>")
  fields = SHAPE | {"model.layers": layers, "model.vocab": token.size}
  config = common.load_config(common.CONFIGS / "0_6b.py", **fields)
  params = material.random_params(config.model)
  run = Run(config, {}, {})
  path = export_folder(
    folder / "model", run=run, params=params, tokenizer=token, step=0, cut=Slice()
  )
  return Encoder.load(path)


def seconds(encoder: Encoder, tasks: list[HeldoutTask], axes: Axes) -> float:
  """Returns how long the second of two scorings takes: programs are compiled by the first."""
  best = 0.0
  for _ in range(2):
    start = time.perf_counter()
    for task in tasks:
      scoring.score_task(encoder, task, axes)
    best = time.perf_counter() - start
  return best


def rows(args: argparse.Namespace) -> Iterator[tuple[str, ...]]:
  tasks = load_folder(args.tasks)
  with tempfile.TemporaryDirectory() as folder:
    encoder = make_model(pathlib.Path(folder), args.tokenizer, args.layers)
    encoder.max_seq_length = args.max_tokens
    depths = encoder.sizes.depths
    whole = Axes(RANKS, depths, DIMS)
    count = len(list(itertools.product(RANKS, depths, DIMS)))
    grid = seconds(encoder, tasks, whole)
    yield "grid", f"{count}", f"{grid:.1f}", "1.0"
    alone = [seconds(encoder, tasks, Axes(RANKS[-1:], (d,), DIMS[-1:])) for d in depths]
    total = sum(alone) * count / len(depths)
    yield f"one by one, {len(depths)} measured", f"{count}", f"{total:.1f}", f"{total / grid:.1f}"


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument("--tokenizer", type=pathlib.Path, required=True)
  parser.add_argument("--tasks", type=pathlib.Path, required=True)
  parser.add_argument("--layers", type=int, default=28)
  parser.add_argument("--max_tokens", type=int, default=256, help="of a text")
  jax.config.update("jax_platforms", "cpu")
  common.print_table(("scored", "slices", "seconds", "ratio"), rows(parser.parse_args()))


if __name__ == "__main__":
  main()
