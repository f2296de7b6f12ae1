"""What version 0.1.0 wrote: a workdir is resumed, exported and a teacher, all else is read.

stored/run_0_1_0.tar.gz holds the prepared text, the workdir after 2 of 4 steps, and the metrics of
all 4 steps. stored/outputs_0_1_0.tar.gz holds what 0.1.0 wrote of that run: the scores of step 4,
its exported folder, and that folder's `evaluate --grid` on the two tasks beside it. Never write
them anew: they stand for the files that users have.
"""

import functools
import json
import pathlib
import subprocess
import sys
import tarfile

import numpy as np
import pytest

from mlembed_jax import evaluate_model
from mlembed_jax.config import flatten
from mlembed_jax.config_fields import OLDER
from mlembed_jax.data import catalog
from mlembed_jax.data.languages import language_key
from mlembed_jax.errors import ConfigError, DataError, LoadError
from mlembed_jax.eval import scoring
from mlembed_jax.eval.evaluation import Evaluation
from mlembed_jax.files import write_json
from mlembed_jax.hf import own_file, parity
from mlembed_jax.inference import Encoder
from mlembed_jax.workdir import Run, StepScores
from tests.runs import ENVIRONMENT, ROOT, lines

STORED = pathlib.Path(__file__).parent / "stored"
# Another machine rounds in another way; the losses of a forgotten state differ by more than 0.1.
TOLERANCE = 1e-3
TASKS = ["heldout/bitext.parquet", "heldout/intents.parquet"]


def unpack(name, folder):
  with tarfile.open(STORED / f"{name}.tar.gz") as archive:
    archive.extractall(folder, filter="data")
  return folder / name


@pytest.fixture
def stored(tmp_path):
  return unpack("run_0_1_0", tmp_path)


@pytest.fixture
def outputs(tmp_path):
  return unpack("outputs_0_1_0", tmp_path)


def call(module, *flags):
  command = [sys.executable, "-m", f"mlembed_jax.{module}", *map(str, flags)]
  result = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
  assert result.returncode == 0, result.stderr
  return result


def flags_of(run, dataset):
  """Returns the command line that gives the configuration of a stored run."""
  values = flatten(run.config) | {"data.dataset": str(dataset)}
  return [f"--config.{name}={value}" for name, value in values.items()]


def test_it_goes_on_to_the_losses_it_would_have_had(stored):
  run = Run.load(stored / "workdir")
  flags = flags_of(run, stored / "dataset")
  call("train", "--config", ROOT / "configs/base.py", "--workdir", stored / "workdir", *flags)
  expected = [json.loads(line) for line in (stored / "metrics_of_all_steps.jsonl").open()]
  found = lines(stored / "workdir")
  assert [line["step"] for line in found] == [1, 2, 3, 4]
  losses = [[line["loss"] for line in of] for of in (found, expected)]
  np.testing.assert_allclose(*losses, rtol=TOLERANCE)


def test_it_is_exported_and_encodes(stored, tmp_path):
  made = call("export", "--checkpoint", stored / "workdir", "--out", tmp_path / "out")
  assert "no ranges of int8 vectors are stored, as 0 training texts" in made.stdout
  vectors = Encoder.load(tmp_path / "out").encode(["one two", "eins zwei"])
  np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)


def test_it_teaches(stored, tmp_path):
  flags = [
    *flags_of(Run.load(stored / "workdir"), stored / "dataset"),
    f"--config.kd.teacher={stored / 'workdir'}",
    "--config.train.steps=2",
  ]
  call("train", "--config", ROOT / "configs/base.py", "--workdir", tmp_path / "student", *flags)
  assert all(line["distillation_loss"] > 0 for line in lines(tmp_path / "student"))


def test_fields_that_joined_later_have_their_older_values(stored):
  path = stored / "workdir/run.json"
  value = json.loads(path.read_text())
  assert "format_version" not in value  # the stored one is older than it
  for name in OLDER:
    *groups, field = name.split(".")
    group = functools.reduce(lambda found, key: found.get(key, {}), groups, value["config"])
    group.pop(field, None)  # 0.1.0 had no model.family, but two switches
  write_json(path, value)
  loaded = flatten(Run.load(stored / "workdir").config)
  assert {name: loaded[name] for name in OLDER} == OLDER


def test_switches_that_are_those_of_no_family_are_refused(stored):
  path = stored / "workdir/run.json"
  value = json.loads(path.read_text())
  value["config"]["model"]["qkv_bias"] = True
  write_json(path, value)
  with pytest.raises(ConfigError, match=r"run.json: model.qkv_bias: True beside model.qk_norm = T"):
    Run.load(stored / "workdir")


@pytest.mark.parametrize("version", [2, 0, "1", True])
def test_run_json_of_another_format_is_refused(stored, version):
  path = stored / "workdir/run.json"
  write_json(path, json.loads(path.read_text()) | {"format_version": version})
  with pytest.raises(ConfigError, match=rf"run.json: format_version {version!r} .*upgrade"):
    Run.load(stored / "workdir")


@pytest.mark.filterwarnings("ignore:1 of 1 texts are cut")
def test_its_exported_folder_gives_the_vectors_it_gave(outputs):
  encoder = Encoder.load(outputs / "exported")
  items = json.loads((outputs / "exported/parity.json").read_text())["items"]
  assert len(items) > 10
  for item in items:
    encoder.max_seq_length = item.get("max_length", 128)
    found = encoder.encode(item["text"], item["prompt_name"])
    np.testing.assert_allclose(found, parity.embedding(item), atol=1e-4, err_msg=item["id"])


def test_its_scores_of_a_step_are_read_and_written_with_depth_for_exit(outputs):
  path = outputs / "eval/step_4.json"
  found, value = StepScores.load(outputs, 4), json.loads(path.read_text())
  assert found.tasks == value["tasks"] and list(found.tasks) == TASKS
  scores = [score | {"depth": score["exit"]} for score in value["scores"]]
  assert [vars(score) | {"exit": score.depth} for score in found.scores] == scores
  found.save(outputs)
  assert StepScores.load(outputs, 4) == found
  written = json.loads(path.read_text())
  assert written["scores"] == [vars(score) for score in found.scores]
  assert written["format_version"] == 1


def test_its_scores_json_is_read(outputs):
  found = Evaluation.load(outputs / "scores/scores.json")
  assert (found.model, [task.name for task in found.tasks]) == ("tiny", TASKS)
  assert len({(score.task, *score.size) for score in found.scores}) == 2 * 2 * 2 * 2 * 3
  assert [cost.depth for cost in found.costs.parameters] == [1, 2, 1, 2]
  assert [latency.depth for latency in found.costs.latency_ms] == [1, 2]


def test_an_evaluation_that_0_1_0_began_goes_on(outputs, monkeypatch, capsys):
  """The names of its files are hashes, of the times of the exported files, too."""
  monkeypatch.setattr(scoring, "__version__", "0.1.0")  # it is hashed
  monkeypatch.setattr(scoring, "score_task", None)  # nothing is left to score
  before = Evaluation.load(outputs / "scores/scores.json")
  found = evaluate_model(str(outputs / "exported"), [outputs / "tasks/heldout"], outputs / "scores")
  assert [vars(score) | {"by_language": None} for score in found.scores] == [
    vars(score) | {"by_language": None} for score in before.scores
  ]
  assert [score.by_language for score in found.scores] == [
    {language_key(tag): value for tag, value in score.by_language.items()}
    for score in before.scores
  ]
  assert found.tasks == before.tasks
  assert len(list((outputs / "scores/tasks").iterdir())) == 2
  assert "kept as an earlier version scored them, without queries at" in capsys.readouterr().err


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ('{"format_version": 2}', "format_version 2 .*upgrade"),
    ("[]", "no JSON object"),
    ("{}", "sco"),
  ],
)
def test_scores_that_cannot_be_meant_are_refused(tmp_path, text, message):
  (tmp_path / "eval").mkdir()
  (tmp_path / "eval/step_4.json").write_text(text)
  with pytest.raises(ConfigError, match=rf"step_4.json: .*{message}"):
    StepScores.load(tmp_path, 4)


def test_catalog_of_another_format_is_refused(stored):
  path = stored / "dataset/catalog.json"
  value = json.loads(path.read_text())
  value["plan"]["version"] += 1
  write_json(path, value)
  with pytest.raises(DataError, match="prepared by another version"):
    catalog.load_catalog(stored / "dataset")


@pytest.mark.parametrize(
  ("text", "message"),
  [('{"format_version": 2}', "format_version 2"), ("[]", "no JSON object"), ("{", "again")],
)
def test_mlembed_json_that_cannot_be_meant_is_refused(tmp_path, text, message):
  (tmp_path / own_file.NAME).write_text(text)
  with pytest.raises(LoadError, match=rf"mlembed.json.*{message}"):
    own_file.read(tmp_path)
