"""What doctor says of a workdir, each of whose files is damaged in turn."""

import json
import shutil
import subprocess
import sys

import pytest

from mlembed_jax import files
from mlembed_jax.hf.checks.finding import ERROR, OK, WARNING
from mlembed_jax.training.examine import examine
from mlembed_jax.training.goodput import Goodput
from mlembed_jax.workdir import Run, StepScores
from tests.training.test_checkpoint import ROOT, file_of, flip, save


@pytest.fixture(scope="module")
def whole(tiny, data, tmp_path_factory):
  workdir = tmp_path_factory.mktemp("whole")
  save(workdir, 10, 20)
  shutil.copy(data / "tokenizer.json", workdir)
  digest = files.digest(workdir / "tokenizer.json")
  Run(tiny, {}, {}, tokenizer=digest, digests_since=15).save(workdir)
  StepScores(20, {}, []).save(workdir)
  lines = "".join(json.dumps({"step": step}) + "\n" for step in range(1, 21))
  (workdir / "metrics.jsonl").write_text(lines)
  Goodput(workdir, writes=True).write()
  return workdir


def test_a_whole_workdir_is_well(whole):
  assert {finding.level for finding in examine(whole)} == {OK}


DAMAGES = {
  "run.json": ("W01", ERROR),
  "tokenizer.json": ("W02", ERROR),
  "eval/step_20.json": ("W04", ERROR),
  "goodput.json": ("W06", WARNING),
}


@pytest.mark.parametrize("file", DAMAGES)
def test_a_damaged_file_is_found(whole, tmp_path, file):
  workdir = shutil.copytree(whole, tmp_path / "w")
  flip(workdir / file, 0.3)
  found = [(f.check, f.level) for f in examine(workdir) if f.level != OK]
  assert found == [DAMAGES[file]]


def test_a_workdir_without_checkpoints_is_said(whole, tmp_path):
  workdir = shutil.copytree(whole, tmp_path / "w")
  shutil.rmtree(workdir / "checkpoints")
  found = [(f.check, f.level, f.found) for f in examine(workdir) if f.level != OK]
  assert ("W03", WARNING, "none is there") in found


def test_missing_lines_of_metrics_are_found(whole, tmp_path):
  workdir = shutil.copytree(whole, tmp_path / "w")
  path = workdir / "metrics.jsonl"
  lines = path.read_text().splitlines()
  path.write_text("\n".join([*lines[:3], lines[3][:5], *lines[6:]]) + "\n")
  found = {f.found for f in examine(workdir) if f.check == "W05"}
  assert found == {"damaged lines: 1", "there are no lines of steps 4 to 6"}


def test_the_command_names_damaged_checkpoints(whole, tmp_path):
  workdir = shutil.copytree(whole, tmp_path / "w")
  for step in (10, 20):
    file_of(workdir, step, "digests.json").unlink()
  command = [sys.executable, "-m", "mlembed_jax.doctor", str(workdir)]
  result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
  assert result.returncode == 2
  damaged = f"{workdir}/checkpoints/20 is damaged: default/digests.json is missing"
  assert f"W03 checkpoints  error    checkpoints/20: {damaged}" in result.stdout
  assert "W03 checkpoints  warning  checkpoints/10: " in result.stdout
