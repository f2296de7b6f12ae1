"""A long run: memory, open files and compilations must not grow once it is warm.

  python -m tests.faults.soak --steps 3000

Prints what the process holds at every 200th step, and ends with 1 where the last third holds more
than the first: memory by more than 5 %, open files or compiled programs at all. Of each third the
least counts, for a save holds some of both for a while.
"""

import argparse
import dataclasses
import pathlib
import subprocess
import sys
import tempfile
import threading
import time

from tests import material
from tests.runs import ENVIRONMENT, ROOT, SMALL, command, lines

EVERY = 200


@dataclasses.dataclass(frozen=True)
class Held:
  """What a process holds at a step."""

  step: int
  memory_mb: float
  files: int
  programs: int  # compiled so far


def _memory_mb(pid: int) -> float:
  status = pathlib.Path(f"/proc/{pid}/status").read_text()
  return int(status.partition("VmRSS:")[2].split()[0]) / 1024


def watch(process: subprocess.Popen, workdir: pathlib.Path, log: list[str]) -> list[Held]:
  """Returns what the process held at each `EVERY`-th step."""
  found: list[Held] = []
  while process.poll() is None:
    time.sleep(0.2)
    step = max((line["step"] for line in lines(workdir)), default=0)
    if step >= EVERY * (len(found) + 1):
      files = len(list(pathlib.Path(f"/proc/{process.pid}/fd").iterdir()))
      programs = sum("Finished XLA compilation" in line for line in log)
      found.append(Held(step, _memory_mb(process.pid), files, programs))
      print(found[-1], flush=True)
  return found


def main() -> int:
  """Runs, watches and compares."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--steps", type=int, default=3000)
  args = parser.parse_args()
  flags = SMALL | {"train.steps": args.steps, "train.log_every": 10, "train.checkpoint_every": 100}
  flags |= {"train.keep_checkpoints": 2, "data.workers": 1}
  with tempfile.TemporaryDirectory() as folder:
    data, workdir = pathlib.Path(folder) / "data", pathlib.Path(folder) / "run"
    material.write(data)
    process = subprocess.Popen(
      command(data, workdir, **flags),
      cwd=ROOT,
      env=ENVIRONMENT | {"JAX_LOG_COMPILES": "1"},
      stdout=subprocess.DEVNULL,
      stderr=subprocess.PIPE,
      text=True,
    )
    log: list[str] = []
    threading.Thread(target=lambda: log.extend(process.stderr or ()), daemon=True).start()
    found = watch(process, workdir, log)
  if process.returncode or len(found) < 3:
    sys.exit("".join(log[-20:]) + f"error: the run ended after {len(found)} looks")
  third = len(found) // 3
  first, last = _least(found[:third]), _least(found[-third:])
  print(f"first third: {first}\nlast third: {last}")
  grown = last.memory_mb > 1.05 * first.memory_mb or last.files > first.files
  return int(grown or last.programs > first.programs)


def _least(found: list[Held]) -> Held:
  columns = zip(*map(dataclasses.astuple, found), strict=True)
  return Held(*map(min, columns))


if __name__ == "__main__":
  sys.exit(main())
