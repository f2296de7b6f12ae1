"""Signals that reach a program while it starts its processes."""

import os
import signal
import threading
import time

from mlembed_jax.data.processes import unheard


def test_a_signal_waits_until_processes_are_started_whatever_thread_hears_it():
  heard: list[int] = []
  before = signal.signal(signal.SIGUSR1, lambda number, _: heard.append(number))
  end = threading.Event()
  thread = threading.Thread(target=end.wait)  # as those of libraries, it blocks nothing
  thread.start()
  try:
    with unheard(signal.SIGUSR1):
      os.kill(os.getpid(), signal.SIGUSR1)
      time.sleep(0.2)
      assert not heard
    time.sleep(0.2)
    assert heard == [signal.SIGUSR1]
  finally:
    end.set()
    thread.join()
    signal.signal(signal.SIGUSR1, before)
