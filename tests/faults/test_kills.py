"""Kills of commands; `--faults=long` makes 100 of them."""

import subprocess
import sys

from tests.faults import kills
from tests.runs import ENVIRONMENT, ROOT


def test_nothing_is_lost_by_kills(tmp_path, pytestconfig):
  if pytestconfig.getoption("--faults") == "long":
    table, least = kills.run_all(tmp_path, 100, seed=0), 100
  else:
    kills.leave_alone(tmp_path)
    table, least = kills.run(tmp_path, 2, seed=0, per_run=2), 2
  assert sum(counts["kills"] for counts in table.values()) >= least
  assert not any(counts["lost"] for counts in table.values())


def test_vectors_are_whole_after_a_kill_before_any_operation_on_files(tmp_path):
  command = [sys.executable, "-m", "tests.faults.encode_run", tmp_path / "out" / "v.npy"]
  result = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
  assert result.returncode == 0, result.stdout + result.stderr
  assert len(result.stdout.splitlines()) > 80  # kills
