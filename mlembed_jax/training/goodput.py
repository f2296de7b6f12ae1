"""Where the wall time of a run went, over all its starts: WORKDIR/goodput.json.

Goodput is the share of the time that trained steps which are still part of the run.
"""

import contextlib
import dataclasses
import datetime
import pathlib
import time
from collections.abc import Iterator

from mlembed_jax.errors import ConfigError
from mlembed_jax.files import read_object, write_object

FILE = "goodput.json"
FORMAT = 1
# The first call of a program counts as compiling; an evaluation has programs of its own.
TRAINING, COMPILING, WAITING = "training", "compiling", "waiting_for_data"
SAVING, EVALUATING, START_UP, LOST = "saving", "evaluating", "start_up", "lost"
PARTS = (TRAINING, COMPILING, WAITING, SAVING, EVALUATING, START_UP, LOST)
WRITE_S = 10.0  # a killed start lacks so much of its time at most; a longer step adds its own


@dataclasses.dataclass
class Start:
  """One start of a run. Times are in seconds since 1970, the sum of `seconds` is `end - begin`."""

  begin: float
  end: float
  step: int  # from which it went on
  seconds: dict[str, float]
  saved: list[list[float]]  # step, and the seconds of training until it was saved


class Goodput:
  """Divides the time of this start, and knows that of the starts before."""

  def __init__(self, workdir: pathlib.Path, *, writes: bool):
    """Begins a start; `writes` is whether this process writes the file."""
    self._path, self._writes = workdir / FILE, writes
    self._before = _load(self._path) if writes else []
    self._now = Start(time.time(), time.time(), 0, dict.fromkeys(PARTS, 0.0), [])
    self._part, self._since, self._written = START_UP, time.perf_counter(), 0.0

  @contextlib.contextmanager
  def during(self, part: str) -> Iterator[None]:
    """Counts the time of a block as that of a part; a block inside it counts as its own."""
    outer = self._switch(part)
    try:
      yield
    finally:
      self._switch(outer)

  def _switch(self, part: str) -> str:
    now = time.perf_counter()
    self._now.seconds[self._part] += now - self._since
    self._now.end += now - self._since
    self._since, outer, self._part = now, self._part, part
    return outer

  def resume(self, step: int) -> None:
    """Notes the step from which this start goes on: what was trained after it is lost."""
    self._switch(self._part)
    if self._now.seconds[TRAINING]:  # it went back by itself: as if it had started anew
      self._before.append(self._now)
      self._now = Start(self._now.end, self._now.end, 0, dict.fromkeys(PARTS, 0.0), [])
    self._now.step = step
    for start in self._before:
      kept = max((s for at, s in start.saved if at <= step), default=0.0)
      kept = 0.0 if start.step >= step else kept
      start.seconds[LOST] += start.seconds[TRAINING] - kept
      start.seconds[TRAINING] = kept
      start.saved = [entry for entry in start.saved if entry[0] <= step]

  def save(self, step: int) -> None:
    """Notes that a step is saved."""
    self._switch(self._part)
    self._now.saved.append([step, self._now.seconds[TRAINING]])
    self.write()

  def write_now_and_then(self) -> None:
    """Writes the file, if that was not done for `WRITE_S` seconds."""
    if time.perf_counter() - self._written > WRITE_S:
      self.write()

  def write(self) -> None:
    """Writes the file."""
    self._switch(self._part)
    self._written = time.perf_counter()
    if self._writes:
      starts = [dataclasses.asdict(start) for start in self._starts]
      write_object(self._path, {"format_version": FORMAT, "starts": starts})

  @property
  def _starts(self) -> list[Start]:
    return [*self._before, self._now]

  def shares(self) -> dict[str, float]:
    """Returns the share of each part in the time since the first start; `stopped` is the rest."""
    self._switch(self._part)
    starts = self._starts
    whole = max(self._now.end - starts[0].begin, 1e-9)
    found = {part: sum(start.seconds[part] for start in starts) / whole for part in PARTS}
    return found | {"stopped": max(0.0, 1.0 - sum(found.values()))}

  def summary(self) -> str:
    """Returns one line about the whole run."""
    starts = self._starts
    whole = datetime.timedelta(seconds=round(self._now.end - starts[0].begin))
    parts = ", ".join(
      f"{name.replace('_', ' ')} {share:.1%}"
      for name, share in self.shares().items()
      if share >= 5e-4
    )
    return f"{len(starts)} start{'s'[: len(starts) > 1]}, {whole} of wall time: {parts}"


def _load(path: pathlib.Path) -> list[Start]:
  """Returns the starts before; none, and a sentence, where the file cannot be read."""
  if not path.is_file():
    return []
  try:
    return [Start(**start) for start in read_object(path, FORMAT)["starts"]]
  except (ConfigError, KeyError, TypeError) as error:
    print(f"WARNING: {path}: {error}. The time of earlier starts is not counted", flush=True)
    return []
