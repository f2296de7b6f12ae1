"""Real runs with every kind of teacher and task type, and what they say of useless batches."""

import json
import re

import numpy as np
import pytest

from mlembed_jax.objective.losses import TERMS
from tests.material import (
  entry,
  pairs,
  prepare_dataset,
  scored,
  train_tokenizer,
  with_positives,
  write_parquet,
  write_vectors,
)
from tests.runs import SMALL, lines, run


@pytest.fixture(scope="module")
def files(tmp_path_factory):
  """Bitext with two positives and a teacher's vectors, scored pairs, and a useless file."""
  folder = tmp_path_factory.mktemp("files")
  write_parquet(folder / "bitext.parquet", with_positives(pairs(48, 2), 2))
  write_parquet(folder / "scored.parquet", scored(48))
  same = pairs(32, 0)
  write_parquet(folder / "same.parquet", same | {"passage": ["one"] * 32})
  vectors = {"query": (48, 64), "passage": (48, 2, 64)}
  described = {
    "bitext.parquet": entry("bitext", 2, "Translate.")
    | {"positives": 2, "teacher_vectors": write_vectors(folder, "bitext", vectors)},
    "scored.parquet": entry("scored_pairs", 0, "Compare."),
    "same.parquet": entry("retrieval", 0, "Search."),
  }
  (folder / "manifest.json").write_text(json.dumps(described), encoding="utf-8")
  train_tokenizer(600).save(str(folder / "tokenizer.json"))
  prepare_dataset(folder, "*")
  return folder


USEFUL = {"data.train": "('bitext*','scored*')", "train.steps": 6}
WEIGHTS = {term.weight: 0.1 for term in TERMS.values()}


@pytest.fixture(scope="module")
def taught(files, tmp_path_factory):
  workdir = tmp_path_factory.mktemp("taught")
  flags = {
    "kd.teacher": "stored",
    "kd.mrl": True,
    "losses.learn_temperature": True,
    "data.micro_batch": 512,
  }
  result = run(files, workdir, **USEFUL, **WEIGHTS, **flags)
  assert result.returncode == 0, result.stderr
  assert "warning" not in result.stderr
  return workdir


def test_a_run_with_everything_on_logs_every_term(taught):
  by_file = {next(iter(line["loss_by_dataset"])): line for line in lines(taught)}
  bitext, scored = (set(by_file[f"{name}.parquet"]) for name in ("bitext", "scored"))
  terms = {f"{name}_loss" for name in TERMS}
  learned = {"distillation_loss", "self_distillation_loss", "prefix_loss", "similarity_loss"}
  assert terms | {"hard_loss", "inbatch_loss"} < bitext
  assert (terms - learned) | {"scored_loss"} < scored
  assert not learned & scored  # no teacher_vectors, and nothing to choose from
  for line in lines(taught):
    parts = [v for name, v in line.items() if name.endswith("_loss")]
    assert line["loss"] == pytest.approx(sum(parts), rel=1e-5)
  assert any(line["temperature"] != pytest.approx(0.05, rel=1e-7) for line in lines(taught))


def test_a_workdir_teaches_a_smaller_student(files, taught, tmp_path):
  small = {"model.layers": 2, "matryoshka.exits": "(1,2)", "data.lengths": "(32,)"}
  small |= {"data.micro_batch": 0}
  result = run(files, tmp_path, **USEFUL, **small, **{"kd.teacher": taught})
  assert result.returncode == 0, result.stderr
  assert all(np.isfinite(line["distillation_loss"]) for line in lines(tmp_path))
  assert re.search(r"data\.micro_batch: [\d,]+ tokens at a time, with which a step", result.stdout)


def test_a_batch_of_one_text_is_counted_and_said_once(files, tmp_path):
  flags = {"data.train": "('same*',)", "data.global_batch": 16, "train.steps": 5}
  result = run(files, tmp_path, **SMALL | flags)
  assert result.returncode == 0, result.stderr
  assert [line["empty_rows"] for line in lines(tmp_path)] == [16] * 5
  assert [line["loss"] for line in lines(tmp_path)] == [0.0] * 5
  assert result.stderr.count("(same.parquet) had nothing to compare") == 1


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    ({"kd.teacher": "/absent"}, "error: kd.teacher: /absent is no folder"),
    ({"kd.teacher": "stored", "model.width": 96, "matryoshka.dims": "(96,)"}, "gives 64 dims"),
    ({"data.train": "('same*',)", "kd.teacher": "stored"}, "no training file has its vectors"),
  ],
)
def test_teachers_are_checked_before_any_work(files, tmp_path, flags, message):
  result = run(files, tmp_path / "work", **(USEFUL | flags))
  assert result.returncode == 1 and message in result.stderr
  assert "Traceback" not in result.stderr and not (tmp_path / "work/run.json").exists()
