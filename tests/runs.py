"""Runs of the train and export commands as real processes, and what they leave in a workdir."""

import json
import os
import pathlib
import subprocess
import sys
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from tests.material import FAST_COMPILE

ROOT = pathlib.Path(__file__).parent.parent
ENVIRONMENT = os.environ | {
  "JAX_PLATFORMS": "cpu",
  "PYTHONPATH": str(ROOT),
  "XLA_FLAGS": " ".join(f"--{name}={value}".lower() for name, value in FAST_COMPILE.items()),
}


def command(data, workdir, more=(), **overrides):
  # Each tracker is imported anew by every run, which takes as long as its compiling.
  flags = {"data.heldout": "()", "data.manifest": "", "train.trackers": "()"} | overrides
  return [
    sys.executable,
    *("-m", "mlembed_jax.train", "--config", f"tests/tiny_config.py:{data}"),
    *("--workdir", str(workdir)),
    *(f"--config.{name}={value}" for name, value in flags.items()),
    *more,
  ]


def run(*args, **overrides):
  return subprocess.run(
    command(*args, **overrides), cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True
  )


def start(*args, **overrides):
  pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
  return subprocess.Popen(command(*args, **overrides), cwd=ROOT, env=ENVIRONMENT, **pipes)


def lines(workdir):
  """Returns the lines of metrics.jsonl; one that is being written is not there yet."""
  path = workdir / "metrics.jsonl"
  text = path.read_text() if path.exists() else ""
  return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def wait_for_step(workdir, step, seconds=300):
  end = time.monotonic() + seconds
  while not any(line["step"] >= step for line in lines(workdir)):
    assert time.monotonic() < end, "the run does not get there"
    time.sleep(0.02)


def arrays(workdir, step):
  """Returns every array of a checkpoint: parameters, moments and step."""
  path, checkpointer = workdir / "checkpoints" / str(step) / "default", ocp.PyTreeCheckpointer()
  tree = checkpointer.metadata(path).item_metadata.tree
  # As numpy arrays: the devices of several processes are not those of this one.
  as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
  state = checkpointer.restore(path, restore_args=as_numpy)
  return [np.asarray(leaf) for leaf in jax.tree.leaves(state)]


def assert_same_state(a, b, step):
  for x, y in zip(arrays(a, step), arrays(b, step), strict=True):
    np.testing.assert_array_equal(x, y)


# One kind of batch and one exit compile in a quarter of the time that all of them take.
SMALL = {
  "data.train": "('train/bitext.parquet',)",
  "data.global_batch": 8,
  "data.lengths": "(32,)",
  "model.layers": 2,
  "matryoshka.exits": "(2,)",
  "matryoshka.ranks": "(24,)",
}
TWENTY: dict[pathlib.Path, pathlib.Path] = {}


@pytest.fixture(scope="module")
def twenty(data, tmp_path_factory):
  """The workdir of 20 uninterrupted steps, with checkpoints at 10 and 20."""
  if data not in TWENTY:  # another module has the same fixture
    workdir = tmp_path_factory.mktemp("twenty")
    result = run(data, workdir)
    assert result.returncode == 0, result.stderr
    TWENTY[data] = workdir
  return TWENTY[data]


TIMES = ("tokens_per_second", "tokens_per_second_per_chip", "sequences_per_second")
TIMES += ("model_flops_per_second", "data_wait_share", "goodput")


def export(*flags):
  return subprocess.run(
    [sys.executable, "-m", "mlembed_jax.export", *map(str, flags)],
    cwd=ROOT,
    env=ENVIRONMENT,
    capture_output=True,
    text=True,
  )
