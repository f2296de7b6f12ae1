"""Each command on a disk that is too small, then the same command again with room.

  python -m tests.faults.full_disk

Mounts a tmpfs, for which it needs to be root. Ends with 1 where a command does not end with one
sentence that names a path, leaves something half written, or gives other bytes afterwards.
"""

import contextlib
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence

from tests import material
from tests.faults.commands import digests, encode, module, prepare
from tests.runs import ENVIRONMENT, ROOT, SMALL, command

FLAGS = SMALL | {"train.steps": 8, "train.checkpoint_every": 4, "train.keep_checkpoints": 2}
FLAGS |= {"export.at_end": True}


@contextlib.contextmanager
def small_disk(folder: pathlib.Path, kilobytes: int) -> Iterator[None]:
  """Mounts a disk of so many kilobytes at a folder."""
  folder.mkdir(parents=True)
  subprocess.run(
    ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)], check=True
  )
  try:
    yield
  finally:
    subprocess.run(["umount", "-l", str(folder)], check=True)


def run(args: Sequence[str]) -> subprocess.CompletedProcess:
  """Runs a command of the package."""
  return subprocess.run(
    args, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=900
  )


def commands(data: pathlib.Path, whole: pathlib.Path, disk: pathlib.Path) -> dict:
  """Returns, by command: its line, the kilobytes that are too few, and what it writes."""
  model = whole / "export"
  return {
    "train": (command(data, disk / "run", **FLAGS), (64, 700), "run/export/tiny/*.safetensors"),
    "export": (
      module("export", "--checkpoint", whole / "run", "--out", disk / "out"),
      (64,),
      "out/*.safetensors",
    ),
    "prepare": (prepare(data, disk / "dataset"), (64,), "dataset/*.array_record*"),
    "encode": (encode(model, data, disk / "v.npy"), (24,), "*.npy"),
    "evaluate": (
      module("evaluate", "--model", model, "--tasks", data / "heldout", "--out", disk / "scores"),
      (4,),
      "scores/scores.json",
    ),
  }


def check(name: str, line: list[str], kilobytes: int, written: str, folder: pathlib.Path) -> str:
  """Returns what is wrong with a command on a disk of this size, nothing where all is well."""
  disk, wrong = folder / "disk", []
  with small_disk(disk, kilobytes):
    full = run(line)
    said = full.stderr.strip().splitlines()[-1:] or [""]
    told = said[0].startswith("error: ") and str(disk) in said[0]
    if full.returncode != 1 or "Traceback" in full.stderr or not told:
      wrong.append(f"status {full.returncode}: {full.stderr[-600:]}")
    print(f"{name}, {kilobytes} kB: {said[0][:200]}", flush=True)
    subprocess.run(["mount", "-o", "remount,size=500m", str(disk)], check=True)
    again = run(line)
    if again.returncode:
      wrong.append(f"the same command with room: {again.stderr[-600:]}")
    found = digests(disk, written)
  shutil.rmtree(disk)
  disk.mkdir()
  alone = run(line)
  if alone.returncode or found != digests(disk, written):
    wrong.append(f"other bytes of {written}: {found}")
  shutil.rmtree(disk)
  return "; ".join(wrong)


def main() -> int:
  """Prints a line per command."""
  if os.geteuid():
    sys.exit("error: mounting a disk needs root")
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    data, whole = folder / "data", folder / "whole"
    material.write(data)
    assert not run(command(data, whole / "run", **FLAGS)).returncode
    exported = module("export", "--checkpoint", whole / "run", "--out", whole / "export")
    assert not run(exported).returncode
    faults = {}
    for case, (line, sizes, written) in commands(data, whole, folder / "disk").items():
      for size in sizes:
        if wrong := check(case, line, size, written, folder):
          faults[f"{case}, {size} kB"] = wrong
  for case, wrong in faults.items():
    print(f"WRONG {case}: {wrong}")
  return int(bool(faults))


if __name__ == "__main__":
  sys.exit(main())
