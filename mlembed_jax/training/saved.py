"""Checkpoints as they lie on the disk: which there are, whether they are whole, what they hold.

A run that trains in the workdir may delete a checkpoint at any time. Who reads one holds it by a
file in WORKDIR/held, which the run heeds.
"""

import contextlib
import os
import pathlib
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar, cast

import jax
import numpy as np
import orbax.checkpoint as ocp

from mlembed_jax import files
from mlembed_jax.config_fields import Config
from mlembed_jax.errors import ConfigError
from mlembed_jax.models.encoder import parameter_shapes
from mlembed_jax.parallel import processes
from mlembed_jax.training import frozen
from mlembed_jax.workdir import Run, mean_scores

DIGESTS = "digests.json"
DIGESTS_FORMAT = 1
ITEM = "default"  # orbax's name of the folder of the state, in that of the step
BEST = "best"  # names the step of the best held-out scores
FROZEN = "frozen"  # folder of the workdir with the frozen parameters, see frozen_store.py
FROZEN_STEP = 0  # names its one checkpoint
HELD_S = 3600.0  # a reader that was killed holds its checkpoint for so long

Read = TypeVar("Read")


def steps_of(workdir: pathlib.Path) -> list[int]:
  """Returns the steps that have a checkpoint, ascending."""
  folder = workdir / "checkpoints"
  return sorted(int(path.name) for path in folder.glob("*") if path.name.isdigit())


def folder_of(workdir: pathlib.Path, step: int) -> pathlib.Path:
  """Returns the folder of a checkpoint."""
  return workdir / "checkpoints" / str(step)


def held(workdir: pathlib.Path) -> set[int]:
  """Returns the steps that are being read."""
  now, steps = time.time(), set()
  for path in (workdir / "held").glob("*"):
    with contextlib.suppress(OSError, ValueError):  # its reader may be done by now
      if now - path.stat().st_mtime < HELD_S:
        steps.add(int(path.name.split("-")[0]))
  return steps


def hold(workdir: pathlib.Path, step: int, purpose: str = "read") -> None:
  """Keeps a run from deleting a checkpoint until `release`, or for an hour.

  Holds of several purposes end one by one. Where nothing can be written, the reader has to take its
  chance.
  """
  with contextlib.suppress(OSError):
    _held_by_us(workdir, step, purpose).parent.mkdir(exist_ok=True)
    _held_by_us(workdir, step, purpose).touch()


def release(workdir: pathlib.Path, step: int, purpose: str = "read") -> None:
  """Ends `hold`."""
  with contextlib.suppress(OSError):
    _held_by_us(workdir, step, purpose).unlink(missing_ok=True)


@contextlib.contextmanager
def holding(workdir: pathlib.Path, step: int) -> Iterator[None]:
  """Holds a checkpoint during the block, see `hold`."""
  hold(workdir, step)
  try:
    yield
  finally:
    release(workdir, step)


def _held_by_us(workdir: pathlib.Path, step: int, purpose: str) -> pathlib.Path:
  return workdir / "held" / f"{step}-{socket.gethostname()}-{os.getpid()}-{purpose}"


def read_newest(
  workdir: pathlib.Path, read: Callable[[int], Read], among: Sequence[int] | None = None
) -> tuple[int, Read]:
  """Returns the newest step whose checkpoint is whole, and what `read` returns of that step.

  Where `among` is given, other steps are passed over.

  Damaged checkpoints are passed over, and said. All processes of a run call it, and go by the steps
  that process 0 finds: a run may be saving others, or storage show them later elsewhere.

  Raises:
    ConfigError: the workdir holds no finished checkpoint, none is whole, or one that is not known
      to be damaged cannot be read.
  """
  faults: dict[int, str] = {}
  wanted = lambda step: step not in faults and (among is None or step in among)  # noqa: E731
  while steps := [step for step in processes.gather(steps_of(workdir))[0] if wanted(step)]:
    step, folder = steps[-1], folder_of(workdir, steps[-1])
    with holding(workdir, step):
      fault, found, error = damage(folder), None, ""
      if fault is None:
        try:
          found = read(step)
        except Exception as cause:  # tensorstore's errors have no class of their own
          error = first_line(cause) or type(cause).__name__
      errors = list(filter(None, processes.gather(error)))
      there = processes.gather(folder.is_dir())[0]  # else the run deleted it before it was held
    if fault is None and not errors:
      return step, cast("Read", found)
    if fault is None and there:
      raise ConfigError(f"{folder} cannot be read: {errors[0]}")
    if fault and there:
      faults[step] = fault
      print(f"WARNING: {fault}. It is passed over", flush=True)
  if faults:
    raise ConfigError(f"{workdir}: no checkpoint is whole: " + "; ".join(faults.values()))
  raise ConfigError(f"{workdir}: no finished checkpoint yet")


def load_newest_params(
  workdir: pathlib.Path, steps: Sequence[int] | None = None
) -> tuple[int, Any]:
  """Returns the newest step that is whole and its parameters as numpy arrays, without moments.

  They are all parameters, the frozen ones and the factors of an adapter among them.

  Raises:
    ConfigError: the workdir holds no finished checkpoint, or none is whole (of `steps`, if given);
      or the frozen parameters are absent or damaged.
  """
  check_frozen(workdir, Run.load(workdir).config)
  return read_newest(workdir, lambda step: load_params(workdir, step), steps)


def chosen_step(workdir: pathlib.Path, step: int | str) -> int:
  """Returns a step that is kept, which may be named as "best": the best mean of held-out scores.

  Raises:
    ConfigError: it is not kept, or no kept step has scores.
  """
  kept = steps_of(workdir)
  if step == BEST:
    return _best(workdir, kept)
  if step not in kept:
    raise ConfigError(f"step: {workdir} keeps no step {step}; it keeps {kept}")
  return int(step)


def _best(workdir: pathlib.Path, kept: Sequence[int]) -> int:
  means = mean_scores(workdir)
  found = next((step for step in means if step in kept), None)
  if found is None:
    raise ConfigError(
      f"step: no checkpoint of {workdir} has held-out scores, by which one is the best; eval.every "
      "and train.keep_best make them"
    )
  first = next(iter(means))
  if means[first] > means[found]:
    why = "but is not kept, see train.keep_best" if first else "so training made the scores worse"
    print(f"step {first} was better than step {found}, {why}", flush=True)
  return found


def load_params(workdir: pathlib.Path, step: int) -> Any:
  """Returns all parameters of a step as numpy arrays; moments are not read.

  Each process reads by itself.

  Raises:
    ConfigError: the workdir is that of no run.
  """
  config = Run.load(workdir).config
  others = frozen.split(config, parameter_shapes(config.model))[1]
  trained = load_trained(workdir, step)
  return frozen.whole(trained, _restored(workdir / FROZEN, FROZEN_STEP, others) if others else None)


def load_trained(workdir: pathlib.Path, step: int) -> Any:
  """Returns the trained parameters of a step as numpy arrays, otherwise as `load_params`."""
  config = Run.load(workdir).config
  return _restored(workdir, step, frozen.split(config, parameter_shapes(config.model))[0])


def check_frozen(workdir: pathlib.Path, config: Config) -> None:
  """Raises ConfigError where the frozen parameters of a run are absent or damaged.

  All processes of a run call it. There are none before the first checkpoint is saved, nor where all
  parameters are trained.
  """
  folder = folder_of(workdir / FROZEN, FROZEN_STEP)
  begun = processes.gather(bool(steps_of(workdir)))[0]
  if not begun or not frozen.split(config, parameter_shapes(config.model))[1]:
    return
  if not processes.gather((folder / ITEM / DIGESTS).is_file())[0]:
    raise ConfigError(f"{folder}, the frozen parameters: no {DIGESTS}; copy the whole workdir")
  if fault := damage(folder) or unchecked(folder):
    raise ConfigError(f"{fault}. It holds the frozen parameters; restore it from a copy")


def _restored(workdir: pathlib.Path, step: int, shapes: Any) -> Any:
  """Returns the parameters of a checkpoint of these shapes."""
  own = jax.process_index()  # each process reads on its own
  alone = ocp.options.MultiprocessingOptions(
    primary_host=own, active_processes={own}, barrier_sync_key_prefix=f"reader_{own}"
  )
  wanted = {"params": shapes}
  as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
  restore = ocp.args.PyTreeRestore(wanted, restore_args=as_numpy, partial_restore=True)
  handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=alone)
  with ocp.Checkpointer(handler, multiprocessing_options=alone) as checkpointer:
    return checkpointer.restore(folder_of(workdir, step) / ITEM, restore)["params"]


def first_line(error: Exception) -> str:
  """Returns the first line of a message; tensorstore's have many."""
  return next(iter(str(error).splitlines()), type(error).__name__)


def damage(folder: pathlib.Path) -> str | None:
  """Returns what is wrong with the files of a checkpoint, None where nothing is known to be.

  Every process of a run calls it, and reads a part of the files.

  Raises:
    StorageError: a file cannot be read, which is no damage.
  """
  with processes.agreed():
    fault, expected = _expected(folder)
  if fault := next(filter(None, processes.gather(fault)), None):
    return f"{folder} is damaged: {fault}"
  names = sorted(expected)
  found = dict(zip(names, processes.shared(names, _digest_in(folder / ITEM)), strict=True))
  wrong = [name for name in names if found[name] != expected[name]]
  if not wrong:
    return None
  more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
  how = "is missing" if found[wrong[0]] is None else "has other content than was written"
  return f"{folder} is damaged: {ITEM}/{wrong[0]}{more} {how}"


def unchecked(folder: pathlib.Path) -> str | None:
  """Returns why nothing is known of the files of a checkpoint; None where they have digests."""
  path = folder / ITEM / DIGESTS
  if not path.is_file():
    return f"{folder} has no digests, as in 0.1.0: it is taken as it is"
  if files.read_object(path, DIGESTS_FORMAT).get("files") is None:
    return f"{folder} has no digests, as the run ended right after the save: it is taken as it is"
  return None


def _expected(folder: pathlib.Path) -> tuple[str | None, dict[str, str]]:
  """Returns what is wrong with the digests of a checkpoint, and the digests."""
  path = folder / ITEM / DIGESTS
  if not path.is_file():
    since = _digests_since(folder.parent.parent)
    gone = since is not None and int(folder.name) >= since
    return (f"{ITEM}/{DIGESTS} is missing" if gone else None), {}
  try:
    found = files.read_object(path, DIGESTS_FORMAT)["files"]
  except (ConfigError, KeyError) as error:
    return str(error), {}
  return None, found or {}


def _digests_since(workdir: pathlib.Path) -> int | None:
  try:
    return Run.load(workdir).digests_since
  except ConfigError:  # no checkpoint is used without run.json, which says what is wrong with it
    return None


def _digest_in(folder: pathlib.Path) -> Callable[[str], str | None]:
  def act(name: str) -> str | None:
    with files.storage_errors(folder / name):
      try:
        return files.digest(folder / name)
      except FileNotFoundError:
        return None

  return act
