"""Checkpoints by orbax: the whole state, saved in the background, restored onto any mesh.

Orbax keeps no checksum of array data: a flipped bit is restored as another number. So every
checkpoint holds `digests.json`, which names the SHA-256 of its files, and is checked before they
are read. A machine that is taken away has no time to read what it has just written, so a checkpoint
is complete before its digests are: until then `digests.json` says that they are to come.
"""

import contextlib
import dataclasses
import pathlib
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import orbax.checkpoint as ocp

from mlembed_jax import files
from mlembed_jax.errors import ConfigError, StorageError
from mlembed_jax.parallel import processes
from mlembed_jax.training.saved import (
  DIGESTS,
  DIGESTS_FORMAT,
  ITEM,
  damage,
  first_line,
  folder_of,
  held,
  steps_of,
  unchecked,
)
from mlembed_jax.training.train_state import TrainState, as_tree
from mlembed_jax.workdir import mean_scores

DAMAGED = "damaged"
TMP_DIR_SUFFIX = ".orbax-checkpoint-tmp"  # follows the step while orbax writes a checkpoint
SEEN_WITHIN_S = 120.0  # NFS clients may list a folder as it was 60 s ago


class Marked(ocp.StandardCheckpointHandler):
  """Marks a checkpoint as one whose digests are still to come, before it gets its final name."""

  def finalize(self, directory: Any) -> None:
    """Runs in the background, after all processes have written their part."""
    super().finalize(directory)
    _write_digests(pathlib.Path(directory), None)

  @classmethod
  def typestr(cls) -> str:
    """Returns the name that orbax notes in the checkpoint: any reader of its own may read it."""
    return ocp.StandardCheckpointHandler.typestr()


def _write_digests(item: pathlib.Path, found: dict[str, str] | None) -> None:
  files.write_object(item / DIGESTS, {"format_version": DIGESTS_FORMAT, "files": found})


def digest_checkpoint(folder: pathlib.Path) -> None:
  """Writes the digests of a checkpoint that has its final name."""
  item = folder / ITEM
  found = {name: value for name, value in files.digests(item).items() if name != DIGESTS}
  _write_digests(item, found)


@dataclasses.dataclass(frozen=True)
class Retention:
  """Which checkpoints stay after a save; orbax calls `should_preserve`.

  A score that is no number never makes a checkpoint the best; orbax's own rule lets NaN do so.
  """

  workdir: pathlib.Path
  newest: int
  every: int = 0  # steps; 0: none stays for its step
  best: int = 0

  def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
    """Returns whether each checkpoint stays, oldest first."""
    del context
    steps = [checkpoint.step for checkpoint in checkpoints]
    kept = {*steps[-self.newest :], *self._best(steps), *held(self.workdir)}
    return [step in kept or (self.every > 0 and step % self.every == 0) for step in steps]

  def _best(self, steps: Sequence[int]) -> list[int]:
    ranked = mean_scores(self.workdir) if self.best else {}
    return [step for step in ranked if step in steps][: self.best]


def _remove_unfinished(folder: pathlib.Path) -> None:
  with files.storage_errors(folder):
    for path in folder.glob(f"*{TMP_DIR_SUFFIX}*"):
      if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)


def _say_unchecked(folder: pathlib.Path) -> None:
  if why := unchecked(folder):
    print(why, flush=True)


class Checkpoints:
  """The checkpoints of one workdir."""

  def __init__(self, retention: Retention):
    """Opens WORKDIR/checkpoints; removes what killed saves left there."""
    self._workdir = workdir = retention.workdir
    processes.on_first(lambda: _remove_unfinished(workdir / "checkpoints"))
    registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
    handler = Marked()
    registry.add(ITEM, ocp.args.StandardSave, handler)
    registry.add(ITEM, ocp.args.StandardRestore, handler)
    self._manager = ocp.CheckpointManager(
      workdir / "checkpoints",
      options=ocp.CheckpointManagerOptions(
        preservation_policy=retention,
        enable_async_checkpointing=True,
        cleanup_tmp_directories=False,  # is done in a thread, which fails where the program ends
      ),
      handler_registry=registry,
    )
    self._digesting: threading.Thread | None = None
    self._settled = threading.Event()  # the running save has ended

  def latest(self) -> int | None:
    """Returns the newest saved step that process 0 finds, None where there is none."""
    return processes.gather(self._manager.latest_step())[0]

  def save(self, step: int, state: TrainState) -> None:
    """Saves in the background; a step that is already saved is left alone.

    Raises:
      StorageError: this or the save before cannot be written.
    """
    if self.latest() == step:
      return
    self.wait()
    processes.on_first(lambda: self._check_room(state))
    with self._saving(), jax.transfer_guard("allow"):  # orbax copies to the host
      self._manager.save(step, args=ocp.args.StandardSave(as_tree(state)))
    if processes.is_first():
      self._settled.clear()
      self._digesting = threading.Thread(target=self._digest, args=(step,), daemon=True)
      self._digesting.start()

  def _digest(self, step: int) -> None:
    """Writes the digests of a checkpoint as soon as it has its final name."""
    folder = folder_of(self._workdir, step)
    while not folder.is_dir():
      if self._settled.wait(0.05) and not folder.is_dir():
        return  # the save failed
    with contextlib.suppress(OSError):  # it is taken without digests then, which is said
      digest_checkpoint(folder)

  def _check_room(self, state: TrainState) -> None:
    """Raises StorageError where a save would fail: orbax may wait for minutes before it says so."""
    folder = pathlib.Path(self._manager.directory)
    with files.storage_errors(folder):
      files.probe(folder)
      free = shutil.disk_usage(folder).free
    if (need := sum(x.nbytes for x in jax.tree.leaves(state))) > free:
      raise StorageError(
        f"{folder}: a checkpoint needs {files.readable_size(need)}, {files.readable_size(free)} "
        f"are free. Free space; the same command then {self._goes_on()}"
      )

  def _goes_on(self) -> str:
    saved = steps_of(self._workdir)
    return f"goes on from step {saved[-1]}" if saved else "starts again"

  @contextlib.contextmanager
  def _saving(self) -> Iterator[None]:
    """Turns the errors of orbax and tensorstore, which have no class of their own."""
    try:
      yield
    except Exception as error:
      folder = self._manager.directory
      raise StorageError(
        f"{folder}: a checkpoint could not be saved: {first_line(error)}. Free space or bring the "
        f"folder back; the same command then {self._goes_on()}"
      ) from error

  def newest_whole(self, *, strict: bool = False) -> int | None:
    """Returns the newest step whose checkpoint is whole, None where nothing was ever saved.

    Damaged ones are moved to WORKDIR/damaged, and said.

    Raises:
      ConfigError: none is whole; or, with `strict`, the newest one is damaged.
    """
    self.wait()
    while steps := processes.gather(steps_of(self._workdir))[0]:
      folder = folder_of(self._workdir, steps[-1])
      if (fault := damage(folder)) is None:
        processes.on_first(lambda f=folder: _say_unchecked(f))
        return steps[-1]
      if strict:
        raise ConfigError(
          f"{fault}. Without --strict_restore the run goes on from the checkpoint before"
        )
      self._set_aside([folder], f"WARNING: {fault}")
    processes.on_first(self._check_never_saved)
    return None

  def _check_never_saved(self) -> None:
    if any((self._workdir / DAMAGED).glob("*")):
      raise ConfigError(
        f"{self._workdir}: no checkpoint is left, {DAMAGED}/ holds those that were set aside. Move "
        "one back to checkpoints/STEP if you know it to be good, or use another --workdir"
      )

  def restore(self, step: int, abstract: TrainState) -> TrainState:
    """Returns the state of a step, laid out as `abstract` says.

    Raises:
      ConfigError: it cannot be read; nothing is moved, for the cause may be memory or storage.
    """
    folder = folder_of(self._workdir, step)
    try:
      wanted = ocp.args.StandardRestore(as_tree(abstract))
      return TrainState(**self._manager.restore(step, args=wanted))
    except Exception as error:  # tensorstore's errors have no class of their own
      raise ConfigError(
        f"{folder} cannot be read: {first_line(error)}. If it is damaged, restore it from a copy, "
        "or go on from an earlier step by --from_step"
      ) from error

  def go_back(self, step: int) -> None:
    """Sets aside all checkpoints after `step`.

    Raises:
      ConfigError: there is none of that step.
    """
    steps = processes.gather(steps_of(self._workdir))[0]
    if step not in steps:
      raise ConfigError(
        f"--from_step: {self._manager.directory} has no step {step}; it has {steps}"
      )
    later = [folder_of(self._workdir, other) for other in steps if other > step]
    if later:
      # The newest goes first: a kill on the way leaves a row without holes.
      self._set_aside(later[::-1], f"the run goes on from step {step}")

  def _set_aside(self, folders: Sequence[pathlib.Path], why: str) -> None:
    """Moves checkpoints away, until every process sees that."""
    processes.on_first(lambda: [self._move(folder, why) for folder in folders])
    end = time.monotonic() + SEEN_WITHIN_S
    while True:
      self._manager.reload()
      listed = processes.gather(list(self._manager.all_steps()))
      if all(steps == listed[0] for steps in listed):
        return
      if time.monotonic() > end:
        raise StorageError(
          f"{self._manager.directory}: processes see other checkpoints than process 0: {listed}"
        )
      time.sleep(1.0)

  def _move(self, folder: pathlib.Path, why: str) -> None:
    target = self._workdir / DAMAGED / f"{folder.name}-{time.time_ns()}"
    target.parent.mkdir(exist_ok=True)
    folder.rename(target)
    print(f"{why}. {folder} is moved to {target}; delete it when you have seen it", flush=True)

  def wait(self) -> None:
    """Waits for running saves; raises StorageError where one cannot be written."""
    try:
      with self._saving():
        self._manager.wait_until_finished()
    finally:
      self._settled.set()
      if self._digesting:
        self._digesting.join()

  def close(self) -> None:
    """Waits as `wait` does; nothing can be saved after that."""
    self.wait()
    self._manager.close()
