"""Checkpoints by orbax: the whole state, saved in the background, restored onto any mesh."""

import pathlib
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from mlembed_jax.config import flatten
from mlembed_jax.config_fields import SETTINGS, ModelConfig
from mlembed_jax.data.plan import difference
from mlembed_jax.errors import ConfigError
from mlembed_jax.models.encoder import parameter_shapes
from mlembed_jax.parallel import processes
from mlembed_jax.training.train_state import TrainState
from mlembed_jax.workdir import Run


class Checkpoints:
  """The checkpoints of one workdir."""

  def __init__(self, workdir: pathlib.Path, keep: int = 1):
    """Opens WORKDIR/checkpoints; `keep` is how many of the newest stay after a save."""
    self._manager = ocp.CheckpointManager(
      workdir / "checkpoints",
      options=ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True),
    )

  def latest(self) -> int | None:
    """Returns the newest saved step that process 0 finds, None where there is none."""
    return processes.gather(self._manager.latest_step())[0]

  def save(self, step: int, state: TrainState) -> None:
    """Saves in the background; a step that is already saved is left alone."""
    if self._manager.latest_step() != step:
      with jax.transfer_guard("allow"):  # orbax copies to the host while it is called
        self._manager.save(step, args=ocp.args.StandardSave(state))

  def restore(self, step: int, abstract: TrainState) -> TrainState:
    """Returns the state of a step, laid out as `abstract` says.

    Raises:
      ConfigError: the checkpoint is damaged.
    """
    try:
      state: Any = self._manager.restore(step, args=ocp.args.StandardRestore(abstract))
    except Exception as error:  # tensorstore's errors have no class of their own
      folder = self._manager.directory / str(step)
      raise ConfigError(
        f"{folder} cannot be read; delete it to go on from the checkpoint before: "
        f"{str(error).splitlines()[0]}"
      ) from error
    return state

  def close(self) -> None:
    """Waits for running saves."""
    self._manager.wait_until_finished()
    self._manager.close()


# Fields that decide only which texts a step has.
DATA = ("data.", "train.seed")


def check_same_run(
  stored: Run, current: Run, workdir: pathlib.Path, accept_changed_data: bool
) -> None:
  """Raises ConfigError with every difference where `current` cannot continue `stored`.

  With `accept_changed_data`, differences of the data are printed instead.
  """
  before, now = (flatten(run.config) for run in (stored, current))
  fields = [name for name in now if before[name] != now[name] and not SETTINGS[name].free]
  data = [name for name in fields if name.startswith(DATA)]
  other = [name for name in fields if name not in data]
  show = lambda name: f"{name}: {before[name]} in the workdir, {now[name]} now"  # noqa: E731
  changed = [*map(show, data), *difference(stored.plan, current.plan)]
  refused = [*map(show, other), *([] if accept_changed_data else changed)]
  if refused:
    hint = " --accept_changed_data goes on with other data." if changed else ""
    raise ConfigError(
      f"{workdir} holds a checkpoint of another run:\n  "
      + "\n  ".join(refused)
      + f"\nGive these fields their old values, or use another --workdir.{hint}"
    )
  if changed:
    print("going on with other data:\n  " + "\n  ".join(changed), flush=True)


def _reader(workdir: pathlib.Path, **items: Any) -> ocp.CheckpointManager:
  """Returns a manager with which each process reads on its own."""
  own = jax.process_index()
  alone = ocp.options.MultiprocessingOptions(
    primary_host=own, active_processes={own}, barrier_sync_key_prefix=f"reader_{own}"
  )
  options = ocp.CheckpointManagerOptions(
    read_only=True, create=False, multiprocessing_options=alone
  )
  return ocp.CheckpointManager(workdir / "checkpoints", options=options, **items)


def latest_step(workdir: pathlib.Path) -> int:
  """Returns the newest saved step.

  Raises:
    ConfigError: the workdir holds no finished checkpoint.
  """
  if (workdir / "checkpoints").is_dir():
    with _reader(workdir) as manager:
      if (step := manager.latest_step()) is not None:
        return step
  raise ConfigError(f"{workdir}: no finished checkpoint yet")


def load_params(workdir: pathlib.Path, model: ModelConfig) -> tuple[int, Any]:
  """Returns the newest saved step and its parameters as numpy arrays; moments are not read.

  Raises:
    ConfigError: the workdir holds no finished checkpoint.
  """
  step, handler = latest_step(workdir), ocp.PyTreeCheckpointHandler()
  with _reader(workdir, item_handlers=handler) as manager:
    shapes = {"params": parameter_shapes(model)}
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), shapes)
    restore = ocp.args.PyTreeRestore(shapes, restore_args=as_numpy, partial_restore=True)
    return step, manager.restore(step, args=restore)["params"]
