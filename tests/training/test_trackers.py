"""Runs as the real libraries of the trackers read them back; trackers that fail or hang."""

import collections
import dataclasses
import json
import pathlib
import signal
import sys
import threading
import time

import mlflow
import pytest
import wandb
from wandb.proto import wandb_internal_pb2

from mlembed_jax import train_model
from mlembed_jax.config import flatten, from_mapping
from mlembed_jax.errors import ConfigError
from mlembed_jax.slice_scores import SliceScore
from mlembed_jax.training import trackers
from mlembed_jax.workdir import StepScores
from tests import runs
from tests.data.test_prepare_command import wait_until
from tests.material import config_dict
from tests.runs import SMALL, lines, run, start, wait_for_step
from tests.test_train import scalars

ALL = "('tensorboard','wandb','mlflow')"
BLOCK, HEADER = 32_768, 7  # of the log format of LevelDB, which W&B writes after 7 bytes of its own


def wandb_records(path):
  """Yields the records of a .wandb file: each part has checksum, length and type before it."""
  data, at, parts = path.read_bytes(), 7, b""
  assert data[:4] == b":W&B"
  while at + HEADER <= len(data):
    if (left := BLOCK - at % BLOCK) < HEADER:
      at += left
      continue
    size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
    if at + HEADER + size > len(data):
      return  # it is being written
    parts += data[at + HEADER : at + HEADER + size]
    at += HEADER + size
    if kind in (1, 4):  # whole, or the last part
      yield wandb_internal_pb2.Record.FromString(parts)
      parts = b""


def ended_records(path):
  """Returns the records of a run that has ended, whose file W&B's own process writes to its end."""
  wait_until(lambda: [r for r in wandb_records(path) if r.HasField("exit")])
  return wandb_records(path)


def wandb_runs(workdir):
  """Returns {run id: lines}, each {name: value}, of all starts in their order."""
  found = collections.defaultdict(list)
  for path in sorted(workdir.glob("wandb/offline-run-*/*.wandb")):
    name = None
    for record in ended_records(path):
      if record.HasField("run"):
        name = record.run.run_id
      elif record.HasField("history"):
        items = {i.key or ".".join(i.nested_key): i.value_json for i in record.history.item}
        found[name].append({k: json.loads(v) for k, v in items.items() if not k.startswith("_")})
  return found


def mlflow_runs(workdir):
  client = mlflow.MlflowClient(f"sqlite:///{workdir}/mlflow.db")
  experiment = client.get_experiment_by_name(trackers.PROJECT)
  return client, client.search_runs([experiment.experiment_id])


@pytest.fixture(scope="module")
def stopped(data, tmp_path_factory):
  """A workdir whose run was stopped after step 7 and went on to step 12."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(runs.ENVIRONMENT, "WANDB_MODE", "offline")
    workdir = tmp_path_factory.mktemp("tracked")
    flags = SMALL | {"train.trackers": ALL, "train.steps": 60, "train.checkpoint_every": 50}
    flags |= {"data.heldout": "('heldout/bitext*',)", "data.manifest": data / "manifest.json"}
    process = start(data, workdir, **flags)
    wait_for_step(workdir, 7)
    process.send_signal(signal.SIGTERM)
    assert process.wait(300) == 143
    result = run(data, workdir, **flags)
    assert result.returncode == 0, result.stderr
    return workdir


def expected(workdir):
  """Returns {step: numbers} of metrics.jsonl and of the scores of every slice."""
  found = {line["step"]: trackers.flat_values(line) for line in lines(workdir)}
  for step in (0, 60):
    scores = StepScores.load(workdir, step).scores
    assert {s.dim for s in scores} == {8, 16, 48} and len(scores) == 3
    named = {
      f"eval/{s.task}/{s.metric}/{f'dim_{s.dim}' if s.dim != 48 else 'full'}": s.score
      for s in scores
    }
    found[step] = found.get(step, {}) | named
  return found


def test_wandb_has_one_run_with_the_numbers_of_metrics_jsonl(stopped):
  found_runs = wandb_runs(stopped)
  assert len(list(stopped.glob("wandb/offline-run-*"))) == 2 and len(found_runs) == 1
  found = collections.defaultdict(dict)
  for line in found_runs.popitem()[1]:
    found[line.pop("step")].update(line)
  assert found == expected(stopped)


def test_mlflow_has_one_run_with_the_numbers_of_metrics_jsonl(stopped):
  client, (only,) = mlflow_runs(stopped)
  assert only.info.status == "FINISHED" and only.data.params["model.layers"] == "2"
  found = collections.defaultdict(dict)
  for name in only.data.metrics:
    for metric in client.get_metric_history(only.info.run_id, name):
      found[metric.step][name] = metric.value
  assert found == expected(stopped)


def test_tensorboard_has_every_step_once(stopped):
  assert scalars(stopped / "tensorboard")["loss"] == list(range(1, 61))
  board = scalars(stopped / "tensorboard/eval")
  assert board["heldout/bitext.parquet/f1/full"] == [0, 60]


def test_steps_that_come_again_are_kept(tmp_path, monkeypatch):
  """W&B would drop what has a lower step than the line before."""
  monkeypatch.setenv("WANDB_MODE", "offline")
  tracker = trackers.WandB(tmp_path, None)
  for step, loss in ((3, 0.3), (4, 0.4), (3, 0.5)):
    tracker.log(step, {"loss": loss})
  tracker.close(finished=True)
  (found,) = wandb_runs(tmp_path).values()
  assert [(line["step"], line["loss"]) for line in found] == [(3, 0.3), (4, 0.4), (3, 0.5)]


def test_a_run_of_the_calling_program_stays_its_own(tmp_path, monkeypatch):
  monkeypatch.setenv("WANDB_MODE", "offline")
  theirs = wandb.init(project="mine", dir=str(tmp_path / "theirs"))
  tracker = trackers.WandB(tmp_path, None)
  tracker.log(1, {"loss": 0.5})
  tracker.close(finished=True)
  theirs.log({"their_loss": 1.0})  # it is still open
  theirs.finish()
  assert tracker.run_id != theirs.id
  assert [line["loss"] for line in wandb_runs(tmp_path)[tracker.run_id]] == [0.5]


def test_an_error_without_a_message_keeps_no_run_from_going_on(capsys):
  with trackers._told("wandb", resumed=True):
    raise TimeoutError
  assert "WARNING: wandb cannot begin (TimeoutError: TimeoutError)" in capsys.readouterr().err


@pytest.fixture(scope="module")
def of_mlflow(tmp_path_factory):
  return trackers.MLflow(tmp_path_factory.mktemp("mlflow"), None)


def test_mlflow_takes_names_that_it_would_refuse(of_mlflow):
  of_mlflow.log(1, {"loss_by_dataset/a#b?.parquet": 1.0, "loss_by_dataset/中文/é.csv": 2.0})
  assert of_mlflow._client.get_run(of_mlflow.run_id).data.metrics == {
    "loss_by_dataset/a_23_b_3f_.parquet": 1.0,
    "loss_by_dataset/中文/é.csv": 2.0,
  }


def test_mlflow_goes_on_with_changed_settings_and_begins_anew_where_the_run_is_gone(
  of_mlflow, tiny, monkeypatch, capsys
):
  uri = of_mlflow._client.tracking_uri
  monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
  of_mlflow.set_config(tiny)
  again = trackers.MLflow("unused", of_mlflow.run_id)
  again.set_config(dataclasses.replace(tiny, train=dataclasses.replace(tiny.train, log_every=7)))
  assert again.run_id == of_mlflow.run_id
  params = again._client.get_run(again.run_id).data.params
  assert {name: str(value) for name, value in flatten(tiny).items()} == params
  other = trackers.MLflow(pathlib.Path("work"), "0" * 32)
  assert other.run_id != "0" * 32 and "it gets a new one" in capsys.readouterr().err


def test_a_service_that_is_gone_ends_a_new_run_but_none_that_goes_on(
  tiny, tmp_path, monkeypatch, capsys
):
  monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
  monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
  config = dataclasses.replace(tiny, train=dataclasses.replace(tiny.train, trackers=("mlflow",)))
  with (
    pytest.raises(ConfigError, match=r"train.trackers: mlflow cannot begin .*MLFLOW_TRACKING_URI"),
    trackers.tracked(config, tmp_path, resumed=False),
  ):
    pass
  with trackers.tracked(config, tmp_path, resumed=True) as tracking:
    tracking.log({"step": 1, "loss": 0.5})
  assert "WARNING: mlflow cannot begin" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_missing_package_is_told_before_any_work(data, tmp_path, monkeypatch, name):
  monkeypatch.setitem(sys.modules, name, None)
  overrides = {"data.heldout": (), "data.manifest": "", "train.trackers": (name,)}
  with pytest.raises(ConfigError, match=rf'{name} is not installed: pip install "mlembed_jax\['):
    train_model(from_mapping(config_dict(data, **overrides)), tmp_path)
  assert not (tmp_path / "run.json").exists()


class Recording:
  """Keeps what it is given; fails, or waits for an event, where it is asked to."""

  def __init__(self, fails=(), waits=None):
    self.steps, self.finished, self._fails, self._waits = [], None, fails, waits

  def resume(self, step):
    self.steps.append(-step)

  def log(self, step, values):
    if self._waits:
      self._waits.wait()
    if step in self._fails:
      raise OSError(f"no network at step {step}")
    self.steps.append(step)

  def close(self, finished):
    self.finished = finished


def test_a_tracker_that_fails_is_told_once_and_hinders_nobody(capsys):
  good, bad = Recording(), Recording(fails=(2, 3))
  tracking = trackers.Trackers({"good": good, "bad": bad})
  tracking.resume(1)
  for step in (2, 3, 4):
    tracking.log({"step": step, "loss": 0.0})
  tracking.close(finished=False)
  assert good.steps == [-1, 2, 3, 4] and bad.steps == [-1, 4]
  assert good.finished is False and bad.finished is False
  said = capsys.readouterr().err.splitlines()
  assert said[0].startswith("WARNING: bad: OSError: no network at step 2. Training goes on")
  assert said[1:] == ["WARNING: bad: at least 2 entries were not taken"]


def test_a_tracker_that_hangs_delays_nothing(monkeypatch, capsys):
  monkeypatch.setattr(trackers, "CLOSE_S", 0.3)
  monkeypatch.setattr(trackers, "MOST_WAITING", 5)
  release, good = threading.Event(), Recording()
  tracking = trackers.Trackers({"hangs": Recording(waits=release), "good": good})
  start = time.monotonic()
  for step in range(1, 101):
    tracking.log({"step": step, "loss": 0.0})
    wait_until(lambda step=step: good.steps[-1:] == [step])  # the good one can follow
  tracking.close(finished=True)
  release.set()
  assert time.monotonic() - start < 30 and good.steps == list(range(1, 101))
  said = capsys.readouterr().err
  assert said.count("it is too slow") == 1 and "hangs: at least" in said and "good" not in said


def test_scores_are_named_by_what_is_cut():
  sizes = [(24, 3, 48), (24, 3, 8), (24, 1, 8), (8, 1, 8)]
  scores = [SliceScore("a.parquet", "f1", *s, "float32", i / 8, {}) for i, s in enumerate(sizes)]
  every = {
    "a.parquet/f1/full": 0.0,
    "a.parquet/f1/dim_8": 0.125,
    "a.parquet/f1/depth_1-dim_8": 0.25,
    "a.parquet/f1/rank_8-depth_1-dim_8": 0.375,
  }
  assert trackers.score_values(scores) == every
  assert [*trackers.score_values(scores, most_cuts=1)] == [*every][:2]
