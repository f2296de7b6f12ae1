"""How a run goes on from its workdir: what may differ, and what its history tells of that."""

import dataclasses
import pathlib
import re
from collections.abc import Sequence
from typing import Any

from mlembed_jax.config import flatten
from mlembed_jax.config_fields import SETTINGS, Config
from mlembed_jax.data.plan import difference
from mlembed_jax.errors import ConfigError
from mlembed_jax.workdir import Run


@dataclasses.dataclass(frozen=True)
class Resume:
  """How to go on; see `train_model`."""

  accept_changed_data: bool = False
  accept_changed_learning_rate: bool = False
  accept_changed_length: bool = False
  strict_restore: bool = False
  from_step: int | None = None
  skip_steps: tuple[int, ...] = ()

  def remaining(
    self, history: Sequence[dict[str, Any]], latest: int, *, same_settings: bool
  ) -> "Resume":
    """Returns what earlier starts have not done yet: launchers repeat a command with its flags.

    The last return to a step is repeated only for something new: for another rate or length, and
    for steps to be passed over that the run has done since, up to `latest`.
    """
    skipped = {step for entry in history for step in entry.get("skip_steps", ())}
    skip = tuple(step for step in self.skip_steps if step not in skipped)
    back = [entry["from_step"] for entry in history if "from_step" in entry]
    new = not same_settings or any(step <= latest for step in skip)
    done = back[-1:] == [self.from_step] and not new
    return dataclasses.replace(self, from_step=None if done else self.from_step, skip_steps=skip)

  def entry(self, before: Config, now: Config, step: int) -> dict[str, Any] | None:
    """Returns what the history of a run says of this start, which goes on from `step`.

    None: nothing that decides the updates is changed.

    Raises:
      ConfigError: a step that is to be passed over is done.
    """
    if self.skip_steps and min(self.skip_steps) <= step:
      raise ConfigError(
        f"--skip_steps: step {min(self.skip_steps)} is done, the run goes on from step {step}; "
        "go on from an earlier checkpoint with --from_step"
      )
    entry: dict[str, Any] = {}
    if self.skip_steps:
      entry["skip_steps"] = list(self.skip_steps)
    entry |= changed_settings(before, now)
    if self.from_step is not None:
      entry["from_step"] = self.from_step
    return {"step": step} | entry if entry else None


def changed_settings(before: Config, now: Config) -> dict[str, list[float]]:
  """Returns learning rate and length, before and now, where a run goes on with another one."""
  old, new = flatten(before), flatten(now)
  return {name: [old[name], new[name]] for name in (*RATE, *LENGTH) if old[name] != new[name]}


STEP = re.compile(r"([0-9]{1,12})(?:-([0-9]{1,12}))?")
MOST_SKIPPED = 1_000_000  # all of them stand in run.json


def parse_steps(text: str | Sequence[int]) -> tuple[int, ...]:
  """Returns the steps that a text such as "120-140,150" names, ascending.

  Raises:
    ConfigError: it is no such text.
  """
  if not isinstance(text, str):
    return tuple(sorted(set(text)))
  steps: set[int] = set()
  for part in filter(None, text.split(",")):
    found = STEP.fullmatch(part)
    first, last = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
    if first > last:
      raise ConfigError(f"--skip_steps: {part!r} is no step and no range such as 120-140")
    if last - first >= MOST_SKIPPED:
      raise ConfigError(f"--skip_steps: {part} has more than {MOST_SKIPPED:,} steps")
    steps.update(range(first, last + 1))
  return tuple(sorted(steps))


# Fields that decide only which texts a step has.
DATA = ("data.", "train.seed")
RATE = ("optimizer.learning_rate",)
LENGTH = ("train.steps", "train.epochs")
# The flag that accepts changes of such fields, and what it does.
ACCEPTING = {
  "accept_changed_data": (DATA, "goes on with other data"),
  "accept_changed_learning_rate": (RATE, "goes on with the new rate"),
  "accept_changed_length": (LENGTH, "makes the run as long as that"),
}


def check_same_run(stored: Run, current: Run, workdir: pathlib.Path, resume: Resume) -> None:
  """Raises ConfigError with every difference where `current` cannot continue `stored`.

  Differences that `resume` accepts are printed instead.
  """
  before, now = (flatten(run.config) for run in (stored, current))
  lines = [
    f"{name}: {before[name]} in the workdir, {now[name]} now"
    for name in now
    if before[name] != now[name] and not SETTINGS[name].free
  ]
  of_flag = {
    flag: [line for line in lines if line.startswith(fields)]
    for flag, (fields, _) in ACCEPTING.items()
  }
  never = [line for line in lines if not any(line in found for found in of_flag.values())]
  of_flag["accept_changed_data"] += difference(stored.plan, current.plan)
  of_flag = {flag: found for flag, found in of_flag.items() if found}
  accepted = [line for flag, found in of_flag.items() if getattr(resume, flag) for line in found]
  refused = [line for flag, found in of_flag.items() if not getattr(resume, flag) for line in found]
  if never or refused:
    hint = "".join(f" --{flag} {ACCEPTING[flag][1]}." for flag in of_flag)
    raise ConfigError(
      f"{workdir} holds a checkpoint of another run:\n  "
      + "\n  ".join(never + refused)
      + f"\nGive these fields their old values, or use another --workdir.{hint}"
    )
  if accepted:
    print("going on with what was changed:\n  " + "\n  ".join(accepted), flush=True)
