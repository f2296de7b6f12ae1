"""WORKDIR/frozen: the frozen parameters of a run, kept once, in the form of a checkpoint.

So a workdir says by itself what was trained: the folder or the Hub may change what stands there,
and another machine may factorise a token table in another way.
"""

import pathlib
import shutil
import time
from collections.abc import Callable
from typing import Any

from mlembed_jax import files
from mlembed_jax.config_fields import Config
from mlembed_jax.errors import StorageError
from mlembed_jax.parallel import processes
from mlembed_jax.training import saved
from mlembed_jax.training.checkpoint import SEEN_WITHIN_S, Checkpoints, Retention
from mlembed_jax.training.train_state import TrainState


def placed(
  workdir: pathlib.Path, config: Config, like: Any, load: Callable[[Any], Any], *, begun: bool
) -> Any:
  """Returns the frozen parameters as WORKDIR/frozen has them; a run that begins writes them there.

  All processes of a run call it.

  Args:
    workdir: of the run.
    config: of the run.
    like: the parameters as shapes with dtypes and shardings, not empty.
    load: `load(like)` reads them from the folder that the run starts from.
    begun: whether the workdir holds a checkpoint, which belongs to those that are there.

  Raises:
    ConfigError: they are absent or damaged.
    StorageError: they cannot be written.
  """
  folder = workdir / saved.FROZEN
  if begun:
    saved.check_frozen(workdir, config)
  else:  # a start that was killed may have had another folder to start from
    _remove(folder)
  store = Checkpoints(Retention(folder, newest=1))
  try:
    if begun:
      return store.restore(saved.FROZEN_STEP, _state(like)).params
    params = load(like)
    store.save(saved.FROZEN_STEP, _state(params))
    store.wait()
    return params
  finally:
    store.close()


def _remove(folder: pathlib.Path) -> None:
  """Deletes a folder, and waits until all processes see that."""
  with processes.agreed(), files.storage_errors(folder):
    if processes.is_first() and folder.exists():
      shutil.rmtree(folder)
  end = time.monotonic() + SEEN_WITHIN_S
  while any(processes.gather(folder.exists())):
    if time.monotonic() > end:
      raise StorageError(f"{folder} was deleted, but some process still sees it; delete it by hand")
    time.sleep(1.0)


def _state(params: Any) -> TrainState:
  return TrainState(step={}, params=params, log_temperature={}, opt_state={})
