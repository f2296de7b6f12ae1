"""One trainer per workdir, with real processes."""

import contextlib
import errno
import json
import os
import pathlib
import resource
import signal
import subprocess
import sys
import threading
import time

import pytest

from mlembed_jax.errors import ConfigError, StorageError, TrainingError
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
  monkeypatch.setattr(lock, "WAIT_S", 1.5)
  monkeypatch.setattr(lock, "SAY_S", 0.5)


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
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # it is a zombie until the next wait
    with WorkdirLock(tmp_path):
      assert f"process {process.pid} on " in capsys.readouterr().out


def of_another_machine(workdir, **fields):
  record = {"host": "other", "pid": 1, "boot": "b", "namespace": "n", "token": "t", "beat": 0}
  (workdir / "lock.json").write_text(json.dumps(record | fields))


def test_another_machine_that_gives_no_sign_of_life_is_replaced(tmp_path, quick, capsys):
  of_another_machine(tmp_path)
  with WorkdirLock(tmp_path):
    assert "process 1 on other, started None is gone" in capsys.readouterr().out


@contextlib.contextmanager
def another_machine_beats(workdir, beats):
  end = threading.Event()

  def beat():
    for number in range(1, beats):
      if end.wait(0.1):
        return
      of_another_machine(workdir, beat=number)
    (workdir / "lock.json").unlink()

  of_another_machine(workdir)
  thread = threading.Thread(target=beat)
  thread.start()
  try:
    yield
  finally:
    end.set()
    thread.join()


def test_another_machine_that_lives_is_left_alone(tmp_path, quick, capsys):
  start = time.monotonic()
  refused = pytest.raises(ConfigError, match="is being trained by process 1 on other")
  with another_machine_beats(tmp_path, 1000), refused:
    WorkdirLock(tmp_path)
  assert time.monotonic() - start >= lock.WAIT_S
  said = [line for line in capsys.readouterr().out.splitlines() if "waiting for" in line]
  assert len(said) >= 2 and "process 1 on other, started None still trains here" in said[0]


def test_the_end_of_another_machine_that_still_saves_is_waited_for(tmp_path, quick):
  with another_machine_beats(tmp_path, 10), WorkdirLock(tmp_path):
    assert json.loads((tmp_path / "lock.json").read_text())["pid"] == os.getpid()


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


@pytest.mark.parametrize("links", [True, False])
def test_of_two_that_find_a_stale_lock_one_takes_it_over(tmp_path, monkeypatch, links):
  """The first does so right before the second would."""
  if not links:
    monkeypatch.setattr(os, "link", without_links)
  gone = lock._this_process() | {"process_started": "1", "token": "gone", "beat": 0}
  (tmp_path / "lock.json").write_text(json.dumps(gone))
  first = []

  def after_the_first(change):
    def act(path, *args, **options):
      if path.name == "lock.json" and not first:
        first.append(None)
        first[0] = WorkdirLock(tmp_path)
      return change(path, *args, **options)

    return act

  for name in ("rename", "unlink"):
    monkeypatch.setattr(pathlib.Path, name, after_the_first(getattr(pathlib.Path, name)))
  with pytest.raises(ConfigError, match="is being trained by"):
    WorkdirLock(tmp_path)
  first[0].check()
  assert [path.name for path in tmp_path.iterdir()] == ["lock.json"]
  first[0].release()


def test_a_lock_that_was_taken_over_is_noticed_at_once(tmp_path):
  with WorkdirLock(tmp_path) as held:
    (tmp_path / "lock.json").write_text('{"token": ')  # no proof
    held.check()
    of_another_machine(tmp_path, token="another")  # the next beat is 10 s away
    with pytest.raises(TrainingError, match="was taken over by process 1 on other"):
      held.check()
    (tmp_path / "lock.json").unlink()
    with pytest.raises(TrainingError, match="was taken over"):
      held.check()


def test_a_released_lock_is_gone_and_stays_so(tmp_path, quick):
  with WorkdirLock(tmp_path) as held:
    held.release()
    time.sleep(0.2)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("links", [True, False])
def test_a_full_disk_leaves_no_lock(tmp_path, monkeypatch, links):
  if not links:
    monkeypatch.setattr(os, "link", without_links)
    monkeypatch.setattr(pathlib.Path, "write_text", lambda *_, **__: None)  # there is room for it
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))
  try:
    with pytest.raises(StorageError, match=r"File too large.* free space"):
      WorkdirLock(tmp_path)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  assert not list(tmp_path.iterdir())


def without_links(*_):
  raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))  # as gcsfuse does


def test_where_there_are_no_links_the_lock_is_held_all_the_same(tmp_path, monkeypatch):
  monkeypatch.setattr(os, "link", without_links)
  with WorkdirLock(tmp_path):
    assert [path.name for path in tmp_path.iterdir()] == ["lock.json"]
    with pytest.raises(ConfigError, match=f"is being trained by process {os.getpid()} on "):
      WorkdirLock(tmp_path)
  assert not list(tmp_path.iterdir())
