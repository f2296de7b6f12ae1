"""The benchmarks still run, at toy sizes: their numbers mean nothing here."""

import os
import subprocess
import sys

import pytest

from tests.material import CONFIGS

TINY = ("--config", "tests/tiny_config.py:none")
FLAGS = {
  "head": ("--cases", "8x1", "--width", "16", "--layers", "2", "--repeats", "1"),
  "step": (*TINY, "--batch", "8", "--tokens", "32", "--repeats", "1"),
  "checkpoint": (*TINY, "--batch", "8", "--tokens", "16", "--repeats", "1"),
  "torch_step": (*TINY, "--batch", "8", "--tokens", "16", "--repeats", "1"),
  "pods": (
    *("--configs", TINY[1], "--topologies", "v5e:2x2", "--batches", "16"),
    *("--text_tokens", "0"),
  ),
  "table": ("--vocab", "64", "--rank", "8", "--widths", "16", "--tokens", "32", "--repeats", "1"),
  "memory": (
    *(*TINY, "--devices", "2", "--batches", "8", "--micro-batch", "64", "--negatives", "1"),
    *("--tokens", "32", "--head-rows", "64", "--head-width", "16", "--head-exits", "2"),
  ),
}


@pytest.fixture(scope="module")
def flags(data, exported, tmp_path_factory):
  """Returns the flags of each benchmark."""
  manifest = ("--manifest", f"{data}/manifest.json", "--tokenizer", f"{data}/tokenizer.json")
  rows = ("--rows", "3000", "--documents", "80", "--steps", "12", "--batch", "8")
  return FLAGS | {
    "batches": ("--dataset", f"{data}/dataset", "--steps", "3", "--batch", "16"),
    "prepare": manifest,
    "encode": (
      *("--folder", str(exported["full"]), "--texts", f"{data}/train/bitext.parquet"),
      *("--count", "40", "--repeats", "1"),
    ),
    "grid": (
      *("--tokenizer", f"{data}/tokenizer.json", "--tasks", f"{data}/heldout"),
      *("--layers", "2", "--max_tokens", "16"),
    ),
    "importing": (*TINY, "--folder", str(tmp_path_factory.mktemp("weights") / "made")),
    "loader": (*rows, "--folder", str(tmp_path_factory.mktemp("rows"))),
  }


@pytest.mark.parametrize(
  "name", [*FLAGS, "batches", "encode", "grid", "importing", "prepare", "loader"]
)
def test_a_benchmark_prints_its_tables(name, flags):
  result = subprocess.run(
    [sys.executable, "-m", f"tests.benchmarks.{name}", *flags[name]],
    cwd=CONFIGS.parent,
    env=os.environ | {"JAX_PLATFORMS": "cpu"},
    capture_output=True,
    text=True,
    check=False,
  )
  assert result.returncode == 0, result.stderr
  rows = [line.strip("| ").split(" | ") for line in result.stdout.splitlines() if line[:1] == "|"]
  headers = [i for i, row in enumerate(rows) if set(row) == {"---"}]
  assert len(headers) == (2 if name == "memory" else 1)
  assert all(len(row) == len(rows[i]) for i in headers for row in rows[i : i + 2])
