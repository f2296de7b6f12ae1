"""Notices of a machine that is taken away, by a server like Google's; grace time."""

import http.server
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from mlembed_jax.parallel import maintenance
from mlembed_jax.parallel.stop import StopSignals

ROOT = pathlib.Path(__file__).parent.parent.parent


@pytest.fixture
def server(monkeypatch):
  """Returns the values by key; a request waits for a change, as it asks for."""
  values = {"maintenance-event": "NONE", "preempted": "FALSE"}
  changed = threading.Condition()

  class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
      key = self.path.split("?")[0].rpartition("/")[2]
      assert self.headers["Metadata-Flavor"] == "Google" and "wait_for_change=true" in self.path
      with changed:
        changed.wait(0.2)
        value = values[key]
      self.send_response(200)
      self.end_headers()
      self.wfile.write(f"{value}\n".encode())

    def log_message(self, *_):
      pass

  with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as found:
    threading.Thread(target=found.serve_forever, daemon=True).start()
    monkeypatch.setenv(maintenance.HOST, f"127.0.0.1:{found.server_port}")
    yield values
    found.shutdown()


MESH = Mesh(np.array(jax.devices()[:1]), ("data",))


@pytest.mark.parametrize(
  ("key", "value"), [("maintenance-event", "TERMINATE_ON_HOST_MAINTENANCE"), ("preempted", "TRUE")]
)
def test_a_notice_stops_the_run_as_sigterm_does(server, key, value):
  with StopSignals(MESH) as stop, maintenance.watched(MESH):
    server[key] = "NONE" if key == "maintenance-event" else "FALSE"
    time.sleep(0.5)
    assert stop.agreed(stop.exchange()) == 0
    server[key] = value
    end = time.monotonic() + 10
    while not stop.agreed(stop.exchange()):
      assert time.monotonic() < end
      time.sleep(0.05)
    assert stop.agreed(stop.exchange()) == signal.SIGTERM
    with pytest.raises(SystemExit) as left:
      stop.leave_if_received("nothing is lost")
    assert left.value.code == 143


SLOW = """
import time, jax, numpy as np
from mlembed_jax.parallel.stop import StopSignals
with StopSignals(jax.sharding.Mesh(np.array(jax.devices()), ("data",)), grace_s=0.5):
  print("ready", flush=True)
  time.sleep(600)  # a save that takes longer than there is time
"""


def test_the_process_ends_when_its_grace_is_over():
  environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
  pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
  with subprocess.Popen([sys.executable, "-c", SLOW], env=environment, **pipes) as process:
    assert process.stdout and process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=30)
  assert process.returncode == 143
  assert "signal 15: ending after this step" in said and "--grace_s 0.5 are over" in said
