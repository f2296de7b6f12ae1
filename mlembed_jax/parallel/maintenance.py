"""Notices that a machine of Google will be taken away: each becomes a SIGTERM of this process.

The metadata server of a virtual machine answers a request when the value changes, up to an hour
before a TPU host is taken for maintenance, and 30 s before a Spot machine is.
"""

import contextlib
import os
import signal
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator

from jax.sharding import Mesh

HOST = "GCE_METADATA_HOST"  # names another server, as for Google's own libraries
URL = "http://{host}/computeMetadata/v1/instance/{key}?wait_for_change=true&timeout_sec=60"
# Values that announce nothing, by key. Machines that are moved while they run have no accelerator.
QUIET = {"maintenance-event": {"NONE", "MIGRATE_ON_HOST_MAINTENANCE"}, "preempted": {"FALSE"}}
RETRY_S = 60.0


@contextlib.contextmanager
def watched(mesh: Mesh) -> Iterator[None]:
  """Watches for notices during the block, where this is a TPU machine or `HOST` is set."""
  done = threading.Event()
  if HOST in os.environ or mesh.devices.flat[0].platform == "tpu":
    for key in QUIET:
      threading.Thread(target=_watch, args=(key, done), daemon=True).start()
  try:
    yield
  finally:
    done.set()


def _watch(key: str, done: threading.Event) -> None:
  while not done.is_set():
    try:
      value = _read(key)
    except (OSError, urllib.error.URLError):  # no such server, or it is restarted
      done.wait(RETRY_S)
      continue
    if value not in QUIET[key] and not done.is_set():
      print(f"{key} of this machine is {value}: it will be taken away", flush=True)
      os.kill(os.getpid(), signal.SIGTERM)
      return


def _read(key: str) -> str:
  """Returns the value of a key after it changed, or after a minute."""
  host = os.environ.get(HOST, "metadata.google.internal")
  request = urllib.request.Request(
    URL.format(host=host, key=key), headers={"Metadata-Flavor": "Google"}
  )
  with urllib.request.urlopen(request, timeout=90) as answer:
    return answer.read().decode().strip()
