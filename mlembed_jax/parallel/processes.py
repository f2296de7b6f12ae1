"""What the processes of a run do together; a run of one process exchanges nothing.

All processes must call these functions in the same order.
"""

import contextlib
import hashlib
import itertools
import json
import os
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from mlembed_jax.errors import ConfigError, OtherProcessError

LONGEST_WAIT_S = 24 * 3600  # others wait while one process prepares data or exports
SEEN_WITHIN_S = 10.0  # a new file on shared storage; nobody has asked for it before it is there
PIECE_BYTES = 256 * 2**20  # a larger array is gathered in pieces of so many bytes

_waits = itertools.count()


def _alone() -> bool:
  return not jax.distributed.is_initialized()  # asking for the processes would start the devices


def is_first() -> bool:
  """Returns whether this process writes the files of the run."""
  return _alone() or jax.process_index() == 0


def gather(value: Any) -> list[Any]:
  """Returns the JSON value of every process, in their order.

  Raises:
    OtherProcessError: another process came here by an error, see `agreed`.
  """
  return [value] if _alone() else _exchange(value, None)


def _exchange(value: Any, error: str | None) -> list[Any]:
  # The device is not kept busy with waiting, and a process that died is noticed.
  wait = ocp.multihost.get_barrier_sync_fn()
  wait(key=f"mlembed_jax.{next(_waits)}", timeout_ms=LONGEST_WAIT_S * 1000)
  data = np.frombuffer(json.dumps([value, error]).encode(), np.uint8)
  with jax.transfer_guard("allow"):
    sizes = multihost_utils.process_allgather(np.array(len(data), np.int32))
    padded = np.zeros(sizes.max(), np.uint8)
    padded[: len(data)] = data
    rows = multihost_utils.process_allgather(padded)
  found = [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]
  for process, (_, theirs) in enumerate(found):
    if theirs and not error:
      raise OtherProcessError(f"process {process}: {theirs}")
  return [value for value, _ in found]


def shared(items: Sequence[Any], act: Callable[[Any], Any]) -> list[Any]:
  """Returns the JSON value of `act` for every item, in their order; each process does a part."""
  if _alone():
    return [act(item) for item in items]
  count = jax.process_count()
  with agreed():
    mine = [act(item) for item in items[jax.process_index() :: count]]
  parts = gather(mine)
  return [parts[i % count][i // count] for i in range(len(items))]


@contextlib.contextmanager
def agreed() -> Iterator[None]:
  """Ends the block on all processes, or with an error on all where one has one.

  Nothing in the block may wait for other processes but by the functions of this module.
  """
  try:
    yield
  except OtherProcessError:
    raise
  except Exception as error:
    if not _alone() and "told" not in vars(error):
      vars(error)["told"] = True  # an `agreed` around this one has nothing to add
      _exchange(None, str(error) or type(error).__name__)
    raise
  gather(None)


def on_first(act: Callable[[], Any]) -> None:
  """Runs `act` on process 0 while the others wait; its error is raised on all."""
  with agreed():
    if is_first():
      act()


def check_same(values: Mapping[str, Any]) -> None:
  """Raises ConfigError on all processes where one has other values than process 0, naming them."""
  text = json.dumps(values, sort_keys=True)
  digests = gather(hashlib.sha256(text.encode()).hexdigest())
  if len(set(digests)) == 1:
    return
  others = [process for process, digest in enumerate(digests) if digest != digests[0]]
  by_process = gather({name: repr(value) for name, value in values.items()})
  first, other = by_process[0], by_process[others[0]]
  lines = [
    f"  {name}: {first.get(name)} on process 0, {other.get(name)} on process {others[0]}"
    for name in {**first, **other}
    if first.get(name) != other.get(name)
  ]
  raise ConfigError(
    f"{', '.join(f'process {process}' for process in others)}: not the same run as process 0; "
    "start all with the same command, files and versions:\n" + "\n".join(lines)
  )


def check_shared(folder: pathlib.Path) -> None:
  """Raises ConfigError where a process does not see what process 0 writes into `folder`."""
  if _alone():
    return
  secret = gather(os.urandom(8).hex())[0]
  probe = folder / f".shared_{secret}"
  on_first(probe.touch)
  with contextlib.ExitStack() as stack:
    if is_first():
      stack.callback(probe.unlink, missing_ok=True)
    with agreed():
      end = time.monotonic() + SEEN_WITHIN_S
      while not probe.exists():
        if time.monotonic() > end:
          raise ConfigError(
            f"workdir: {folder} is not the folder that process 0 has under this name; it must "
            "lie on storage that all machines share"
          )
        time.sleep(0.5)


def place(tree: Any, shardings: Any) -> Any:
  """Returns global arrays of numpy ones that every process has whole."""

  def one(x: Any, sharding: Sharding) -> jax.Array:
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

  return jax.tree.map(one, tree, shardings)


def from_first(tree: Any) -> Any:
  """Returns the numpy arrays of process 0 on every process."""
  return tree if _alone() else multihost_utils.broadcast_one_to_all(tree)


def fetch(tree: Any) -> Any:
  """Returns global arrays as numpy ones on process 0; the others get empty ones.

  A device never holds more than one piece of an array beside what it has.
  """
  return jax.tree.map(_fetch, tree)


def _fetch(x: jax.Array) -> np.ndarray:
  if x.is_fully_addressable:
    return jax.device_get(x)
  rows = max(1, PIECE_BYTES * len(x) // x.nbytes)
  out = np.empty(x.shape if is_first() else 0, x.dtype)
  whole = NamedSharding(x.sharding.mesh, PartitionSpec())  # pyright: ignore
  for start in range(0, len(x), rows):
    piece = jax.jit(lambda x, at=start: x[at : at + rows], out_shardings=whole)(x)
    if is_first():
      out[start : start + rows] = jax.device_get(piece)
  return out
