"""Every score of the grid equals scoring the cut model on its own."""

import dataclasses
import weakref

import jax
import numpy as np
import pytest

from mlembed_jax.data.manifest import select
from mlembed_jax.data.tokenizer import Tokenizer
from mlembed_jax.eval import grid, summary, tasks
from mlembed_jax.matryoshka import Slice, slice_config, slice_params
from mlembed_jax.parallel.sharding import make_mesh
from tests.material import padded


@pytest.fixture(scope="module")
def inputs(data):
  files = select(str(data / "manifest.json"), ("heldout/*",), "data.heldout")
  return [tasks.load_task(file) for file in files], Tokenizer(
    data / "tokenizer.json", "<|endoftext|>"
  )


@pytest.fixture(scope="module")
def scores(tiny, params, inputs):
  return grid.score_slices(tiny, params, *inputs, make_mesh(tiny))


def test_covers_the_cube(tiny, scores):
  cube = {(s.task, *s.size) for s in scores}
  assert len(cube) == len(scores) == 2 * 3 * 3 * 3
  assert {s.metric for s in scores} == {"f1", "accuracy"}


CELLS = [(24, 3, 48), (8, 1, 16), (16, 2, 8), (24, 3, 8), (24, 1, 48)]


@pytest.mark.parametrize(("rank", "depth", "dim"), CELLS)
def test_a_score_is_the_score_of_the_cut_model(tiny, params, inputs, contents, rank, depth, dim):
  (task, _), tokenizer = inputs
  cut = Slice(rank=rank, depth=depth)
  ids = tokenizer.encode(task.texts, 64)
  tokens = np.array([row + [0] * (64 - len(row)) for row in ids])
  lengths = np.array([len(row) for row in ids])
  apply = jax.jit(padded(slice_config(tiny.model, cut)))
  vectors = np.asarray(apply({"params": slice_params(params, cut)}, tokens, lengths)[-1])[:, :dim]
  expected = content(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), None)["all"]["f1"]
  assert contents[rank, depth, dim] == pytest.approx(expected, rel=1e-3)
  others = [value for cell, value in contents.items() if cell != (rank, depth, dim)]
  assert min(abs(value - expected) for value in others) > 0.01 * abs(expected)


def content(vectors, _):
  """Returns a "score" that any change of the vectors changes."""
  weights = np.random.default_rng(len(vectors)).normal(size=(len(vectors), 1))
  return {"all": {"f1": float(np.sum(weights * vectors * np.arange(1, vectors.shape[1] + 1)))}}


@pytest.fixture(scope="module")
def contents(tiny, params, inputs):
  (task, _), tokenizer = inputs
  task = dataclasses.replace(task, score=content)
  found = grid.score_slices(tiny, params, [task], tokenizer, make_mesh(tiny))
  return {(s.rank, s.depth, s.dim): s.score for s in found}


@pytest.mark.parametrize("pairs", [False, True])
def test_states_of_one_rank_are_in_memory_at_a_time(inputs, pairs):
  task, made, alive = inputs[0][0], [], []

  def encode(ids, rank):
    alive.append(sum(state() is not None for state in made))
    states = np.random.default_rng(rank).normal(size=(2, len(ids), 8)).astype(np.float32)
    made.append(weakref.ref(states))
    return states

  axes = grid.Axes((8, 16, 24), (1, 3), (8,))
  grid.score_task_slices(task, [[1]] * len(task.texts), axes, encode, pairs=pairs)
  assert alive == [0, 0, 0]


@pytest.fixture(scope="module")
def bitext(scores):
  return [s for s in scores if s.task == "heldout/bitext.parquet"]


def test_table_shows_before_and_after(bitext):
  better = [dataclasses.replace(s, score=s.score + 0.5) for s in bitext]
  lines = summary.change_table(bitext, better).splitlines()
  assert lines[0] == "| depth | dim 8 | dim 16 | dim 48 |"
  assert lines[6] == "| rank | dim 8 | dim 16 | dim 48 |"
  full = next(s.score for s in bitext if (s.rank, s.depth, s.dim) == (24, 3, 48))
  assert lines[4].endswith(f"| {100 * full:.0f} → {100 * full + 50:.0f} |") and lines[4][2] == "3"


def test_table_shows_what_was_not_measured_as_a_dash(bitext):
  assert summary.change_table([], bitext).splitlines()[2].startswith("| 1 | – → ")
