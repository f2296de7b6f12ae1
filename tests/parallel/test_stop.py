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
from mlembed_jax.parallel.stop import ONE_PRESS_S, StopSignals

ROOT = pathlib.Path(__file__).parent.parent.parent


@pytest.fixture
def server(monkeypatch):
  """Returns the values by key, and its answers; it does not wait for changes."""
  values = {"maintenance-event": "NONE", "preempted": "FALSE", "flavor": "Google", "answers": []}

  class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
      key = self.path.split("?")[0].rpartition("/")[2]
      assert self.headers["Metadata-Flavor"] == "Google" and "wait_for_change=true" in self.path
      values["answers"].append((key, self.path.rpartition("last_etag=")[2]))
      self.send_response(200)
      self.send_header("Metadata-Flavor", values["flavor"])
      self.send_header("ETag", f"etag of {values[key]}")
      self.end_headers()
      self.wfile.write(f"{values[key]}\n".encode())

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
def test_a_notice_stops_the_run_as_sigterm_does(server, monkeypatch, key, value):
  monkeypatch.setattr(maintenance, "PAUSE_S", 0.1)
  monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # nobody answers there
  with StopSignals(MESH) as stop, maintenance.watched(MESH, stop):
    time.sleep(0.5)
    assert stop.agreed(stop.exchange()) == 0
    server[key] = value
    end = time.monotonic() + 10
    while not stop.agreed(stop.exchange()):
      assert time.monotonic() < end
      time.sleep(0.05)
    assert stop.agreed(stop.exchange()) == signal.SIGTERM
    signal.raise_signal(signal.SIGTERM)  # follows the notice of a Spot machine
    signal.raise_signal(signal.SIGTERM)
    with pytest.raises(SystemExit) as left:
      stop.leave_if_received("nothing is lost")
    assert left.value.code == 143


def test_the_server_is_asked_once_a_second_for_what_it_has_not_said(server):
  with StopSignals(MESH) as stop, maintenance.watched(MESH, stop):
    time.sleep(1.5)
  asked = [etag for key, etag in server["answers"] if key == "preempted"]
  assert asked == ["0", "etag%20of%20FALSE"]


@pytest.mark.parametrize(("flavor", "value"), [("none", "TRUE"), ("Google", "<html>404</html>")])
def test_a_page_of_something_else_stops_nothing(server, flavor, value):
  server["flavor"], server["preempted"] = flavor, value
  with StopSignals(MESH) as stop, maintenance.watched(MESH, stop):
    time.sleep(0.3)
    assert server["answers"] and stop.agreed(stop.exchange()) == 0


@pytest.fixture
def ctrl_c():
  """Lets Ctrl-C raise: a shell starts what it runs in the background with it ignored."""
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  yield
  signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
def test_only_a_second_ctrl_c_ends_at_once():
  with StopSignals(MESH) as stop:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGTERM):
      signal.raise_signal(number)
      assert stop.agreed(stop.exchange()) == signal.SIGINT
    signal.raise_signal(signal.SIGINT)  # a program has passed on the same press
    time.sleep(0.2)
    assert stop.agreed(stop.exchange()) == signal.SIGINT
    time.sleep(ONE_PRESS_S)
    with pytest.raises(KeyboardInterrupt):
      signal.raise_signal(signal.SIGINT)
      time.sleep(5)  # a thread decides which press it is


def test_after_the_run_its_grace_ends_nothing():
  with StopSignals(MESH, grace_s=0.3) as stop:  # else this ends the process of the tests
    signal.raise_signal(signal.SIGTERM)
    stop.request()
  time.sleep(0.5)


SLOW = """
import pathlib, sys, time, jax, numpy as np
from mlembed_jax.parallel.stop import StopSignals
from mlembed_jax.training.lock import WorkdirLock
mesh = jax.sharding.Mesh(np.array(jax.devices()), ("data",))
def release():
  lock.release()
  time.sleep(600)  # the storage hangs
with WorkdirLock(pathlib.Path(sys.argv[1])) as lock, StopSignals(mesh, 0.5, release):
  print("ready", flush=True)
  time.sleep(600)  # a save that takes longer than there is time
"""


def test_the_process_ends_and_holds_no_lock_when_its_grace_is_over(tmp_path):
  environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
  pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
  command = [sys.executable, "-c", SLOW, str(tmp_path)]
  with subprocess.Popen(command, env=environment, **pipes) as process:
    assert process.stdout and process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=30)
  assert process.returncode == 143 and not list(tmp_path.iterdir())
  assert "signal 15: saving after this step" in said and "--grace_s 0.5 are over" in said


BUSY = """
import hashlib, jax, numpy as np
from mlembed_jax.parallel.stop import StopSignals
mesh = jax.sharding.Mesh(np.array(jax.devices()), ("data",))
with StopSignals(mesh):
  print("ready", flush=True)
  hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)  # as a compilation, it lets no handler run
"""


def test_ctrl_c_is_answered_at_once_and_the_second_ends_what_no_handler_can_reach():
  environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
  pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
  with subprocess.Popen([sys.executable, "-c", BUSY], env=environment, **pipes) as process:
    assert process.stdout and process.stderr and process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    lines = [process.stderr.readline() for _ in range(2)]
    assert lines[1] == "signal 2: saving after this step; press again to stop without saving\n"
    time.sleep(ONE_PRESS_S + 0.1)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
  assert process.returncode == 130 and said.strip() == "signal 2: ended without saving"
