"""One trainer per workdir: a file that says who trains there, and goes on saying so.

WORKDIR/lock.json is written anew every `BEAT_S` seconds. On the same machine the process itself
tells whether it lives. Of another machine, whose clock may differ, another start waits `STALE_S`
seconds for the next beat before it takes over.
"""

import contextlib
import json
import os
import pathlib
import secrets
import socket
import threading
import time
from typing import Any

from mlembed_jax.errors import ConfigError, TrainingError
from mlembed_jax.files import write_json

BEAT_S = 10.0
STALE_S = 120.0  # NFS clients may see a file as it was 60 s ago

Record = dict[str, Any]


class WorkdirLock(contextlib.AbstractContextManager["WorkdirLock"]):
  """Holds the lock of a workdir while it is open."""

  def __init__(self, workdir: pathlib.Path):
    """Takes the lock.

    Raises:
      ConfigError: another process trains there; the message names it.
    """
    self._path = workdir / "lock.json"
    self._record = _this_process() | {"started": _now(), "token": secrets.token_hex(8), "beat": 0}
    self._lost: Record | None = None
    self._done = threading.Event()
    while not self._created():
      _wait_for_end(self._path)
    self._thread = threading.Thread(target=self._beat, name="workdir lock", daemon=True)
    self._thread.start()

  def check(self) -> None:
    """Raises TrainingError where another process took over, as this one had stood still."""
    if self._lost:
      raise TrainingError(
        f"{self._path.parent} was taken over by {_name(self._lost)}, as this process gave no sign "
        f"of life for {STALE_S:.0f} s. Nothing of it is saved after that"
      )

  def __exit__(self, *_: Any) -> None:
    self._done.set()
    self._thread.join()
    if not self._lost and (_read(self._path) or {}).get("token") == self._record["token"]:
      with contextlib.suppress(OSError):
        self._path.unlink(missing_ok=True)

  def _created(self) -> bool:
    try:
      with self._path.open("x", encoding="utf-8") as file:
        json.dump(self._record, file)
    except FileExistsError:
      return False
    return True

  def _beat(self) -> None:
    while not self._done.wait(BEAT_S):
      with contextlib.suppress(OSError):  # a full disk or lost workdir is told by the next save
        found = _read(self._path)
        if found and found.get("token") != self._record["token"]:
          self._lost = found
          return
        self._record["beat"] += 1
        write_json(self._path, self._record)


def _wait_for_end(path: pathlib.Path) -> None:
  """Removes a lock whose process is gone.

  Raises:
    ConfigError: it lives.
  """
  first, lives = _read(path), None
  if first is None:
    return  # it ended by itself
  if (lives := _lives(first)) is None:
    print(f"{path}: waiting whether {_name(first)} still trains here", flush=True)
    lives = _beats(path, first)
  if lives:
    raise ConfigError(
      f"{path.parent} is being trained by {_name(first)}; stop that run first, or use another "
      "--workdir"
    )
  if _read(path) == first:  # nobody else took over
    print(f"{path}: {_name(first)} is gone; its lock is taken over", flush=True)
    path.unlink(missing_ok=True)


def _beats(path: pathlib.Path, first: Record) -> bool:
  """Returns whether the lock changes within `STALE_S` seconds; one that ends has changed, too."""
  end = time.monotonic() + STALE_S
  while time.monotonic() < end:
    time.sleep(min(1.0, BEAT_S))
    found = _read(path)
    if found != first:
      return found is not None
  return False


def _lives(record: Record) -> bool | None:
  """Returns whether the process of a lock lives, None where this machine cannot know."""
  here = _this_process()
  if here["namespace"] is None or any(record.get(k) != here[k] for k in ("boot", "namespace")):
    return None
  return _started(record.get("pid")) == record.get("process_started")


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
  """Returns when a process started, in ticks since the start of the machine; None without it."""
  stat = _text(f"/proc/{pid}/stat")
  return stat.rpartition(")")[2].split()[19] if stat else None


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
  except ValueError:
    return {}
  return value if isinstance(value, dict) else {}


def _name(record: Record) -> str:
  if not record:
    return "a process that left no name"
  return f"process {record.get('pid')} on {record.get('host')}, started {record.get('started')}"


def _now() -> str:
  return time.strftime("%Y-%m-%dT%H:%M:%S%z")
