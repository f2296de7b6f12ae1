"""Reading ahead: the same batches from processes, and none lost where a process dies or stalls."""

import multiprocessing
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest

from mlembed_jax.data import loader, read_ahead
from mlembed_jax.errors import DataError
from tests.data.test_loader import same
from tests.data.test_prepare_command import ENVIRONMENT, ROOT, alive, descendants, wait_until
from tests.material import batches_of


@pytest.fixture
def dataset(data):
  return data / "dataset"


@pytest.fixture(autouse=True)
def no_process_is_left():
  before = set(multiprocessing.active_children())
  yield
  end = time.monotonic() + 10
  while left := set(multiprocessing.active_children()) - before:
    assert time.monotonic() < end, left
    time.sleep(0.05)


@pytest.mark.parametrize(("start", "workers"), [(0, 0), (0, 2), (17, 0), (17, 1), (17, 3)])
def test_iteration_from_any_step_equals_random_access(dataset, start, workers):
  batches = batches_of(dataset, steps=start + 9)
  found = list(read_ahead.iterate(batches, start, workers))
  assert [batch.step for batch in found] == list(range(start, start + 9))
  assert all(same(batch, batches[batch.step]) for batch in found)


def test_nothing_is_read_at_the_end_of_a_run(dataset):
  assert list(read_ahead.iterate(batches_of(dataset, steps=5), 5, 2)) == []


def test_a_run_that_is_left_ends_its_processes(dataset):
  found = read_ahead.iterate(batches_of(dataset), 0, 2)
  assert next(found).step == 0 and len(multiprocessing.active_children()) >= 2
  found.close()


def disturb(dataset, number):
  """Returns 60 batches read while one of two processes gets a signal at step 5, and which ones."""
  before = set(multiprocessing.active_children())
  batches, found = batches_of(dataset, steps=60), []
  for batch in read_ahead.iterate(batches, 0, 2):
    found.append(batch)
    if batch.step == 5:
      workers = sorted(set(multiprocessing.active_children()) - before, key=lambda p: p.pid)
      assert len(workers) == 2
      os.kill(workers[0].pid, number)
  assert [batch.step for batch in found] == list(range(60))
  assert all(same(batch, batches[batch.step]) for batch in found)


ENDLESS = """
import pathlib, sys, time
from mlembed_jax.data import read_ahead
from tests.material import batches_of
if __name__ == "__main__":
  found = read_ahead.iterate(batches_of(pathlib.Path(sys.argv[1])), 0, 2)
  print(next(found).step, flush=True)
  time.sleep(600)
"""


def test_no_worker_hears_the_signals_of_a_terminal(dataset, tmp_path):
  """Of a fresh process: the first worker starts with what multiprocessing starts once."""
  code = f"""
import multiprocessing, pathlib, pickle
from mlembed_jax.data import read_ahead
if __name__ == "__main__":
  batches = pickle.loads(pathlib.Path({str(tmp_path / "batches")!r}).read_bytes())
  iterator = read_ahead.iterate(batches, 0, 2)
  next(iterator)
  for worker in multiprocessing.active_children():
    status = pathlib.Path(f"/proc/{{worker.pid}}/status").read_text().split()
    print(status[status.index("SigBlk:") + 1])
  iterator.close()
"""
  (tmp_path / "batches").write_bytes(pickle.dumps(batches_of(dataset)))
  (tmp_path / "script.py").write_text(code)
  done = subprocess.run(
    [sys.executable, tmp_path / "script.py"],
    capture_output=True,
    text=True,
    check=True,
    timeout=120,
    env=ENVIRONMENT,
    cwd=ROOT,
  )
  masks = [int(mask, 16) for mask in done.stdout.split()]
  both = 1 << (signal.SIGINT - 1) | 1 << (signal.SIGTERM - 1)
  assert len(masks) == 2 and all(mask & both == both for mask in masks)


def test_processes_end_soon_after_a_run_that_was_killed(dataset, tmp_path):
  (tmp_path / "endless.py").write_text(ENDLESS)
  arguments = [sys.executable, str(tmp_path / "endless.py"), str(dataset)]
  process = subprocess.Popen(arguments, env=ENVIRONMENT, cwd=ROOT, stdout=subprocess.PIPE)
  assert process.stdout.readline() == b"0\n"
  below = descendants(process.pid)
  assert len(below) >= 2
  process.kill()
  process.communicate()
  wait_until(lambda: not any(map(alive, below)), 5)


SAID = r"warning: data worker [12] of 2, which had to read step (\d+), "


def test_a_process_that_is_killed_is_named_and_no_step_is_lost(dataset, capsys):
  disturb(dataset, signal.SIGKILL)
  (warning,) = capsys.readouterr().err.strip().splitlines()
  said = re.fullmatch(rf"{SAID}ended with exit code -9; reading step (\d+) again", warning)
  assert said and said[1] == said[2] and 7 <= int(said[1]) <= 20


def test_a_process_that_stalls_is_ended_and_no_step_is_lost(dataset, monkeypatch, capsys):
  monkeypatch.setattr(read_ahead, "STALLED_S", 12.0)
  disturb(dataset, signal.SIGSTOP)
  (warning,) = capsys.readouterr().err.strip().splitlines()
  assert re.fullmatch(
    rf"{SAID}gave nothing for 12 s and was ended; reading step \d+ again", warning
  )


class Deadly(loader.Batches):
  """Kills every process but the first at one step."""

  home = os.getpid()

  def __getitem__(self, step):
    if step == 3 and os.getpid() != self.own:
      os.kill(os.getpid(), signal.SIGKILL)
    return super().__getitem__(step)


def test_a_step_at_which_every_process_dies_ends_the_run(dataset, capsys):
  batches = batches_of(dataset, steps=20)
  deadly = Deadly.__new__(Deadly)
  deadly.__dict__ = batches.__dict__ | {"own": os.getpid()}
  found = read_ahead.iterate(deadly, 0, 2)
  steps = []
  with pytest.raises(DataError) as error:
    for batch in found:
      steps.append(batch.step)
  read = len(steps)
  assert steps == list(range(read)) and read <= 3  # what was read ahead is lost, too
  message = str(error.value)
  assert message.startswith(f"step {read + 1}: 3 data workers in turn died; data worker ")
  assert "want of memory" in message and "data.workers = 0" in message
  assert capsys.readouterr().err.count(f"reading step {read + 1} again") == 2


WITHOUT_GUARD = """
import pathlib, pickle, sys
from mlembed_jax.data import read_ahead
for batch in read_ahead.iterate(pickle.loads(pathlib.Path(sys.argv[1]).read_bytes()), 0, 1):
  print(batch.step)
"""


def test_a_script_without_a_guard_is_told_so(dataset, tmp_path):
  (tmp_path / "script.py").write_text(WITHOUT_GUARD)
  (tmp_path / "batches").write_bytes(pickle.dumps(batches_of(dataset, steps=2)))
  arguments = [sys.executable, str(tmp_path / "script.py"), str(tmp_path / "batches")]
  found = subprocess.run(arguments, env=ENVIRONMENT, cwd=ROOT, capture_output=True, text=True)
  assert found.returncode == 1 and not found.stdout
  last = found.stderr.strip().splitlines()[-1]
  assert "Put what your script does behind `if __name__ == '__main__':`, as every data" in last


def damage(folder, name):
  """Overwrites the middle of a shard; returns it."""
  (path,) = folder.glob(name)
  content = path.read_bytes()
  middle = len(content) // 3
  path.write_bytes(content[:middle] + os.urandom(middle) + content[2 * middle :])
  return path


@pytest.mark.parametrize("workers", [0, 2])
def test_a_shard_that_becomes_unreadable_ends_the_run_by_file_and_record(
  dataset, tmp_path, workers
):
  shutil.copytree(dataset, tmp_path / "dataset")
  batches = batches_of(tmp_path / "dataset", ["train/topics.parquet"], steps=200)
  path = damage(tmp_path / "dataset", "mlembed-train*00001-of-00003")
  with pytest.raises(DataError) as error:
    for _ in read_ahead.iterate(batches, 0, workers):
      pass
  message = str(error.value)
  assert re.search(rf"{re.escape(str(path))}: record \d+ cannot be read: ", message)
  assert "restore the file" in message


@pytest.mark.parametrize("change", ["cut", "gone", "empty"])
@pytest.mark.parametrize("name", ["mlembed-train.*00001-of-00003", "mlembed-documents.*-00005-*"])
def test_a_shard_that_is_cut_or_gone_is_named(dataset, tmp_path, name, change):
  shutil.copytree(dataset, tmp_path / "dataset")
  batches = batches_of(tmp_path / "dataset", ["train/topics.parquet"])
  (path,) = (p for p in (tmp_path / "dataset").iterdir() if re.fullmatch(f"{name}[^.]*", p.name))
  if change == "gone":
    path.unlink()
  else:
    path.write_bytes(path.read_bytes()[:-200] if change == "cut" else b"")
  with pytest.raises(DataError, match=rf"{re.escape(str(path))}: record \d+ cannot be read"):
    for step in range(20):
      batches[step]


def test_missing_files_are_named_when_the_dataset_is_opened(dataset, tmp_path):
  shutil.copytree(dataset, tmp_path / "dataset")
  for path in (tmp_path / "dataset").glob("mlembed-documents*"):
    path.unlink()
  message = (
    r"mlembed-documents\.array_record-00000-of-00008 is missing \(8 files in all\); copy the"
  )
  with pytest.raises(DataError, match=message):
    batches_of(tmp_path / "dataset")


def test_a_folder_that_is_no_dataset_is_refused(tmp_path):
  with pytest.raises(DataError, match=rf"data\.dataset: {tmp_path} is no prepared dataset; write"):
    batches_of(tmp_path)


def test_lengths_that_end_early_are_named(dataset, tmp_path):
  shutil.copytree(dataset, tmp_path / "dataset")
  for path in (tmp_path / "dataset").glob("mlembed-train*.lengths.npy"):
    path.write_bytes(path.read_bytes()[:140])
  with pytest.raises(DataError, match=r"lengths\.npy has 140 bytes, [\d,]+ were written"):
    batches_of(tmp_path / "dataset", shards=2)[0]


def test_reading_in_this_process_needs_no_watch_over_workers(dataset, monkeypatch, capsys):
  """A slow step in this process is no stalled worker."""
  monkeypatch.setattr(read_ahead, "STALLED_S", 0.05)
  failed = []
  monkeypatch.setattr(threading, "excepthook", failed.append)

  class Slow(loader.Batches):
    def __getitem__(self, step):
      time.sleep(0.2)
      return super().__getitem__(step)

  slow = Slow.__new__(Slow)
  slow.__dict__ = batches_of(dataset, steps=2).__dict__
  assert [batch.step for batch in read_ahead.iterate(slow, 0, 0)] == [0, 1]
  assert not failed and not capsys.readouterr().err
