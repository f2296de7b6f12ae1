"""Batches in order, read ahead by processes that may die without a step being lost."""

import contextlib
import multiprocessing
import os
import pickle
import queue
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from multiprocessing.connection import Connection

import grain

from mlembed_jax.data.loader import Batch, Batches
from mlembed_jax.data.processes import end_with_parent, unheard
from mlembed_jax.errors import DataError

PREFETCH = 2  # each worker has so many batches ready
STALLED_S = 300.0  # a worker that gives no batch for so long is ended; another reads the step
MEMORY = "Look for want of memory"
GUARD = (
  "Put what your script does behind `if __name__ == '__main__':`, as every data worker imports the "
  "script (its own error stands above)"
)
TRIES = 3  # so many workers may die at one step


def iterate(batches: Batches, start: int, workers: int) -> Iterator[Batch]:
  """Yields the batches from step `start` on, read ahead by processes (0: by a thread).

  A worker that dies or stalls is named on stderr, and its step is read again.

  Raises:
    DataError: a file cannot be read, or TRIES workers died at one step.
  """
  step, failures = start, 0
  while step < len(batches):
    reader = _Reader(batches, step, workers)
    try:
      for batch in reader:
        yield batch
        step, failures = batch.step + 1, 0
    except WorkerDied as error:
      failures += 1
      if failures == TRIES:
        raise DataError(
          f"step {step + 1}: {TRIES} data workers in turn died; {error}. {error.likely}, or read "
          "in the main process with data.workers = 0"
        ) from error
      print(f"warning: {error}; reading step {step + 1} again", file=sys.stderr, flush=True)
    finally:
      reader.close()


class WorkerDied(RuntimeError):
  """A process that read data ended or stalled; the message names it.

  `likely`: what to do about the most likely cause, as the beginning of a sentence.
  """

  def __init__(self, message: str, likely: str):
    super().__init__(message)
    self.likely = likely


class _Reader:
  """The batches from one step on, until a worker dies."""

  def __init__(self, batches: Batches, start: int, workers: int):
    self._start, self._last = start, len(batches)
    self._workers = [_Worker(batches, start + k, workers) for k in range(workers)]
    threads = grain.ReadOptions(num_threads=1, prefetch_buffer_size=PREFETCH)
    steps = grain.MapDataset.range(start, len(batches)).map(batches.__getitem__)
    self._own = None if workers else iter(steps.to_iter_dataset(threads))

  def __iter__(self) -> Iterator[Batch]:
    for step in range(self._start, self._last):
      yield next(self._own) if self._own else self._receive(step)

  def _receive(self, step: int) -> Batch:
    number = (step - self._start) % len(self._workers)
    name = f"data worker {number + 1} of {len(self._workers)}"
    try:
      return self._workers[number].receive()
    except (EOFError, OSError, pickle.UnpicklingError) as error:
      worker = self._workers[number]
      message = f"{name}, which had to read step {step + 1}, {worker.ended()}"
      raise WorkerDied(message, GUARD if worker.never_began() else MEMORY) from error

  def close(self) -> None:
    """Ends the workers."""
    for worker in self._workers:
      worker.end()
    if self._own:
      self._own.close()


class _Worker:
  """A process that reads every `stride`-th step, a few ahead.

  It has a pipe of its own, which ends with it, even in the middle of a batch: a queue that several
  processes hold would wait for the rest for ever.
  """

  def __init__(self, batches: Batches, first: int, stride: int):
    context = multiprocessing.get_context("spawn")
    self._pipe, theirs = context.Pipe(duplex=False)
    arguments = theirs, batches, first, stride, os.getpid()
    self._process = context.Process(target=_work, args=arguments, daemon=True)
    with unheard(signal.SIGINT, signal.SIGTERM):  # Slurm sends both to all processes of a job
      self._process.start()
    theirs.close()
    self._stalled = self._began = False

  def receive(self) -> Batch:
    """Returns the next batch; raises EOFError or OSError where the process died."""
    watch = threading.Timer(STALLED_S, self._end_stalled)
    watch.daemon = True
    watch.start()
    try:
      found = self._pipe.recv()
    finally:
      watch.cancel()
    self._began = True
    if isinstance(found, Exception):
      raise found
    return found

  def _end_stalled(self) -> None:
    self._stalled = True
    self._process.kill()

  def ended(self) -> str:
    """Returns how the process ended."""
    self._process.join()
    if self._stalled:
      return f"gave nothing for {STALLED_S:.0f} s and was ended"
    return f"ended with exit code {self._process.exitcode}"

  def never_began(self) -> bool:
    """Returns whether Python itself failed in the process before it read anything."""
    return not self._began and self._process.exitcode == 1

  def end(self) -> None:
    """Ends the process."""
    self._process.kill()
    self._process.join()
    self._pipe.close()


def _work(pipe: Connection, batches: Batches, first: int, stride: int, parent: int) -> None:
  """Sends batches from a process of its own."""
  end_with_parent(parent)
  ready: queue.Queue[Batch | Exception] = queue.Queue(PREFETCH - 1)

  def send() -> None:
    with contextlib.suppress(OSError):  # the process that trains has ended
      while True:
        pipe.send(ready.get())

  threading.Thread(target=send, daemon=True).start()
  try:
    for step in range(first, len(batches), stride):
      ready.put(batches[step])
  except Exception as error:
    if not isinstance(error, DataError):  # its message says all
      error.add_note(traceback.format_exc())
    ready.put(error)
  threading.Event().wait()  # it waits to be ended: what it sent may not be read yet
