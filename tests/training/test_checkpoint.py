"""Checkpoints of small states: every damaged byte is noticed, and what stays after a save."""

import pathlib
import shutil
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlembed_jax.errors import ConfigError, StorageError
from mlembed_jax.slice_scores import SliceScore
from mlembed_jax.training import checkpoint, saved
from mlembed_jax.training.checkpoint import Checkpoints, Retention
from mlembed_jax.training.train_state import TrainState
from mlembed_jax.workdir import StepScores, early_end, mean_scores

ROOT = pathlib.Path(__file__).parent.parent.parent


def state(step):
  table = jax.random.normal(jax.random.key(step), (64, 48))
  moments = {"mu": table * 0.1, "nu": jnp.square(table)}
  return TrainState(jnp.int32(step), {"table": table}, {}, moments)


ABSTRACT = jax.tree.map(
  lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state(0)
)


def assert_equal(found, expected):
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
    np.testing.assert_array_equal(a, b)


def save(workdir, *steps, newest=3, **others):
  checkpoints = Checkpoints(Retention(workdir, newest, **others))
  for step in steps:
    checkpoints.save(step, state(step))
  checkpoints.close()


def restore(workdir, **options):
  checkpoints = Checkpoints(Retention(workdir, 3))
  try:
    step = checkpoints.newest_whole(**options)
    return step and checkpoints.restore(step, ABSTRACT)
  finally:
    checkpoints.close()


@pytest.fixture(scope="module")
def two(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("two")
  save(workdir, 1, 2)
  return workdir


def flip(path, at):
  data = bytearray(path.read_bytes())
  data[int(at * len(data))] ^= 1 << int(at * 997) % 8
  path.write_bytes(data)


FILES = ("d", "ocdbt.process_0/d", "manifest.ocdbt", "_METADATA", "_sharding", saved.DIGESTS)
DAMAGES = {
  "flip": lambda path: flip(path, 0.5),
  "first byte": lambda path: flip(path, 0.0),
  "cut": lambda path: path.write_bytes(path.read_bytes()[:-9]),
  "emptied": lambda path: path.write_bytes(b""),
  "deleted": pathlib.Path.unlink,
}


def file_of(workdir, step, name):
  path = workdir / "checkpoints" / str(step) / "default" / name
  return max(path.iterdir(), key=lambda p: p.stat().st_size) if path.is_dir() else path


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("file", FILES)
def test_a_damaged_checkpoint_is_passed_over(two, tmp_path, capsys, file, damage):
  workdir = shutil.copytree(two, tmp_path / "w")
  DAMAGES[damage](file_of(workdir, 2, file))
  if (file, damage) == (saved.DIGESTS, "deleted"):
    assert_equal(restore(workdir), state(2))  # nothing that is read is damaged
    assert "has no digests, as in 0.1.0" in capsys.readouterr().out
    return  # the workdir has no run.json, which says since when there are digests
  step, _ = saved.read_newest(workdir, lambda step: step)  # as export and teacher read it
  assert step == 1 and "It is passed over" in capsys.readouterr().out
  with pytest.raises(ConfigError, match=r"checkpoints/2 is damaged.*--strict_restore"):
    restore(workdir, strict=True)
  assert_equal(restore(workdir), state(1))
  assert f"WARNING: {workdir}/checkpoints/2 is damaged" in capsys.readouterr().out
  assert [path.name.split("-")[0] for path in (workdir / "damaged").iterdir()] == ["2"]
  save(workdir, 2)  # the run comes to that step again
  assert_equal(restore(workdir), state(2))


def test_no_single_flipped_bit_of_the_arrays_is_restored(two, tmp_path):
  """orbax itself gives other numbers for most of these."""
  workdir = shutil.copytree(two, tmp_path / "w")
  file = file_of(workdir, 2, "ocdbt.process_0/d")
  whole, folder = file.read_bytes(), saved.folder_of(workdir, 2)
  for at in np.random.default_rng(0).uniform(size=200):
    file.write_bytes(whole)
    flip(file, at)
    assert "has other content than was written" in (saved.damage(folder) or "")
  file.write_bytes(whole)
  assert saved.damage(folder) is None


def test_without_any_whole_checkpoint_nothing_is_started(two, tmp_path):
  workdir = shutil.copytree(two, tmp_path / "w")
  for step in (1, 2):
    flip(file_of(workdir, step, "d"), 0.5)
  with pytest.raises(ConfigError, match=r"no checkpoint is whole: .*/2 is .*/1 is damaged"):
    saved.read_newest(workdir, lambda step: step)
  for _ in range(2):  # a launcher that starts it again does not begin anew either
    with pytest.raises(ConfigError, match="no checkpoint is left, damaged/ holds"):
      restore(workdir)


def test_what_cannot_be_read_for_another_reason_is_not_moved(two, tmp_path):
  """As where memory or the storage fail: only files that differ from their digests are damaged."""
  workdir = shutil.copytree(two, tmp_path / "w")
  file_of(workdir, 2, saved.DIGESTS).unlink()
  file_of(workdir, 2, "manifest.ocdbt").write_bytes(b"")
  with pytest.raises(ConfigError, match=r"checkpoints/2 cannot be read: .* --from_step"):
    restore(workdir)
  with pytest.raises(ConfigError, match="checkpoints/2 cannot be read"):
    saved.read_newest(workdir, lambda step: 1 / (2 - step))
  assert saved.steps_of(workdir) == [1, 2] and not (workdir / "damaged").exists()


def test_a_checkpoint_is_complete_before_its_digests_are(tmp_path, monkeypatch, capsys):
  """As where a machine is taken away right after the save."""
  monkeypatch.setattr(checkpoint, "digest_checkpoint", lambda _: None)
  save(tmp_path, 1)
  assert_equal(restore(tmp_path), state(1))
  assert "as the run ended right after the save" in capsys.readouterr().out


def test_going_back_sets_later_ones_aside(two, tmp_path):
  workdir = shutil.copytree(two, tmp_path / "w")
  checkpoints = Checkpoints(Retention(workdir, 3))
  with pytest.raises(ConfigError, match=r"has no step 7; it has \[1, 2\]"):
    checkpoints.go_back(7)
  checkpoints.go_back(1)
  assert checkpoints.latest() == 1
  checkpoints.save(2, state(5))
  checkpoints.close()
  assert_equal(restore(workdir), state(5))


def test_newest_multiples_and_best_stay(tmp_path):
  scores = {1: 5.0, 2: 9.0, 3: float("nan"), 4: 8.0, 5: 7.0, 6: 1.0}
  for step, score in scores.items():
    whole = SliceScore("task", "f1", 8, 2, 16, "float32", score, {}, {})
    cut = SliceScore("task", "f1", 8, 1, 16, "float32", 100.0 - step, {}, {})
    StepScores(step, {}, [whole, cut]).save(tmp_path)
  assert mean_scores(tmp_path) == {2: 9.0, 4: 8.0, 5: 7.0, 1: 5.0, 6: 1.0}
  assert list(mean_scores(tmp_path)) == [2, 4, 5, 1, 6]
  save(tmp_path, *scores, newest=1, every=5, best=2)
  assert saved.steps_of(tmp_path) == [2, 4, 5, 6]


def scored(workdir, step, **tasks):
  found = [SliceScore(name, "f1", 8, 2, 16, "float32", s, {}, {}) for name, s in tasks.items()]
  StepScores(step, dict.fromkeys(tasks, "digest"), found).save(workdir)


def test_scores_of_other_files_are_not_compared(tmp_path):
  for step, tasks in enumerate(({"a": 0.7}, {"a": 0.72, "b": 0.2}, {"a": 0.75, "b": 0.25})):
    scored(tmp_path, step, **tasks)
  assert list(mean_scores(tmp_path)) == [2, 1]
  assert early_end(tmp_path, 2, 2) is None


def test_a_run_is_over_after_so_many_scores_that_are_not_better(tmp_path):
  for step, score in ((0, 0.5), (10, 0.7), (20, 0.7), (30, 0.6)):
    scored(tmp_path, step, a=score)
  assert early_end(tmp_path, 2, 30) == (
    "no score of the last 2 evaluations is better than 70.00 of step 10; the run ends at step 30, "
    "and goes on with a larger eval.patience"
  )
  assert early_end(tmp_path, 3, 30) is None
  assert early_end(tmp_path, 2, 20) is None  # it was taken back to this step


def test_the_best_kept_step_is_chosen_and_a_better_one_is_named(tmp_path, capsys):
  for step, score in ((0, 0.8), (1, 0.7), (2, 0.7), (3, 0.6)):
    scored(tmp_path, step, a=score)
  save(tmp_path, 1, 2, 3, newest=1, best=1)
  assert saved.steps_of(tmp_path) == [1, 3]
  assert saved.chosen_step(tmp_path, "best") == 1
  assert "so training made the scores worse" in capsys.readouterr().out
  assert saved.chosen_step(tmp_path, 3) == 3
  with pytest.raises(ConfigError, match=r"keeps no step 2; it keeps \[1, 3\]"):
    saved.chosen_step(tmp_path, 2)


def test_a_checkpoint_that_is_read_stays(tmp_path):
  save(tmp_path, 1, newest=1)

  def read(step):
    save(tmp_path, 2, 3, newest=1)
    return saved.steps_of(tmp_path)

  assert saved.read_newest(tmp_path, read) == (1, [1, 3])
  save(tmp_path, 4, newest=1)
  assert saved.steps_of(tmp_path) == [4]


def test_a_checkpoint_that_was_deleted_meanwhile_is_replaced_by_the_next(two, tmp_path, capsys):
  workdir = shutil.copytree(two, tmp_path / "w")

  def read(step):
    if step == 2:
      save(workdir, 3)
      shutil.rmtree(saved.folder_of(workdir, 2))
      raise FileNotFoundError
    return step

  assert saved.read_newest(workdir, read) == (3, 3)
  assert "WARNING" not in capsys.readouterr().out


def test_what_a_killed_save_left_is_removed(two, tmp_path):
  workdir = shutil.copytree(two, tmp_path / "w")
  half = workdir / "checkpoints/3.orbax-checkpoint-tmp"
  shutil.copytree(saved.folder_of(workdir, 2), half)
  assert_equal(restore(workdir), state(2))
  save(workdir, 3)
  assert not half.exists()
  assert_equal(restore(workdir), state(3))


def test_it_is_removed_before_a_program_can_end(tmp_path):
  """A thread that is still at it then writes a traceback below the sentence of an error."""
  for step in range(50):
    (tmp_path / f"checkpoints/{step}.orbax-checkpoint-tmp-1/default").mkdir(parents=True)
  before = set(threading.enumerate())
  checkpoints = Checkpoints(Retention(tmp_path, 3))
  assert not list((tmp_path / "checkpoints").iterdir())
  assert set(threading.enumerate()) == before
  checkpoints.close()


def test_a_save_into_a_folder_that_is_gone_says_what_goes_on(tmp_path):
  checkpoints = Checkpoints(Retention(tmp_path / "w", 3))
  checkpoints.save(1, state(1))
  checkpoints.wait()
  (tmp_path / "w").rename(tmp_path / "elsewhere")
  with pytest.raises(
    StorageError, match=r"w/checkpoints.*: No such file .*; bring the folder back"
  ):
    checkpoints.save(2, state(2))


def test_a_save_that_has_no_room_says_how_much_it_needs(two, tmp_path, monkeypatch):
  checkpoints = Checkpoints(Retention(shutil.copytree(two, tmp_path / "w"), 3))
  usage = shutil.disk_usage(tmp_path)._replace(free=20_000)
  monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
  with pytest.raises(StorageError, match=r"needs 0.\d\d MB, 0.02 MB are free.*goes on from step 2"):
    checkpoints.save(3, state(3))


def test_a_checkpoint_that_is_held_twice_stays_until_the_last_release(two, tmp_path):
  workdir = pathlib.Path(shutil.copytree(two, tmp_path / "w"))
  step, _ = saved.read_newest(workdir, lambda found: saved.hold(workdir, found, "teacher"))
  assert saved.held(workdir) == {step}  # the one of the reading has ended
  with saved.holding(workdir, step):
    pass
  assert saved.held(workdir) == {step}
  saved.release(workdir, step, "teacher")
  assert not saved.held(workdir)


def test_all_processes_read_the_step_that_the_first_one_finds(two, monkeypatch):
  def gathered(value):
    return [[1], value] if value == [1, 2] else [value, value]

  monkeypatch.setattr(saved.processes, "gather", gathered)
  assert saved.read_newest(two, lambda step: step) == (1, 1)
