"""Makes processes leave signals to the one that started them, and end with it."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from multiprocessing import resource_tracker


def end_with_parent(parent: int) -> None:
  """Ends this process soon after a parent that was killed, which cannot end it itself."""

  def watch() -> None:
    while os.getppid() == parent:
      time.sleep(0.2)
    os._exit(1)

  threading.Thread(target=watch, daemon=True).start()


@contextlib.contextmanager
def unheard(*numbers: signal.Signals) -> Iterator[None]:
  """Starts the processes of the block without these signals, which a terminal sends to all.

  A process inherits what is blocked, so they do not reach it while it imports either, where they
  would end in a traceback. The starting process hears them when the block ends.
  """
  resource_tracker.ensure_running()  # else the first process starts it, which ends the blocking
  before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
  try:
    with _later(numbers):
      yield
  finally:
    signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def _later(numbers: Sequence[signal.Signals]) -> Iterator[None]:
  """Holds signals back that reach a thread of a library, which does not block them.

  The main thread would run their handler all the same, and leave a process half started.
  """
  if threading.current_thread() is not threading.main_thread():  # which alone runs handlers
    yield
    return
  heard: list[int] = []
  handlers = {number: signal.signal(number, lambda n, _: heard.append(n)) for number in numbers}
  try:
    yield
  finally:
    for number, handler in handlers.items():
      signal.signal(number, handler or signal.SIG_DFL)  # None: it is none of Python
    for number in heard:
      signal.raise_signal(number)  # blocked still; it is delivered where the blocking ends
