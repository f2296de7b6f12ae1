"""The order of what happens around a step, with a step that only counts."""

import contextlib
import types

import pytest

from mlembed_jax import train


class Log(list):
  """Stands for checkpoints, recorder and signals; a stop comes at step `stop_at`."""

  def __init__(self, stop_at=0):
    super().__init__()
    self.stop_at = stop_at

  def record(self, batch, values, waited_s):
    self.append(f"read {batch.step + 1}")

  @contextlib.contextmanager
  def paused(self):
    self.append("paused")
    yield

  def save(self, step, state):
    self.append(f"save {step}")

  def close(self):
    self.append("close")

  def exchange(self):
    return None

  def agreed(self, signals):
    return 15 if self.stop_at and f"start {self.stop_at}" in self else 0

  def leave(self, number, saved):
    raise SystemExit(128 + number)

  def step(self, state, arrays, task):
    self.append(f"start {state.step + 1}")
    return types.SimpleNamespace(step=state.step + 1), None


def fit(monkeypatch, log, every, steps=6):
  batches = [
    types.SimpleNamespace(step=i, task_type="bitext", positives=1, arrays=dict)
    for i in range(steps)
  ]
  monkeypatch.setattr(train.read_ahead, "iterate", lambda batches, start, workers: batches[start:])
  monkeypatch.setattr(train, "put_batch", lambda arrays, mesh: arrays)
  config = types.SimpleNamespace(
    train=types.SimpleNamespace(checkpoint_every=3),
    eval=types.SimpleNamespace(every=every),
    data=types.SimpleNamespace(workers=0),
  )
  score = lambda state: log.append(f"score {state.step}")  # noqa: E731
  return train.fit(
    config, log.step, types.SimpleNamespace(step=0), batches, None, log, log, log, score
  )


def test_a_step_is_read_before_it_is_scored(monkeypatch):
  log = Log()
  assert fit(monkeypatch, log, every=2).step == 6
  # A diverged state would else be scored, and the time of step 2 count as that of scoring.
  assert log[:5] == ["start 1", "start 2", "read 1", "read 2", "paused"]
  assert [of for of in log if of.startswith("score")] == ["score 2", "score 4"]
  assert [of for of in log if of.startswith("read")] == [f"read {i}" for i in range(1, 7)]


def test_a_stop_does_not_wait_for_scores(monkeypatch):
  log = Log(stop_at=2)
  with pytest.raises(SystemExit, match="143"):
    fit(monkeypatch, log, every=2)
  assert log[-3:] == ["read 2", "save 2", "close"]


def test_steps_that_are_scored():
  config = types.SimpleNamespace(eval=types.SimpleNamespace(every=4))
  assert [n for n in range(10) if train.evaluated_at(config, n)] == [0, 4, 8]
  config.eval.every = 0
  assert [n for n in range(10) if train.evaluated_at(config, n)] == [0]
