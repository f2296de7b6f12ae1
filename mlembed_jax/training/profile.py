"""A trace of some steps by jax.profiler, in WORKDIR/profile as TensorBoard reads it."""

import contextlib
import pathlib
from typing import Any

import jax

from mlembed_jax import progress
from mlembed_jax.config_fields import Config
from mlembed_jax.errors import ConfigError
from mlembed_jax.parallel import processes

FOLDER = "profile"


def check_within(config: Config, steps: int) -> None:
  """Raises ConfigError where `train.profile_steps` are beyond the steps of the run."""
  if config.train.profile_steps and config.train.profile_steps[1] > steps:
    raise ConfigError(
      f"train.profile_steps: {config.train.profile_steps} ends after the run, which has {steps:,} "
      "steps"
    )


class Profile(contextlib.AbstractContextManager["Profile"]):
  """Traces the steps of `train.profile_steps` on process 0: all run the same program.

  The device is waited for before the first of them and after the last, and never else.
  """

  def __init__(self, config: Config, workdir: pathlib.Path):
    """Traces nothing before its first step."""
    wanted = config.train.profile_steps if processes.is_first() else ()
    self._first, self._last = wanted or (1, 0)
    self._folder, self._traces, self._newest = workdir / FOLDER, False, 0

  def step(self, step: int, state: Any) -> contextlib.AbstractContextManager[Any]:
    """Returns the block of a step, numbered from 1, that begins with `state`."""
    if not self._first <= step <= self._last:
      return contextlib.nullcontext()
    if not self._traces:
      jax.block_until_ready(state)
      jax.profiler.start_trace(str(self._folder))
      self._traces = True
    self._newest = step
    return jax.profiler.StepTraceAnnotation("train", step_num=step)

  def end(self, step: int, state: Any) -> None:
    """Ends the trace where this was the last step of it; `state` is that after the step."""
    if self._traces and step >= self._last:
      jax.block_until_ready(state)
      self._stop()

  def _stop(self) -> None:
    jax.profiler.stop_trace()
    self._traces = False
    progress.say(f"steps {self._first} to {self._newest} are traced in {self._folder}")

  def __exit__(self, *error: Any) -> None:
    """Writes what there is of a trace, where the run ends in the middle of it."""
    if self._traces:
      self._stop()
