"""Checkpoints by orbax: the whole state, saved in the background, restored onto any mesh.

Orbax keeps no checksum of array data: a flipped bit is restored as another number. So every
checkpoint holds `digests.json`, which names the SHA-256 of its files. It is written before the
folder gets its final name, and checked before the folder is read.
"""

import contextlib
import dataclasses
import pathlib
import shutil
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
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
  held,
  steps_of,
)
from mlembed_jax.training.train_state import TrainState
from mlembed_jax.workdir import StepScores


class Digested(ocp.StandardCheckpointHandler):
  """Writes the digests of all files of a checkpoint as the last one, before it is complete."""

  def finalize(self, directory: Any) -> None:
    """Runs in the background on every process; the first one merges what all have written."""
    super().finalize(directory)
    if processes.is_first():
      folder = pathlib.Path(directory)
      value = {"format_version": DIGESTS_FORMAT, "files": files.digests(folder)}
      files.write_object(folder / DIGESTS, value)

  @classmethod
  def typestr(cls) -> str:
    """Returns the name that orbax notes in the checkpoint: any reader of its own may read it."""
    return ocp.StandardCheckpointHandler.typestr()


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
    if not self.best:
      return []
    scores = {step: mean_score(self.workdir, step) for step in steps}
    scored = [step for step in steps if np.isfinite(scores[step])]
    return sorted(scored, key=lambda step: scores[step])[-self.best :]


def mean_score(workdir: pathlib.Path, step: int) -> float:
  """Returns the mean over the held-out tasks of the whole model's scores, NaN without any."""
  try:
    scores = StepScores.load(workdir, step).scores
  except ConfigError:
    return np.nan  # a damaged file is told where its scores are shown
  whole = {s.task: s.score for s in sorted(scores, key=lambda s: (s.depth, s.rank, s.dim))}
  return float(np.mean(list(whole.values()))) if whole else np.nan


class Checkpoints:
  """The checkpoints of one workdir."""

  def __init__(self, retention: Retention):
    """Opens WORKDIR/checkpoints; removes what killed saves left there."""
    self._workdir = workdir = retention.workdir
    registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
    handler = Digested()
    registry.add(ITEM, ocp.args.StandardSave, handler)
    registry.add(ITEM, ocp.args.StandardRestore, handler)
    self._manager = ocp.CheckpointManager(
      workdir / "checkpoints",
      options=ocp.CheckpointManagerOptions(
        preservation_policy=retention,
        enable_async_checkpointing=True,
        cleanup_tmp_directories=True,
      ),
      handler_registry=registry,
    )

  def latest(self) -> int | None:
    """Returns the newest saved step that process 0 finds, None where there is none."""
    return processes.gather(self._manager.latest_step())[0]

  def save(self, step: int, state: TrainState) -> None:
    """Saves in the background; a step that is already saved is left alone.

    Raises:
      StorageError: this or the save before cannot be written.
    """
    if self._manager.latest_step() != step:
      processes.on_first(lambda: self._check_room(state))
      with self._saving(), jax.transfer_guard("allow"):  # orbax copies to the host
        self._manager.save(step, args=ocp.args.StandardSave(state))

  def _check_room(self, state: TrainState) -> None:
    """Raises StorageError where a save would fail: orbax may wait for minutes before it says so."""
    folder = pathlib.Path(self._manager.directory)
    with files.storage_errors(folder):
      probe = folder / ".write_test"
      probe.touch()
      probe.unlink()
      free = shutil.disk_usage(folder).free
    if (need := sum(x.nbytes for x in jax.tree.leaves(state))) > free:
      raise StorageError(
        f"{folder}: a checkpoint needs {need / 1e9:,.2f} GB, {free / 1e9:,.2f} GB are free. Free "
        f"space; the same command then {self._goes_on()}"
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

  def restore(self, abstract: TrainState, *, strict: bool = False) -> TrainState:
    """Returns the state of the newest checkpoint that is whole, laid out as `abstract` says.

    Damaged ones are moved to WORKDIR/damaged, and said.

    Raises:
      ConfigError: none is whole; or, with `strict`, the newest one is damaged.
    """
    self.wait()
    for step in sorted(processes.gather(steps_of(self._workdir))[0], reverse=True):
      folder = pathlib.Path(self._manager.directory) / str(step)
      state, fault = self._read(step, abstract)
      if fault is None:
        return state
      if strict:
        raise ConfigError(
          f"{fault}. Without --strict_restore the run goes on from the checkpoint before"
        )
      processes.on_first(lambda f=folder, why=fault: self._set_aside(f, f"WARNING: {why}"))
      self._manager.reload()
    raise ConfigError(
      f"{self._manager.directory}: no checkpoint is whole; all are in "
      f"{self._workdir / 'damaged'}. "
      "Use another --workdir to start from the beginning"
    )

  def _read(self, step: int, abstract: TrainState) -> tuple[Any, str | None]:
    """Returns the state of a step and None, or nothing and what is wrong with its folder."""
    state, fault = None, damage(pathlib.Path(self._manager.directory) / str(step))
    if fault is None:
      try:
        state = self._manager.restore(step, args=ocp.args.StandardRestore(abstract))
      except Exception as error:  # tensorstore's errors have no class of their own
        fault = f"{self._manager.directory / str(step)} cannot be read: {first_line(error)}"
    return state, next(filter(None, processes.gather(fault)), None)

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
    for later in [other for other in steps if other > step]:
      folder = pathlib.Path(self._manager.directory) / str(later)
      why = f"{folder} is after step {step}, from which the run goes on"
      processes.on_first(lambda f=folder, w=why: self._set_aside(f, w))
    self._manager.reload()

  def _set_aside(self, folder: pathlib.Path, why: str) -> None:
    target = self._workdir / "damaged" / f"{folder.name}-{time.time_ns()}"
    target.parent.mkdir(exist_ok=True)
    folder.rename(target)
    print(f"{why}. It is moved to {target}; delete it when you have seen it", flush=True)

  def wait(self) -> None:
    """Waits for running saves; raises StorageError where one cannot be written."""
    with self._saving():
      self._manager.wait_until_finished()

  def close(self) -> None:
    """Waits as `wait` does; nothing can be saved after that."""
    self.wait()
    self._manager.close()
