"""One trainer per workdir: a file that says who trains there, and goes on saying so.

WORKDIR/lock.json is written anew every `BEAT_S` seconds. On the same machine the process itself
tells whether it lives. Of another machine or container, whose clock may differ, another start
waits `STALE_S` seconds for the next beat before it takes over. Where there is one, the start waits
on for the end, `WAIT_S` seconds in all: a container that was told to end may still be saving.
"""

import contextlib
import errno
import json
import os
import pathlib
import secrets
import socket
import threading
import time
from typing import Any

from mlembed_jax.errors import ConfigError, TrainingError
from mlembed_jax.files import storage_errors, write_json

BEAT_S = 10.0
STALE_S = 120.0  # NFS clients may see a file as it was 60 s ago
WAIT_S = 600.0
SAY_S = 60.0
NO_LINKS = (errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.EMLINK)  # gcsfuse, FAT

Record = dict[str, Any]


class WorkdirLock(contextlib.AbstractContextManager["WorkdirLock"]):
  """Holds the lock of a workdir while it is open."""

  def __init__(self, workdir: pathlib.Path):
    """Takes the lock.

    Raises:
      ConfigError: another process trains there; the message names it.
      StorageError: the workdir cannot be written to or read.
    """
    self._path = workdir / "lock.json"
    self._record = _this_process() | {"started": _now(), "token": secrets.token_hex(8), "beat": 0}
    self._lost: Record | None = None
    self._done = threading.Event()
    with storage_errors(self._path):
      while not self._created():
        _wait_for_end(self._path)
    self._thread = threading.Thread(target=self._beat, name="workdir lock", daemon=True)
    self._thread.start()

  def check(self) -> None:
    """Raises TrainingError where another process took over, as this one had stood still.

    A lock that cannot be read is no proof of that.
    """
    with contextlib.suppress(OSError):
      self._look()
    if self._lost:
      raise TrainingError(
        f"{self._path.parent} was taken over by {_name(self._lost)}, as this process gave no sign "
        f"of life for {STALE_S:.0f} s. Nothing of it is saved after that"
      )

  def release(self) -> None:
    """Removes the lock, unless it is another's by now."""
    self._done.set()
    self._thread.join()
    with contextlib.suppress(OSError):
      if not self._lost and (_read(self._path) or {}).get("token") == self._record["token"]:
        self._path.unlink(missing_ok=True)

  def __exit__(self, *_: Any) -> None:
    self.release()

  def _created(self) -> bool:
    """Returns whether there was no lock, so that it is this process's now."""
    temporary = self._path.with_name(f".{self._path.name}.{self._record['token']}")
    try:
      temporary.write_text(json.dumps(self._record), encoding="utf-8")
      os.link(temporary, self._path)
    except FileExistsError:  # so says NFS, too, of a request that it did and was sent again
      return (_read(self._path) or {}).get("token") == self._record["token"]
    except OSError as error:
      if error.errno not in NO_LINKS:
        raise
      return self._written()
    finally:
      with contextlib.suppress(OSError):
        temporary.unlink(missing_ok=True)
    return True

  def _written(self) -> bool:
    """Does what `_created` does where there are no links; readers may see half of the lock."""
    try:
      file = self._path.open("x", encoding="utf-8")
    except FileExistsError:
      return False
    try:
      with file:
        json.dump(self._record, file)
    except OSError:
      self._path.unlink(missing_ok=True)
      raise
    return True

  def _beat(self) -> None:
    while not self._done.wait(BEAT_S):
      with contextlib.suppress(OSError):  # a full disk or lost workdir is told by the next save
        self._look()
        if self._lost:
          return
        self._record["beat"] += 1
        write_json(self._path, self._record)

  def _look(self) -> None:
    """Notes whose the lock is, where it is another's."""
    found = _read(self._path)
    if found and found.get("token") != self._record["token"]:
      self._lost = found


def _wait_for_end(path: pathlib.Path) -> None:
  """Removes a lock whose process is gone.

  Raises:
    ConfigError: it lives.
  """
  found = _read(path)
  if found is None:
    return  # it ended by itself
  lives = _lives(found)
  if lives is None:
    found, lives = _watched(path, found)
  if lives:
    raise ConfigError(
      f"{path.parent} is being trained by {_name(found)}; stop that run first, or use another "
      "--workdir"
    )
  if lives is False and _removed(path, found):
    print(f"{path}: {_name(found)} is gone; its lock is taken over", flush=True)


def _removed(path: pathlib.Path, lock: Record) -> bool:
  """Removes a lock, unless another start took over meanwhile; returns whether it did.

  It is moved away first, which only one start can do, and looked at then: between a look and a
  removal another one may put its own lock there.
  """
  aside = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
  try:
    path.rename(aside)
  except FileNotFoundError:
    return False
  same = _read(aside) == lock
  if not same:  # it goes back, unless its owner has written it anew
    _put_back(aside, path)
  aside.unlink(missing_ok=True)
  return same


def _put_back(aside: pathlib.Path, path: pathlib.Path) -> None:
  try:
    os.link(aside, path)
  except FileExistsError:
    pass
  except OSError as error:
    if error.errno not in NO_LINKS:
      raise
    aside.rename(path)


def _watched(path: pathlib.Path, lock: Record) -> tuple[Record, bool | None]:
  """Returns a lock as it was at last, and whether its process lives.

  False: it did not change for `STALE_S` seconds. True: it still does after `WAIT_S` seconds. None:
  it ended, or is that of another process now.
  """
  start = changed = said = time.monotonic()
  print(f"{path}: waiting whether {_name(lock)} still trains here", flush=True)
  while (now := time.monotonic()) - changed < STALE_S:
    time.sleep(min(1.0, BEAT_S))
    found = _read(path)
    if found is None or (found and found.get("token") != lock.get("token")):
      return lock, None
    if found and found != lock:
      lock, changed = found, now
      if now - start > WAIT_S:
        return lock, True
    if now - said > SAY_S:
      said = now
      left = max(0.0, start + WAIT_S - now)
      print(f"{path}: {_name(lock)} still trains here; waiting for {left:.0f} s more", flush=True)
  return lock, False


def _lives(record: Record) -> bool | None:
  """Returns whether the process of a lock lives, None where this machine cannot know."""
  here = _this_process()
  if here["namespace"] is None or any(record.get(k) != here[k] for k in ("boot", "namespace")):
    return None
  started = _started(record.get("pid"))
  return started is not None and started == record.get("process_started")


def _this_process() -> Record:
  return {
    "host": socket.gethostname(),
    "pid": os.getpid(),
    "process_started": _started(os.getpid()),
    "boot": _text("/proc/sys/kernel/random/boot_id"),
    "namespace": _namespace(),  # containers of one machine have the same numbers of processes
  }


def _namespace() -> str | None:
  try:
    return os.readlink("/proc/self/ns/pid")
  except OSError:
    return None  # not Linux


def _started(pid: Any) -> str | None:
  """Returns when a process started, in ticks since the start of the machine; None without it.

  One that ended and was not asked for its status yet (states Z and X) is none.
  """
  stat = _text(f"/proc/{pid}/stat")
  fields = stat.rpartition(")")[2].split() if stat else ["X"]
  return None if fields[0] in "ZXx" else fields[19]


def _text(path: str) -> str | None:
  try:
    return pathlib.Path(path).read_text().strip()
  except OSError:
    return None


def _read(path: pathlib.Path) -> Record | None:
  """Returns a lock, None where there is none; one that is being written is {}."""
  try:
    value = json.loads(path.read_text(encoding="utf-8"))
  except FileNotFoundError:
    return None
  except (ValueError, RecursionError):
    return {}
  return value if isinstance(value, dict) else {}


def _name(record: Record) -> str:
  if not record:
    return "a process that left no name"
  return f"process {record.get('pid')} on {record.get('host')}, started {record.get('started')}"


def _now() -> str:
  return time.strftime("%Y-%m-%dT%H:%M:%S%z")
