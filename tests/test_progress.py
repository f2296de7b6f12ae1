"""What commands say of their progress: to a pipe, to a terminal, and of what is done at once."""

import io
import os
import pty
import re
import subprocess
import sys
import termios
import time

import pytest

from mlembed_jax import progress

COUNT = """
import time
from mlembed_jax import progress
progress.LINE_S = 0.2
with progress.count("encoding", 100, " texts") as bar:
  for _ in range(100):
    time.sleep(0.01)
    bar.update()
"""
CLOCK = """
import time
from mlembed_jax import progress
progress.CLOCK_S = 0.2
with progress.clocked("compiling retrieval"):
  time.sleep({seconds})
"""
JAX = """
import jax, jax.numpy as jnp
from mlembed_jax import progress
progress.CLOCK_S = 0.2

def deep(x):
  for i in range(1500):
    x = jnp.sin(x) + i
  return x

with progress.clocked("compiling"):
  jax.jit(deep).lower(jnp.ones(8)).compile()
"""


def on_pipe(script):
  environment = os.environ | {"JAX_PLATFORMS": "cpu"}  # libtpu without a TPU writes to stderr, too
  done = subprocess.run(
    [sys.executable, "-c", script], capture_output=True, text=True, env=environment
  )
  assert done.returncode == 0, done.stderr
  return done.stderr


def on_terminal(script):
  ours, theirs = pty.openpty()
  termios.tcsetwinsize(theirs, (24, 80))  # tqdm shows nothing in a width of 0
  process = subprocess.Popen([sys.executable, "-c", script], stderr=theirs)
  os.close(theirs)
  found = b""
  while True:
    try:
      found += os.read(ours, 4096)
    except OSError:  # how a terminal without a writer ends
      break
  os.close(ours)
  assert process.wait() == 0
  return found.decode()


def test_a_log_gets_few_lines_and_nothing_that_overwrites():
  said = on_pipe(COUNT)
  assert "\r" not in said and "\x1b" not in said
  lines = said.splitlines()
  assert 3 <= len(lines) <= 8  # 1 s and what a busy machine adds, a line each 0.2 s, and the last
  counts = [int(re.match(r"encoding: \d+% (\d+)/100 \[", line)[1]) for line in lines]
  assert counts == sorted(counts) and counts[-1] == 100


def test_a_terminal_gets_a_bar():
  said = on_terminal(COUNT)
  assert said.count("\r") > 1 and "encoding: 100%|" in said and "100/100" in said


def test_a_log_is_told_the_beginning_and_the_end_of_a_long_compilation():
  assert re.fullmatch(
    r"compiling retrieval \.\.\.\ncompiling retrieval: [1-9] s\n", on_pipe(CLOCK.format(seconds=1))
  )


def test_a_clock_runs_on_a_terminal_and_leaves_nothing():
  said = on_terminal(CLOCK.format(seconds=3))
  assert {"compiling retrieval: 0:00:01", "compiling retrieval: 0:00:02"} <= set(
    re.findall(r"compiling retrieval: [\d:]+", said)
  )
  assert said.endswith("\r") and not said.split("\r")[-2].strip()


def test_the_clock_runs_while_xla_compiles():
  said = on_pipe(JAX)
  assert said.startswith("compiling ...\ncompiling: ")


@pytest.mark.parametrize("output", [on_pipe, on_terminal])
def test_nothing_is_said_of_what_is_done_at_once(output):
  assert output(CLOCK.format(seconds=0)) == ""
  hidden = COUNT.replace('" texts"', '" texts", shown=False')
  assert output(hidden) == ""


def test_work_that_leaves_nothing_has_lines_only_where_it_took_long(monkeypatch):
  monkeypatch.setattr(sys, "stderr", io.StringIO())
  with progress.count("inner", 2, leave=False) as bar:
    bar.update(2)
  assert sys.stderr.getvalue() == ""
  monkeypatch.setattr(progress, "LINE_S", 0.0)
  with progress.count("inner", leave=False) as bar:
    time.sleep(0.01)
    bar.update(2)
  assert sys.stderr.getvalue().splitlines()[-1].startswith("inner: 2it [00:00")


def test_a_count_is_not_said_twice(monkeypatch):
  monkeypatch.setattr(sys, "stderr", io.StringIO())
  monkeypatch.setattr(progress, "LINE_S", 0.0)
  for leave in (True, False):
    with progress.count("inner", 2, leave=leave) as bar:
      time.sleep(0.01)
      bar.update(2)
  with progress.count("empty", 0) as bar:
    pass
  bar.close()
  lines = sys.stderr.getvalue().splitlines()
  assert [line.split(":")[0] for line in lines] == ["inner", "inner", "empty"]


def test_the_time_that_is_left_is_by_the_rate_since_the_first_line(monkeypatch):
  """What was compiled first is not expected to come again."""
  now = 0.0
  monkeypatch.setattr(sys, "stderr", io.StringIO())
  monkeypatch.setattr(progress.time, "monotonic", lambda: now)
  with progress.count("training", 200) as bar:
    for now in (100.0, 110.0, 420.0, 430.0):  # noqa: B007  a pause of 300 s
      bar.update(10)
    bar.set_postfix_str("loss 1")
  lines = sys.stderr.getvalue().splitlines()
  assert "10/200 [01:40<31:40" in lines[0]
  assert "20/200 [01:50<03:00" in lines[1]
  assert "30/200 [07:00<45:20" in lines[2]
  assert "40/200 [07:10<29:20" in lines[3] and lines[4] == lines[3].replace("]", ", loss 1]")


def test_what_was_done_before_is_no_rate(monkeypatch):
  now = 0.0
  monkeypatch.setattr(sys, "stderr", io.StringIO())
  monkeypatch.setattr(progress.time, "monotonic", lambda: now)
  with progress.count("training", 200, initial=100) as bar:
    now = 100.0
    bar.update(10)
  assert "110/200 [01:40<15:00" in sys.stderr.getvalue()
