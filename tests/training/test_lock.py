"""One trainer per workdir, with real processes."""

import json
import pathlib
import signal
import subprocess
import sys
import threading
import time

import pytest

from mlembed_jax.errors import ConfigError, TrainingError
from mlembed_jax.training import lock
from mlembed_jax.training.lock import WorkdirLock

ROOT = pathlib.Path(__file__).parent.parent.parent
HOLD = """
import pathlib, sys, time
from mlembed_jax.training.lock import WorkdirLock
with WorkdirLock(pathlib.Path(sys.argv[1])):
  print("held", flush=True)
  time.sleep(600)
"""


@pytest.fixture
def quick(monkeypatch):
  monkeypatch.setattr(lock, "BEAT_S", 0.05)
  monkeypatch.setattr(lock, "STALE_S", 1.0)


def test_the_lock_is_removed_at_the_end(tmp_path):
  for _ in range(2):
    with WorkdirLock(tmp_path):
      assert (tmp_path / "lock.json").exists()
    assert not list(tmp_path.iterdir())


def test_a_live_process_is_named_and_a_killed_one_is_replaced(tmp_path, capsys):
  command = [sys.executable, "-c", HOLD, str(tmp_path)]
  with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
    assert process.stdout and process.stdout.readline() == "held\n"
    with pytest.raises(ConfigError, match=f"is being trained by process {process.pid} on "):
      WorkdirLock(tmp_path)
    process.send_signal(signal.SIGKILL)
    process.wait()
  with WorkdirLock(tmp_path):
    assert f"process {process.pid} on " in capsys.readouterr().out


def of_another_machine(workdir, **fields):
  record = {"host": "other", "pid": 1, "boot": "b", "namespace": "n", "token": "t", "beat": 0}
  (workdir / "lock.json").write_text(json.dumps(record | fields))


def test_another_machine_that_gives_no_sign_of_life_is_replaced(tmp_path, quick, capsys):
  of_another_machine(tmp_path)
  with WorkdirLock(tmp_path):
    assert "process 1 on other, started None is gone" in capsys.readouterr().out


def test_another_machine_that_lives_is_left_alone(tmp_path, quick):
  end = threading.Event()

  def beat():
    for number in range(1000):
      of_another_machine(tmp_path, beat=number)
      if end.wait(0.1):
        return

  of_another_machine(tmp_path)
  thread = threading.Thread(target=beat)
  thread.start()
  try:
    with pytest.raises(ConfigError, match="is being trained by process 1 on other"):
      WorkdirLock(tmp_path)
  finally:
    end.set()
    thread.join()


def test_a_process_that_stood_still_notices_that_it_was_replaced(tmp_path, quick):
  with WorkdirLock(tmp_path) as held:
    held.check()
    of_another_machine(tmp_path, token="another")
    time.sleep(0.5)
    with pytest.raises(TrainingError, match="was taken over by process 1 on other"):
      held.check()
  assert json.loads((tmp_path / "lock.json").read_text())["token"] == "another"


def test_a_lock_that_is_cut_short_is_replaced_when_nothing_happens(tmp_path, quick):
  (tmp_path / "lock.json").write_text('{"host": ')
  with WorkdirLock(tmp_path):
    assert json.loads((tmp_path / "lock.json").read_text())["beat"] >= 0
