"""scores.json is read back as it was written, and as version 0.1.0 wrote it."""

import dataclasses
import json

import pytest

from mlembed_jax.errors import DataError
from mlembed_jax.eval.evaluation import FORMAT, Evaluation
from mlembed_jax.files import write_json
from tests.eval import made_up


@pytest.fixture
def evaluation():
  return made_up.evaluation(depths=(4, 28), dims=(8,), ranks=(0, 64))


def test_scores_json_is_read_as_it_was_written(evaluation, tmp_path):
  path = tmp_path / "scores.json"
  evaluation.save(path)
  assert json.loads(path.read_text())["format_version"] == FORMAT
  assert Evaluation.load(path) == evaluation


def test_the_depth_was_once_called_exit(evaluation, tmp_path):
  value = dataclasses.asdict(evaluation)
  for entry in (*value["scores"], *value["costs"]["parameters"], *value["costs"]["latency_ms"]):
    entry["exit"] = entry.pop("depth")
  for score in value["scores"]:
    if not score["others"]:  # those of MTEB had none
      del score["others"]
  write_json(tmp_path / "scores.json", value)
  assert Evaluation.load(tmp_path / "scores.json") == evaluation


@pytest.mark.parametrize(
  ("text", "message"),
  [
    (f'{{"format_version": {FORMAT + 1}}}', rf"format_version {FORMAT + 1} .*upgrade"),
    ('{"format_version": 1}', "'tasks'"),
    ("[]", "no JSON object"),
    ("{", "Expecting"),
  ],
)
def test_what_cannot_be_meant_is_refused(tmp_path, text, message):
  (tmp_path / "scores.json").write_text(text)
  with pytest.raises(DataError, match=rf"scores.json: .*{message}"):
    Evaluation.load(tmp_path / "scores.json")
