"""The train command goes on after signals, damage and changes, as real processes."""

import json
import shutil
import signal
import time

import numpy as np
import pytest

from mlembed_jax.config import from_mapping
from mlembed_jax.training import optimizer
from mlembed_jax.training.metrics import Writer
from mlembed_jax.workdir import Run
from tests import runs
from tests.material import config_dict
from tests.runs import (
  SMALL,
  TIMES,
  arrays,
  assert_same_state,
  export,
  lines,
  run,
  start,
  wait_for_step,
)

twenty = runs.twenty


def test_ten_steps_and_ten_more_equal_twenty_bit_for_bit(data, twenty, tmp_path):
  shutil.copytree(twenty, tmp_path, dirs_exist_ok=True)
  shutil.rmtree(tmp_path / "checkpoints/20")
  # Evaluation on the way changes no update.
  held = {"data.heldout": "('heldout/*',)", "data.manifest": data / "manifest.json"}
  result = run(data, tmp_path, **held, **{"eval.every": 16})
  assert result.returncode == 0, result.stderr
  assert sorted(path.name for path in (tmp_path / "eval").iterdir()) == [
    "step_16.json",
    "step_20.json",
  ]
  assert_same_state(twenty, tmp_path, 20)
  untimed = [
    [{k: v for k, v in line.items() if k not in TIMES} for line in lines(w)]
    for w in (twenty, tmp_path)
  ]
  assert untimed[0] == untimed[1]


LONG = SMALL | {"train.steps": 45, "train.checkpoint_every": 15}


@pytest.fixture(scope="module")
def small(data, tmp_path_factory):
  """The workdir of 20 uninterrupted steps of one kind, with checkpoints at 10 and 20."""
  workdir = tmp_path_factory.mktemp("small")
  assert run(data, workdir, **SMALL).returncode == 0
  return workdir


@pytest.fixture(scope="module")
def long(data, tmp_path_factory):
  workdir = tmp_path_factory.mktemp("long")
  assert run(data, workdir, **LONG).returncode == 0
  return workdir


STOPS = [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, -9)]


@pytest.mark.parametrize(("sent", "status"), STOPS)
def test_a_run_that_was_killed_goes_on_exactly(data, long, tmp_path, sent, status):
  process = start(data, tmp_path, **LONG)
  wait_for_step(tmp_path, 17)
  process.send_signal(sent)
  time.sleep(0.05)
  if sent == signal.SIGTERM:
    process.send_signal(sent)  # while it saves; a Spot machine gets several
  assert process.wait(300) == status
  reached = lines(tmp_path)[-1]["step"]
  assert 17 <= reached < 45
  assert run(data, tmp_path, **LONG).returncode == 0
  assert [line["step"] for line in lines(tmp_path)] == list(range(1, 46))
  assert_same_state(long, tmp_path, 45)


def test_a_signal_before_the_first_step_ends_without_a_traceback(data, tmp_path):
  process = start(data, tmp_path, **LONG, **{"data.micro_batch": 0})
  while not (tmp_path / "plan.png").exists():  # written right before the analysis of memory
    assert process.poll() is None
    time.sleep(0.02)
  time.sleep(0.5)
  process.send_signal(signal.SIGINT)
  output, _ = process.communicate(timeout=300)
  assert process.returncode == 130
  assert output.endswith("stopped by signal 2; no step is lost, the same command goes on\n")


def test_scores_of_a_run_that_never_saved_are_not_taken_over(data, tmp_path):
  (tmp_path / "eval").mkdir()
  (tmp_path / "eval/step_0.json").write_text('{"step": 0, "scores": []}')
  short = SMALL | {"train.steps": 1, "optimizer.warmup_steps": 0}
  assert run(data, tmp_path, **short).returncode == 0
  assert not (tmp_path / "eval/step_0.json").exists()  # nothing was held out


def test_a_damaged_checkpoint_is_set_aside_and_its_steps_are_done_again(data, small, tmp_path):
  shutil.copytree(small, tmp_path, dirs_exist_ok=True)
  largest = max((tmp_path / "checkpoints/20").rglob("*"), key=lambda p: p.stat().st_size)
  content = bytearray(largest.read_bytes())
  content[len(content) // 2] ^= 1
  largest.write_bytes(content)
  exported = export("--checkpoint", tmp_path, "--out", tmp_path / "export")
  assert f"WARNING: {tmp_path}/checkpoints/20 is damaged" in exported.stdout
  assert "exported step 10" in exported.stdout and exported.returncode == 0
  assert "checkpoints/20 is damaged" in run(data, tmp_path, ["--strict_restore"], **SMALL).stderr
  result = run(data, tmp_path, **SMALL)
  assert result.returncode == 0, result.stderr
  assert f"WARNING: {tmp_path}/checkpoints/20 is damaged" in result.stdout
  assert_same_state(small, tmp_path, 20)


def test_a_cut_line_of_a_killed_run_is_dropped(tmp_path):
  (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
  Writer(tmp_path, 2, 1).close()
  assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n'


def test_a_checkpoint_of_another_run_is_refused_with_the_differences(data, twenty):
  result = run(data, twenty, **{"optimizer.learning_rate": 0.5, "model.ffn": 96})
  assert result.returncode == 1
  assert "model.ffn: 64 in the workdir, 96 now" in result.stderr
  assert "optimizer.learning_rate: 0.001 in the workdir, 0.5 now" in result.stderr
  assert "Traceback" not in result.stderr


def test_a_run_passes_over_steps_and_lowers_its_rate_and_its_history_says_so(data, small, tmp_path):
  """From step 10 on; a second start with the same rate needs no flag, and gives the same."""
  for workdir in (tmp_path / "at_once", tmp_path / "stopped"):
    shutil.copytree(small, workdir)
    lower = SMALL | {"optimizer.learning_rate": 1e-4}
    changed = ["--from_step=10", "--skip_steps=12-13,15", "--accept_changed_learning_rate"]
    assert "--accept_changed_learning_rate goes on" in run(data, workdir, **lower).stderr
    if workdir.name == "stopped":
      lower |= {"train.checkpoint_every": 4}  # a checkpoint at 12, of a step that is passed over
    result = run(data, workdir, changed, **lower)
    assert result.returncode == 0, result.stderr
    if workdir.name == "stopped":
      for step in (16, 20):
        shutil.rmtree(workdir / f"checkpoints/{step}")
      assert run(data, workdir, **lower).returncode == 0
  assert_same_state(tmp_path / "at_once", tmp_path / "stopped", 20)
  assert lines(tmp_path / "at_once")[10:][1] == {
    "step": 12,
    "nonfinite_steps": 0,
    "goodput": lines(tmp_path / "at_once")[11]["goodput"],
  }
  assert Run.load(tmp_path / "stopped").history == [
    {
      "step": 10,
      "skip_steps": [12, 13, 15],
      "optimizer.learning_rate": [1e-3, 1e-4],
      "from_step": 10,
    }
  ]
  before = arrays(small, 20)
  assert any((a != b).any() for a, b in zip(before, arrays(workdir, 20), strict=True))


def test_a_loss_spike_sends_the_run_back_and_its_steps_are_passed_over(data, long, tmp_path):
  shutil.copytree(long, tmp_path, dirs_exist_ok=True)
  for step in (30, 45):
    shutil.rmtree(tmp_path / f"checkpoints/{step}")
  result = run(data, tmp_path, **LONG, **{"train.spike_factor": 1.02})
  assert result.returncode == 0, result.stderr
  history = Run.load(tmp_path).history
  assert history and result.stdout.count("WARNING: step ") == len(history)
  skipped = Run.load(tmp_path).skipped_steps
  for entry in history:
    assert entry["skip_steps"] == list(range(entry["step"] + 1, entry["skip_steps"][-1] + 1))
    assert "times" in entry["why"] and entry["step"] in (15, 30)
  assert [line["step"] for line in lines(tmp_path)] == list(range(1, 46))
  assert {line["step"] for line in lines(tmp_path) if "loss" not in line} == skipped


def test_a_second_trainer_is_refused_and_changes_nothing(data, tmp_path):
  flags = SMALL | {"train.steps": 5000}  # more than it can do before the other one is there
  process = start(data, tmp_path, **flags)
  wait_for_step(tmp_path, 2)
  other = run(data, tmp_path, **flags, **{"optimizer.learning_rate": 0.5})
  assert other.returncode == 1
  assert f"{tmp_path} is being trained by process {process.pid} on" in other.stderr
  assert Run.load(tmp_path).config.optimizer.learning_rate == 1e-3
  process.send_signal(signal.SIGTERM)
  assert process.wait(300) == 143
  assert not (tmp_path / "lock.json").exists()


def test_a_finished_run_is_lengthened(data, small, tmp_path):
  """Its updates from step 10 on are those of a run that had that length from the start there."""
  shutil.copytree(small, tmp_path, dirs_exist_ok=True)
  longer = SMALL | {"train.steps": 30}
  refused = run(data, tmp_path, **longer)
  assert "train.steps: 20 in the workdir, 30 now" in refused.stderr
  assert "--accept_changed_length makes the run as long as that." in refused.stderr
  result = run(data, tmp_path, ["--accept_changed_length"], **longer)
  assert result.returncode == 0, result.stderr
  rates = {line["step"]: line["learning_rate"] for line in lines(tmp_path)}
  assert list(rates) == list(range(1, 31))
  assert "the run has 30 steps now" in result.stdout
  assert f"the learning rate of step 21 is {rates[21]:.2g}\n" in result.stdout
  settings = from_mapping(config_dict(data, **{"train.steps": 30})).optimizer
  expected = optimizer.schedule(settings, 30)
  np.testing.assert_allclose(
    [rates[step] for step in range(21, 31)], [expected(step) for step in range(20, 30)], rtol=1e-5
  )
  assert Run.load(tmp_path).history == [{"step": 20, "train.steps": [20, 30]}]
  assert run(data, tmp_path, **longer).returncode == 0  # needs the flag no more
  shorter = run(data, tmp_path, ["--accept_changed_length"], **SMALL | {"train.steps": 25})
  assert "they make 25 steps, and" in shorter.stderr and "at step 30" in shorter.stderr


def test_a_run_ends_early_and_its_best_checkpoint_is_exported(data, tmp_path):
  """A rate of nearly 0 leaves all scores as they were, so none after step 0 is better."""
  flags = SMALL | {"data.heldout": "('heldout/colours.parquet',)", "eval.every": 3}
  flags |= {"data.manifest": data / "manifest.json", "eval.patience": 2, "train.keep_best": 1}
  flags |= {"optimizer.learning_rate": 1e-30, "optimizer.min_learning_rate": 0.0}
  flags |= {"export.at_end": True, "export.best": True}
  for _ in range(2):  # the second start has nothing to do
    result = run(data, tmp_path, **flags)
    assert result.returncode == 0, result.stderr
    assert "eval.patience: no score of the last 2 evaluations is better than" in result.stdout
    assert "of step 0; the run ends at step 6, and goes on with" in result.stdout
    assert lines(tmp_path)[-1]["step"] == 6
  assert f"step 3 is exported to {tmp_path}/export/tiny; use it with" in result.stdout
  own = json.loads((tmp_path / "export/tiny/mlembed.json").read_text())
  assert own["training"]["step"] == 3
  for flag, step in (("best", 3), ("6", 6)):
    done = export("--checkpoint", tmp_path, "--out", tmp_path / flag, "--step", flag)
    assert f"exported step {step} to" in done.stdout
  refused = export("--checkpoint", tmp_path, "--out", tmp_path / "no", "--step", 5)
  assert f"error: --step: {tmp_path} keeps no step 5; it keeps [3, 6]" in refused.stderr


def test_a_trace_holds_the_program_of_the_step_and_changes_no_bit(data, small, tmp_path):
  result = run(data, tmp_path, **SMALL, **{"train.profile_steps": "(4,5)"})
  assert result.returncode == 0, result.stderr
  (trace,) = tmp_path.glob("profile/plugins/profile/*/*.xplane.pb")
  assert b"jit_step" in trace.read_bytes()
  assert f"steps 4 to 5 are traced in {tmp_path}/profile" in result.stderr
  assert_same_state(small, tmp_path, 20)
