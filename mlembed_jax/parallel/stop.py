"""Signals that stop a run: every process stops after the same step, whichever of them got one."""

import contextlib
import os
import signal
import sys
import threading
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec


def _out_of_time(number: int, grace_s: float) -> None:
  said = f"signal {number}: --grace_s {grace_s:g} are over, the newest checkpoint is what is left"
  os.write(sys.stderr.fileno(), f"\n{said}\n".encode())
  os._exit(128 + number)


class StopSignals(contextlib.AbstractContextManager["StopSignals"]):
  """Turns SIGTERM, which preempted machines get, and Ctrl-C into a flag read between steps."""

  def __init__(self, mesh: Mesh, grace_s: float = 0.0) -> None:
    """Installs the handlers. Several processes exchange their flags over the devices of `mesh`.

    The process ends `grace_s` seconds after a signal in any case, with the status that lets
    launchers start it again; 0: it takes the time it needs.
    """
    self._received, self._mesh, self._grace_s = 0, mesh, grace_s
    whole = NamedSharding(mesh, PartitionSpec())
    self._largest = jax.jit(lambda flags: flags.max(), out_shardings=whole)
    stopping = (signal.SIGTERM, signal.SIGINT)
    self._previous = {number: signal.signal(number, self._receive) for number in stopping}

  def _receive(self, number: int, _: Any) -> None:
    self._received = number
    self.__exit__()  # a second one ends the program at once
    # print() could be in the middle of another one.
    os.write(sys.stderr.fileno(), f"\nsignal {number}: ending after this step\n".encode())
    if self._grace_s:
      watchdog = threading.Timer(self._grace_s, _out_of_time, [number, self._grace_s])
      watchdog.daemon = True
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
    for number, handler in self._previous.items():
      signal.signal(number, handler)
