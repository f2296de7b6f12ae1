"""What a run says and keeps of its data: the plan, and resume on data that changed."""

import json
import re
import shutil

import pytest

from mlembed_jax.workdir import Run
from tests import runs
from tests.material import pairs, prepare_dataset, write_parquet
from tests.runs import lines, run

twenty = runs.twenty


@pytest.fixture(scope="module")
def other_data(data, tmp_path_factory):
  """The same files, one of them a row shorter."""
  folder = tmp_path_factory.mktemp("other")
  shutil.copytree(data, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("dataset"))
  write_parquet(folder / "train/topics.parquet", pairs(95, 9))
  prepare_dataset(folder)
  return folder


def test_a_checkpoint_of_other_data_is_refused_with_the_differences(other_data, twenty):
  before = [path.read_bytes() for path in (twenty / "run.json", twenty / "metrics.jsonl")]
  changes = {"data.query_instructions": False, "data.document_instructions": 0.0}
  result = run(other_data, twenty, **changes, **{"train.steps": 24})
  assert result.returncode == 1 and "Traceback" not in result.stderr
  assert f"error: {twenty} holds a checkpoint of another run:\n" in result.stderr
  for message in (
    r"  data\.query_instructions: True in the workdir, False now\n",
    r"  dataset: [0-9a-f]{64} in the workdir, [0-9a-f]{64} now\n",
    r"  train/topics\.parquet zho-Hans: 2\d rows, 2\d per epoch in the workdir, 2\d rows, 2\d per",
    r"--accept_changed_data goes on with other data",
  ):
    assert re.search(message, result.stderr), message
  assert "bitext.parquet" not in result.stderr
  assert before == [path.read_bytes() for path in (twenty / "run.json", twenty / "metrics.jsonl")]


def test_other_data_can_be_accepted_but_no_other_model(other_data, twenty, tmp_path):
  shutil.copytree(twenty, tmp_path, dirs_exist_ok=True)
  shutil.rmtree(tmp_path / "checkpoints/20")
  accept = ["--accept_changed_data"]
  result = run(other_data, tmp_path, more=accept, **{"model.ffn": 96})
  assert result.returncode == 1 and "model.ffn: 64 in the workdir, 96 now" in result.stderr
  assert "topics.parquet" not in result.stderr
  result = run(other_data, tmp_path, more=accept)
  assert result.returncode == 0, result.stderr
  said = result.stdout.partition("going on with what was changed:\n")[2]
  assert "  dataset: " in said and "  train/topics.parquet zho-Hans: " in said
  assert [line["step"] for line in lines(tmp_path)] == list(range(1, 21))
  plans = [Run.load(workdir).plan["dataset"] for workdir in (twenty, tmp_path)]
  assert plans[0] != plans[1]
  again = run(other_data, tmp_path)  # the workdir now holds a run of the other data
  assert again.returncode == 0 and "going on with what was changed" not in again.stdout


def test_the_plan_is_printed_and_written(data, twenty, tmp_path):
  result = run(data, twenty)  # nothing is left to do
  assert result.returncode == 0
  written = json.loads((twenty / "plan.json").read_text())
  train = json.loads((data / "dataset/prepare_report.json").read_text())["files"]
  per_epoch = sum(counts["train"] // 16 for counts in train.values())
  assert written["steps"] == 20 and written["epochs"] == pytest.approx(20 / per_epoch)
  assert {f["name"]: f["rows"] for f in written["files"]} == {
    name: counts["train"] for name, counts in train.items()
  }
  assert {f["name"] for f in written["languages"]} == {
    *("deu-Latn", "rus-Cyrl", "hin-Deva", "zho-Hans")
  }
  for line in (*written["files"], *written["languages"]):
    assert line["repeats"] == pytest.approx(20 / per_epoch * line["per_epoch"] / line["rows"])
    assert re.search(rf"^{line['name']} +{line['rows']} +{line['per_epoch']} ", result.stdout, re.M)
  assert f"\n20 steps, {20 / per_epoch:.2f} epochs\n" in result.stdout
  assert (twenty / "plan.png").read_bytes().startswith(b"\x89PNG")
