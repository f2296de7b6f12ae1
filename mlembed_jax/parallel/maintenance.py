"""Notices that a machine of Google will be taken away: the run stops as after SIGTERM.

The metadata server of a virtual machine answers a request when the value changes, up to an hour
before a TPU host is taken for maintenance, and 30 s before a Spot machine is. SIGTERM may follow.
"""

import contextlib
import http.client
import os
import threading
import urllib.parse
import urllib.request
from collections.abc import Iterator

from jax.sharding import Mesh

from mlembed_jax.parallel.stop import StopSignals

HOST = "GCE_METADATA_HOST"  # names another server, as for Google's own libraries
URL = (
  "http://{host}/computeMetadata/v1/instance/{key}"
  "?wait_for_change=true&timeout_sec=60&last_etag={etag}"
)
FLAVOR = {"Metadata-Flavor": "Google"}  # header of every request, and of every answer
# Values that announce the end, by key. SHUTDOWN is the older name of TERMINATE; machines that are
# moved while they run have no accelerator.
ANNOUNCING = {
  "maintenance-event": {"TERMINATE_ON_HOST_MAINTENANCE", "SHUTDOWN_ON_HOST_MAINTENANCE"},
  "preempted": {"TRUE"},
}
NO_ETAG = "0"  # that of no value: the server answers at once
LONGEST = 1000  # bytes of an answer that are read
PAUSE_S = 1.0  # between requests, as a server may answer without waiting
RETRY_S = 60.0


@contextlib.contextmanager
def watched(mesh: Mesh, stop: StopSignals) -> Iterator[None]:
  """Watches for notices during the block, where this is a TPU machine or `HOST` is set.

  Args:
    mesh: the devices of the run.
    stop: is asked to stop the run after a notice.
  """
  done = threading.Event()
  if HOST in os.environ or mesh.devices.flat[0].platform == "tpu":
    for key in ANNOUNCING:
      threading.Thread(target=_watch, args=(key, stop, done), daemon=True).start()
  try:
    yield
  finally:
    done.set()


def _watch(key: str, stop: StopSignals, done: threading.Event) -> None:
  etag = NO_ETAG
  while not done.is_set():
    try:
      value, etag = _read(key, etag)
    except (OSError, http.client.HTTPException):  # no such server, or it is restarted
      done.wait(RETRY_S)
      continue
    if value in ANNOUNCING[key] and not done.is_set():
      print(f"{key} of this machine is {value}: it will be taken away", flush=True)
      stop.request()
      return
    done.wait(PAUSE_S)


def _read(key: str, etag: str) -> tuple[str, str]:
  """Returns the value of a key and its ETag, when that is another one, or after a minute.

  Raises:
    OSError: no metadata server answers; a page of something else is no answer.
  """
  host = os.environ.get(HOST, "metadata.google.internal")
  url = URL.format(host=host, key=key, etag=urllib.parse.quote(etag, safe=""))
  direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
  with direct.open(urllib.request.Request(url, headers=FLAVOR), timeout=90) as answer:
    if any(answer.headers.get(name) != value for name, value in FLAVOR.items()):
      raise OSError(f"{url} is not answered by a metadata server")
    value = answer.read(LONGEST).decode(errors="replace").strip()
    return value, answer.headers.get("ETag", NO_ETAG)
