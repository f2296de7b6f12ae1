"""Kills commands in each of their phases, and compares the end with one that was left alone.

  python -m tests.faults.kills --kills 100

Prints one line per phase and signal: kills, and those after which anything was lost. Seven in ten
kill training, the others `prepare`, `encode` and one of two processes that train together. A
command that is killed goes on until its next kill. What is compared in the end are all arrays of
the last checkpoint, metrics but times, held-out scores and the exported weights; all prepared
files; vectors and their ranges: byte for byte.
"""

import argparse
import collections
import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence

from tests import material
from tests.faults.commands import digests, encode, prepare
from tests.parallel.test_processes import children, launcher
from tests.runs import ENVIRONMENT, ROOT, SMALL, TIMES, arrays, command, lines, wait_for_step

STEPS, EVERY = 24, 4
FLAGS = SMALL | {
  "train.steps": STEPS,
  "train.checkpoint_every": EVERY,
  "train.keep_checkpoints": 3,
  "eval.every": 2 * EVERY,
  "export.at_end": True,
  "data.heldout": "('heldout/bitext.parquet',)",
  "data.workers": 1,
}


@dataclasses.dataclass
class Running:
  """A training command that is under way, and what it has printed."""

  workdir: pathlib.Path
  process: subprocess.Popen
  said: list[str] = dataclasses.field(default_factory=list)
  first: int = 0  # the last step that stands in metrics.jsonl from before

  def phase_is(self, name: str) -> bool:
    """Returns whether the command is in a phase now, as far as its files and output tell."""
    return {
      "start": lambda: True,
      "compile": lambda: "steps, " in self._text() and not self._began(),
      "restore": lambda: "steps, " in self._text() and not self._began(),
      "step": self._began,
      "save": lambda: any((self.workdir / "checkpoints").glob("*tmp*")),
      "evaluate": lambda: self._text().count("scoring every slice") > 0,
      "export": lambda: any((self.workdir / "export").glob("*")),
    }[name]()

  def _text(self) -> str:
    return "".join(self.said)

  def _began(self) -> bool:
    return any(line["step"] > self.first for line in lines(self.workdir))


def begin(data: pathlib.Path, workdir: pathlib.Path) -> Running:
  """Starts the command."""
  flags = FLAGS | {"data.manifest": data / "manifest.json"}
  process = subprocess.Popen(
    command(data, workdir, **flags),
    cwd=ROOT,
    env=ENVIRONMENT,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )
  found = Running(workdir, process)
  found.first = max((line["step"] for line in lines(workdir)), default=0)
  threading.Thread(target=lambda: found.said.extend(process.stdout or ()), daemon=True).start()
  return found


def kill(running: Running, phase: str, how: str, delay_s: float) -> bool:
  """Kills a command `delay_s` after it came to a phase; returns whether it got so far."""
  while not running.phase_is(phase):
    if running.process.poll() is not None:
      return False
    time.sleep(0.005)
  time.sleep(delay_s)
  if running.process.poll() is not None:
    return False
  target = _worker(running.process.pid) if how == "worker" else running.process.pid
  if target:
    _send(target, signal.SIGTERM if how == "SIGTERM" else signal.SIGKILL)
  if how != "worker":
    running.process.wait(300)
  return True


def _send(pid: int, number: int) -> None:
  with contextlib.suppress(ProcessLookupError):
    os.kill(pid, number)


def _worker(pid: int) -> int | None:
  """Returns a process that reads ahead for the command."""
  children = pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
  spawned = [
    int(child)
    for child in children
    if b"spawn_main" in pathlib.Path(f"/proc/{child}/cmdline").read_bytes()
  ]
  return spawned[0] if spawned else None


def result(workdir: pathlib.Path) -> dict[str, object]:
  """Returns what a finished run has left, by name."""
  scores = {
    path.name: {k: v for k, v in json.loads(path.read_text()).items() if k != "sha256"}
    for path in sorted((workdir / "eval").iterdir())
  }
  weights = workdir / "export/tiny/model.safetensors"
  return {
    "arrays": [(a.shape, hashlib.sha256(a.tobytes()).hexdigest()) for a in arrays(workdir, STEPS)],
    "metrics": [{k: v for k, v in line.items() if k not in TIMES} for line in lines(workdir)],
    "scores": scores,
    "export": hashlib.sha256(weights.read_bytes()).hexdigest(),
  }


PHASES = ("start", "compile", "restore", "step", "save", "evaluate", "export")
HOW = ("SIGKILL", "SIGTERM")
Case = tuple[str, str]
# In the order in which one run can meet them: a run whose worker was killed goes on to its end.
CASES: list[Case] = [
  *itertools.product(PHASES[:-1], HOW),
  ("step", "worker"),
  *itertools.product(PHASES[-1:], HOW),
]
LONGEST_S = {"start": 4.0, "compile": 2.0, "restore": 2.0, "step": 0.5, "save": 0.05}
Table = dict[Case, collections.Counter]  # {(phase, how): counts of "kills" and "lost"}


def finish(running: Running) -> str:
  """Waits for the end of a command; raises RuntimeError with its output where it fails."""
  if running.process.wait(600):
    raise RuntimeError("".join(running.said)[-3000:])
  return "".join(running.said)


def leave_alone(folder: pathlib.Path) -> None:
  """Makes FOLDER/data, the text, and FOLDER/alone, the workdir of a run that nothing kills."""
  material.write(folder / "data")
  finish(begin(folder / "data", folder / "alone"))


def run(folder: pathlib.Path, kills: int, seed: int, per_run: int = 5) -> Table:
  """Returns the table of so many kills of training, `per_run` of each run."""
  data, rng, expected = folder / "data", random.Random(seed), result(folder / "alone")
  table: Table = collections.defaultdict(collections.Counter)
  cases: list[Case] = []
  done = number = 0
  while done < kills:
    number += 1
    workdir, met = folder / f"run{number}", []
    if len(cases) < per_run:  # each case as often as the others, beside others each time
      cases += rng.sample(CASES, len(CASES))
    drawn, cases = cases[:per_run], cases[per_run:]
    for phase, how in sorted(drawn, key=CASES.index):
      running = begin(data, workdir)
      if kill(running, phase, how, rng.uniform(0.0, LONGEST_S.get(phase, 1.0))):
        met.append((phase, how))
      if running.process.poll() is None:
        finish(running)  # a worker was killed
    finish(begin(data, workdir))
    _note(table, met, expected, result(workdir))
    shutil.rmtree(workdir)
    done += len(met)
  return table


def _note(table: Table, met: Sequence[Case], expected: dict, found: dict) -> None:
  """Counts kills, as lost where the end is not that of a command that was left alone."""
  wrong = [name for name in expected | found if expected.get(name) != found.get(name)]
  for case in met:
    table[case].update(kills=1, lost=bool(wrong))
  print(f"{', '.join(map('/'.join, met))}: {wrong or 'equal'}", flush=True)


def run_commands(folder: pathlib.Path, kills: int, seed: int, per_run: int = 3) -> Table:
  """Returns the table of about so many kills of `prepare` and of `encode`."""
  rng, out = random.Random(seed), folder / "out"
  model = folder / "alone/export/tiny"
  lines = {
    "prepare": prepare(folder / "data", out / "dataset"),
    "encode int8": encode(model, folder / "data", out / "v.npy", "--precision", "int8"),
  }
  table: Table = collections.defaultdict(collections.Counter)
  for (name, line), how in itertools.product(lines.items(), HOW):
    seconds, expected = _left_alone(line, out)
    for _ in range(-(-kills // (2 * len(HOW) * per_run))):
      shutil.rmtree(out)
      out.mkdir()
      killed = [_killed(line, how, rng.uniform(0.3, 1.0) * seconds) for _ in range(per_run)]
      _, found = _left_alone(line, out)
      _note(table, [(name, how)] * sum(killed), expected, found)
    shutil.rmtree(out)
  return table


def _left_alone(line: Sequence[str], out: pathlib.Path) -> tuple[float, dict[str, str]]:
  """Runs a command to its end; returns the seconds and the digests of what is in `out`."""
  out.mkdir(exist_ok=True)
  start = time.monotonic()
  subprocess.run(line, cwd=ROOT, env=ENVIRONMENT, check=True, capture_output=True)
  return time.monotonic() - start, digests(out, "**/*")


def _started(line: Sequence[str]) -> subprocess.Popen:
  quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
  return subprocess.Popen(line, cwd=ROOT, env=ENVIRONMENT, **quiet)


def _killed(line: Sequence[str], how: str, delay_s: float) -> bool:
  """Starts a command and kills it after so many seconds; returns whether it was still there."""
  process = _started(line)
  with contextlib.suppress(subprocess.TimeoutExpired):
    process.wait(delay_s)
    return False
  _send(process.pid, signal.Signals[how])
  return process.wait(300) != 0


def run_together(folder: pathlib.Path, kills: int, seed: int, per_run: int = 3) -> Table:
  """Returns the table of about so many kills of one of two processes that train together."""
  rng, data = random.Random(seed), folder / "data"
  flags = FLAGS | {"data.manifest": data / "manifest.json"}
  table: Table = collections.defaultdict(collections.Counter)

  def together(name: str) -> tuple[pathlib.Path, list[str]]:
    workdir = folder / name
    return workdir, launcher(2, 1, *command(data, workdir, **flags)[1:])

  alone, line = together("both")
  _left_alone(line, alone)
  expected = result(alone)
  for number in range(-(-kills // per_run)):
    workdir, line = together(f"both{number}")
    # A killed run begins again at its newest checkpoint.
    steps = [STEPS // per_run * i + rng.randrange(STEPS // per_run) + 1 for i in range(per_run)]
    killed = [_one_killed(line, workdir, step, rng) for step in steps]
    _left_alone(line, workdir)
    _note(table, [("step", "one of two")] * sum(killed), expected, result(workdir))
  return table


def _one_killed(line: Sequence[str], workdir: pathlib.Path, step: int, rng: random.Random) -> bool:
  """Kills one of the processes of a launcher after a step; returns whether it was still there."""
  process = _started(line)
  wait_for_step(workdir, step)
  if len(found := children(process)) == 2:
    _send(rng.choice(found), signal.SIGKILL)
  return process.wait(300) != 0


def run_all(folder: pathlib.Path, kills: int, seed: int) -> Table:
  """Returns the table of at least so many kills of all commands."""
  leave_alone(folder)
  part = kills // 10
  others = run_commands(folder, 2 * part, seed) | run_together(folder, part, seed)
  done = sum(counts["kills"] for counts in others.values())
  return others | run(folder, kills - done, seed)


def main() -> int:
  """Prints the table; ends with 1 where anything was lost."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--kills", type=int, default=100)
  parser.add_argument("--seed", type=int, default=0)
  args = parser.parse_args()
  with tempfile.TemporaryDirectory() as name:
    table = run_all(pathlib.Path(name), args.kills, args.seed)
  print("\n| phase | how | kills | lost |\n| --- | --- | --- | --- |")
  for (phase, how), counts in sorted(table.items()):
    print(f"| {phase} | {how} | {counts['kills']} | {counts['lost']} |")
  return int(any(counts["lost"] for counts in table.values()))


if __name__ == "__main__":
  sys.exit(main())
