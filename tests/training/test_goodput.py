"""Every second of a run is counted once, over kills and repeated steps."""

import json

import pytest

from mlembed_jax.training import goodput
from mlembed_jax.training.goodput import COMPILING, LOST, SAVING, TRAINING, Goodput


class Clock:
  """Stands for both clocks of the module."""

  def __init__(self, monkeypatch):
    self.now = 1000.0
    monkeypatch.setattr(goodput.time, "time", lambda: self.now)
    monkeypatch.setattr(goodput.time, "perf_counter", lambda: self.now)


@pytest.fixture
def clock(monkeypatch):
  return Clock(monkeypatch)


def spend(found, clock, part, seconds):
  with found.during(part):
    clock.now += seconds


def test_blocks_inside_blocks_count_once(tmp_path, clock):
  found = Goodput(tmp_path, writes=True)
  clock.now += 1
  with found.during(TRAINING):
    clock.now += 2
    spend(found, clock, COMPILING, 4)
    clock.now += 1
  assert found.shares() == pytest.approx(
    {name: 0.0 for name in goodput.PARTS}
    | {"start_up": 1 / 8, TRAINING: 3 / 8, COMPILING: 4 / 8}
    | {"stopped": 0.0}
  )


def test_work_after_the_last_save_is_lost_when_it_is_done_again(tmp_path, clock):
  first = Goodput(tmp_path, writes=True)
  first.resume(0)
  spend(first, clock, TRAINING, 10)
  first.save(5)
  spend(first, clock, TRAINING, 6)
  first.write()  # and is killed
  clock.now += 4
  second = Goodput(tmp_path, writes=True)
  second.resume(5)
  spend(second, clock, TRAINING, 6)
  spend(second, clock, SAVING, 4)
  shares = second.shares()
  assert shares[TRAINING] == pytest.approx(16 / 30) and shares[LOST] == pytest.approx(6 / 30)
  assert shares["stopped"] == pytest.approx(4 / 30) and sum(shares.values()) == pytest.approx(1)
  assert second.summary().startswith("2 starts, 0:00:30 of wall time: training 53.3%")


def test_going_back_behind_an_earlier_start_loses_all_of_it(tmp_path, clock):
  for step, seconds in ((0, 10), (5, 20)):
    found = Goodput(tmp_path, writes=True)
    found.resume(step)
    spend(found, clock, TRAINING, seconds)
    found.save(step + 5)
  back = Goodput(tmp_path, writes=True)
  back.resume(5)
  assert back.shares()[LOST] == pytest.approx(20 / 30)
  assert back.shares()[TRAINING] == pytest.approx(10 / 30)


def test_a_start_that_goes_back_by_itself_loses_what_it_trained_since(tmp_path, clock):
  found = Goodput(tmp_path, writes=True)
  found.resume(0)
  spend(found, clock, TRAINING, 10)
  found.save(5)
  spend(found, clock, TRAINING, 6)
  found.resume(5)
  spend(found, clock, TRAINING, 4)
  assert found.shares()[TRAINING] == pytest.approx(14 / 20)
  assert found.shares()[LOST] == pytest.approx(6 / 20)


def test_a_damaged_file_is_said_and_begun_anew(tmp_path, clock, capsys):
  found = Goodput(tmp_path, writes=True)
  clock.now += 1
  found.write()
  path = tmp_path / "goodput.json"
  path.write_text(path.read_text().replace('"step": 0', '"step": 7'))
  assert Goodput(tmp_path, writes=True).shares()["start_up"] == 0
  assert "is not what was written" in capsys.readouterr().out
  path.write_text(json.dumps({"format_version": 1}))
  Goodput(tmp_path, writes=True)
  assert "WARNING" in capsys.readouterr().out
