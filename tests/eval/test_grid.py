"""Every record of the grid equals scoring the cut model on its own."""

import jax
import numpy as np
import pytest

from mlembed_jax.data.sources import select
from mlembed_jax.data.tokenizer import Tokenizer
from mlembed_jax.eval import grid, tasks
from mlembed_jax.matryoshka import Slice, slice_config, slice_params
from mlembed_jax.models.encoder import Encoder
from mlembed_jax.sharding import make_mesh


@pytest.fixture(scope="module")
def inputs(data):
  entries = select(data / "manifest.json", ("heldout/*",), "data.heldout")
  loaded = [tasks.load(data, name, entry) for name, entry in entries.items()]
  return loaded, Tokenizer(data / "tokenizer.json", "<|endoftext|>")


@pytest.fixture(scope="module")
def records(tiny, params, inputs):
  return grid.evaluate(tiny, params, *inputs, make_mesh(tiny))


def test_covers_the_cube(tiny, records):
  cube = {(r["task"], r["rank"], r["exit"], r["dim"]) for r in records}
  assert len(cube) == len(records) == 2 * 3 * 3 * 3
  assert {r["metric"] for r in records} == {"top1", "accuracy"}


@pytest.mark.parametrize(("rank", "depth", "dim"), [(24, 3, 48), (8, 1, 16), (16, 2, 8)])
def test_a_record_is_the_score_of_the_cut_model(tiny, params, inputs, records, rank, depth, dim):
  (task, _), tokenizer = inputs
  cut = Slice(rank=rank, depth=depth)
  ids = tokenizer.encode(task.texts, 64)
  tokens = np.array([row + [0] * (64 - len(row)) for row in ids])
  lengths = np.array([len(row) for row in ids])
  apply = jax.jit(Encoder(slice_config(tiny.model, cut)).apply)
  vectors = np.asarray(apply({"params": slice_params(params, cut)}, tokens, lengths)[-1])[:, :dim]
  expected = task.score(vectors / np.linalg.norm(vectors, axis=1, keepdims=True))
  key = {"task": task.name, "rank": rank, "exit": depth, "dim": dim}
  record = next(r for r in records if key.items() <= r.items())
  assert record["by_language"] == pytest.approx(expected, abs=0.05)  # one row of 25 may flip
  assert record["score"] == pytest.approx(np.mean(list(record["by_language"].values())))


def test_table_shows_before_and_after(records):
  better = [r | {"score": r["score"] + 0.5} for r in records]
  text = grid.table(records, better, "heldout/bitext.parquet")
  lines = text.splitlines()
  assert lines[0] == "| depth | dim 8 | dim 16 | dim 48 |"
  assert lines[6] == "| rank | dim 8 | dim 16 | dim 48 |"
  full = next(
    r["score"]
    for r in records
    if (r["task"], r["rank"], r["exit"], r["dim"]) == ("heldout/bitext.parquet", 24, 3, 48)
  )
  assert lines[4].endswith(f"| {100 * full:.0f} → {100 * full + 50:.0f} |") and lines[4][2] == "3"
