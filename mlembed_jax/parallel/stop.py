"""Signals that stop a run: every process stops after the same step, whichever of them got one."""

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

RELEASE_S = 1.0  # the storage may be what the process hangs on
# Python raises nothing while XLA compiles; after so many seconds a second Ctrl-C ends the process.
IMPATIENT_S = 3.0
# Programs such as `timeout` pass on what a terminal has sent to all: one press comes twice.
ONE_PRESS_S = 1.0
HANDLED_S = 0.1  # so soon the main thread has run a handler, unless it is in a compilation


SAYS: dict[int, str] = {
  signal.SIGTERM: "saving after this step",
  signal.SIGINT: "saving after this step; press again to stop without saving",
}


def _end(number: int, said: str, on_timeout: Callable[[], None] | None) -> None:
  os.write(sys.stderr.fileno(), f"\nsignal {number}: {said}\n".encode())
  if on_timeout:
    last = threading.Thread(target=on_timeout, daemon=True)
    last.start()
    last.join(RELEASE_S)
  os._exit(128 + number)


class StopSignals(contextlib.AbstractContextManager["StopSignals"]):
  """Turns SIGTERM, which preempted machines get, and Ctrl-C into a flag read between steps."""

  def __init__(
    self, mesh: Mesh, grace_s: float = 0.0, on_timeout: Callable[[], None] | None = None
  ) -> None:
    """Installs the handlers. Several processes exchange their flags over the devices of `mesh`.

    Args:
      mesh: the devices of all processes.
      grace_s: the process ends so many seconds after the first signal in any case, with the status
        that lets launchers start it again; 0: it takes the time it needs. This ends with the block.
      on_timeout: called before that end, which waits a second for it.
    """
    self._received, self._mesh = 0, mesh
    self._pressed_twice = self._interrupted = False
    self._grace_s, self._on_timeout = grace_s, on_timeout
    self._watchdogs: list[threading.Timer] = []
    whole = NamedSharding(mesh, PartitionSpec())
    self._largest = jax.jit(lambda flags: flags.max(), out_shardings=whole)
    self._previous = {number: signal.signal(number, self._receive) for number in SAYS}
    # Handlers wait for the end of a compilation, which takes minutes; this thread answers at once.
    self._woken, self._wakes = socket.socketpair()
    self._wakes.setblocking(False)
    self._fd = signal.set_wakeup_fd(self._wakes.fileno(), warn_on_full_buffer=False)
    self._thread = threading.Thread(target=self._answer, daemon=True)
    self._thread.start()

  def _receive(self, number: int, _: Any) -> None:
    # A second Ctrl-C ends the program at once. SIGTERM stays caught: machines that are taken away
    # may get several, or one after a notice, while the checkpoint is being written.
    if number == signal.SIGINT and self._pressed_twice:
      self._interrupted = True
      signal.signal(signal.SIGINT, self._previous[signal.SIGINT])
      signal.raise_signal(signal.SIGINT)
    self.request(number)

  def _answer(self) -> None:
    """Requests a stop for each signal that arrives, whatever the main thread does meanwhile."""
    pressed = 0.0  # when Ctrl-C came first
    while number := (self._woken.recv(1) or b"\0")[0]:
      if number in SAYS:
        self.request(number)
      if number == signal.SIGINT and not self._pressed_twice:
        pressed = pressed or time.monotonic()
        if time.monotonic() - pressed > ONE_PRESS_S:
          self._pressed_twice = True
          self._end_in(IMPATIENT_S, "ended without saving")
          time.sleep(HANDLED_S)
          if not self._interrupted:  # the handler ran before it could know
            os.kill(os.getpid(), signal.SIGINT)

  def request(self, number: int = signal.SIGTERM) -> None:
    """Stops the run as the signal does; any thread may call this. Only the first one counts."""
    if self._received:
      return
    self._received = number
    # print() could be in the middle of another one.
    os.write(sys.stderr.fileno(), f"\nsignal {number}: {SAYS[number]}\n".encode())
    if self._grace_s:
      said = f"--grace_s {self._grace_s:g} are over, the newest checkpoint is what is left"
      self._end_in(self._grace_s, said)

  def _end_in(self, seconds: float, said: str) -> None:
    """Ends the process so many seconds from now, unless the block ends before."""
    watchdog = threading.Timer(seconds, _end, [self._received, said, self._on_timeout])
    watchdog.daemon = True
    self._watchdogs.append(watchdog)  # two, where a signal and a notice come at the same time
    watchdog.start()

  def exchange(self) -> jax.Array | None:
    """Sends this process's flag to all others; call it right before a step is started.

    The devices compute the answer before that step, so when the step before is done it is there:
    nobody waits. None with a single process.
    """
    if not jax.distributed.is_initialized():
      return None
    places = NamedSharding(self._mesh, PartitionSpec(self._mesh.axis_names))
    flags = np.full(len(self._mesh.local_devices), self._received, np.int32)
    return self._largest(jax.make_array_from_process_local_data(places, flags))

  def agreed(self, exchanged: jax.Array | None) -> int:
    """Returns the signal that all processes stop for, 0 for none."""
    return self._received if exchanged is None else int(jax.device_get(exchanged))

  def leave(self, number: int, saved: str) -> None:
    """Ends the program with status 128 + signal."""
    print(f"stopped by signal {number}; {saved}, the same command goes on", flush=True)
    sys.exit(128 + number)

  def leave_if_received(self, saved: str) -> None:
    """Ends the program after a stop signal of any process; waits for all."""
    if number := self.agreed(self.exchange()):
      self.leave(number, saved)

  def __exit__(self, *_: Any) -> None:
    signal.set_wakeup_fd(self._fd)
    for number, handler in self._previous.items():
      signal.signal(number, handler)
    self._wakes.close()  # ends the thread
    self._thread.join()
    self._woken.close()
    for watchdog in self._watchdogs:
      watchdog.cancel()  # what follows, as in a notebook, is not the run
