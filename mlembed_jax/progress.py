"""How far a command is, on stderr: a bar on a terminal, a line now and then where there is none."""

import contextlib
import datetime
import sys
import threading
import time
import types
from collections.abc import Iterator
from typing import Any, Protocol, Self

import tqdm

LINE_S = 10.0  # seconds between two lines in a log
CLOCK_S = 5.0  # what is done sooner is not worth a word
LINE = "{desc}: {percentage:.0f}% {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"


class Progress(Protocol):
  """What counts the work that is done; tqdm's bars are one."""

  def update(self, n: int = 1) -> Any:
    """Counts `n` more."""

  def set_postfix_str(self, s: str, refresh: bool = True) -> None:
    """Shows `s` beside the count from the next line on."""

  def close(self) -> None:
    """Ends the count."""

  def __enter__(self) -> Self: ...

  def __exit__(
    self,
    exc_type: type[BaseException] | None,
    exc_value: BaseException | None,
    traceback: types.TracebackType | None,
  ) -> None: ...


class Lines:
  """A count whose lines are written below each other, `LINE_S` seconds apart at least."""

  def __init__(self, name: str, total: int | None, unit: str, initial: int, leave: bool):
    """`leave`: there is a last line, however fast it was; else only of work that took longer."""
    self._name, self._total, self._unit, self._leave = name, total, unit, leave
    self._initial, self._done, self._postfix = initial, initial, ""
    self._start = self._written = time.monotonic()
    self._shown: tuple[int, str] | None = None  # what the last line said
    self._first: tuple[int, float] | None = None  # count and time of the first, after compiling

  def update(self, n: int = 1) -> None:
    """Counts `n` more."""
    self._done += n
    if time.monotonic() - self._written >= LINE_S:
      self._write()

  def set_postfix_str(self, s: str, refresh: bool = True) -> None:
    """Shows `s` beside the count from the next line on."""
    self._postfix = s

  def close(self) -> None:
    """Writes the last line, where it says more than the one before."""
    if self._shown != (self._done, self._postfix) and (self._leave or self._shown is not None):
      self._write()
    self._leave, self._shown = False, (self._done, self._postfix)

  def __enter__(self) -> Self:
    return self

  def __exit__(self, exc_type: Any, exc_value: Any, traceback: Any) -> None:
    self.close()

  def _write(self) -> None:
    """Writes a line; rate and time left are of the work since the first one, before it of all."""
    now = time.monotonic()
    count, since = self._first or (self._initial, self._start)
    self._first = self._first or (self._done, now)
    self._written, self._shown = now, (self._done, self._postfix)
    shown = tqdm.tqdm.format_meter(
      self._done,
      self._total or 0,
      self._written - self._start,
      prefix=self._name,
      unit=self._unit,
      rate=(self._done - count) / (now - since) if now > since else None,
      postfix=self._postfix,
      initial=self._initial,
      bar_format=LINE if self._total else None,
    )
    say(shown)


def count(
  name: str,
  total: int | None = None,
  unit: str = "it",
  *,
  initial: int = 0,
  leave: bool = True,
  shown: bool = True,
) -> Progress:
  """Returns the count of some work, which shows how far it is until it is closed.

  Args:
    name: what is done.
    total: how much there is of it, None where nobody knows.
    unit: what is counted, with a space before it where a number would run into it.
    initial: how much was done before.
    leave: whether it still stands there when the work is done.
    shown: False shows nothing, as on all processes of a run but the first.
  """
  if shown and not _rewrites():
    return Lines(name, total, unit, initial, leave)
  return tqdm.tqdm(
    desc=name,
    total=total,
    unit=unit,
    initial=initial,
    leave=leave,
    disable=not shown,
    dynamic_ncols=True,
    mininterval=0.5,
  )


def _rewrites() -> bool:
  """Returns whether a line can take the place of the one before, as on terminals, in notebooks."""
  return sys.stderr.isatty() or "ipykernel" in sys.modules


def say(sentence: str) -> None:
  """Writes a line to stderr, above the bars that are there."""
  tqdm.tqdm.write(sentence, file=sys.stderr)
  sys.stderr.flush()


@contextlib.contextmanager
def clocked(what: str, *, shown: bool = True) -> Iterator[None]:
  """Says what a block does, and for how long, where it takes longer than `CLOCK_S` seconds.

  On a terminal a clock runs meanwhile, else there is a line at the beginning and one at the end. A
  thread writes it, which knows nothing of jax: it runs while XLA compiles.
  """
  if not shown:
    yield
    return
  done, start = threading.Event(), time.monotonic()
  thread = threading.Thread(target=_clock, args=(what, start, done), daemon=True)
  thread.start()
  try:
    yield
  finally:
    done.set()
    thread.join()


def _clock(what: str, start: float, done: threading.Event) -> None:
  if done.wait(CLOCK_S):
    return
  if _rewrites():
    _run_clock(what, start, done)
  else:
    say(f"{what} ...")
    done.wait()
    say(f"{what}: {time.monotonic() - start:.0f} s")


def _run_clock(what: str, start: float, done: threading.Event) -> None:
  with tqdm.tqdm(bar_format="{desc}", leave=False, dynamic_ncols=True) as line:
    while not done.wait(1.0):
      passed = datetime.timedelta(seconds=round(time.monotonic() - start))
      line.set_description_str(f"{what}: {passed}")
