"""What a run will read, before it reads it, and what differs from what it read before."""

import dataclasses
from typing import Any

import numpy as np

from mlembed_jax.data import order
from mlembed_jax.data.manifest import OPTIONAL, REQUIRED, File
from mlembed_jax.data.mixture import Unit
from mlembed_jax.data.order import Order

KNOWN = {*REQUIRED, *OPTIONAL}
SHOWN = 12  # a printed difference names so many files, and as many units


@dataclasses.dataclass(frozen=True)
class Plan:
  """The units of a run and how often each comes."""

  files: list[File]
  units: list[Unit]
  per_epoch: np.ndarray  # rows of each unit
  batch_size: int
  seed: int
  dataset: str  # fingerprint of the prepared records
  complete: bool = False  # whether what is left of a file is completed to a batch

  def order(self) -> Order:
    """Returns the rows of every step."""
    names = [file.name for file in self.files]
    files = np.array([names.index(unit.file) for unit in self.units])
    rows = np.array([unit.rows for unit in self.units])
    return Order(files, rows, self.per_epoch, self.batch_size, self.seed, self.complete)

  def small_files(self) -> list[str]:
    """Returns the files that have not one batch per epoch."""
    batches = self.order().batches()
    return [file.name for file, n in zip(self.files, batches, strict=True) if not n]

  def read_per_epoch(self) -> np.ndarray:
    """Returns how many rows of each unit an epoch reads, on average where batches are completed."""
    if not self.complete:
      return self.per_epoch
    names = np.array([unit.file for unit in self.units])
    read = self.per_epoch.astype(np.float64)
    for file, batches in zip(self.files, self.order().batches(), strict=True):
      mine = names == file.name
      read[mine] *= batches * self.batch_size / self.per_epoch[mine].sum()
    return read

  def as_json(self) -> dict[str, Any]:
    """Returns all that decides which rows a step has."""
    completed = {"complete_batches": True} if self.complete else {}  # earlier plans lack it
    return completed | {
      "dataset": self.dataset,
      "order": order.VERSION,
      "files": {file.name: _what_decides(file) for file in self.files},
      "units": {
        f"{unit.file} {unit.language}": [unit.rows, int(count)]
        for unit, count in zip(self.units, self.per_epoch, strict=True)
      },
    }


def _what_decides(file: File) -> dict[str, Any]:
  """Returns what a file's rows are; where it lies decides nothing."""
  return {name: value for name, value in file.entry.items() if name in KNOWN - {"path"}}


def difference(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
  """Returns what changed between two plans, a line each; of many units, the first."""
  lines = [
    f"{name}: {before.get(name)} in the workdir, {now.get(name)} now"
    for name in {**before, **now}
    if name not in ("files", "units") and before.get(name) != now.get(name)
  ]
  for name in ("files", "units"):
    old, new = before.get(name, {}), now.get(name, {})
    changed = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    shown = [f"{key}: {_changes(old.get(key), new.get(key))}" for key in changed[:SHOWN]]
    more = [f"... and {len(changed) - SHOWN} more {name}"] if len(changed) > SHOWN else []
    lines += shown + more
  return lines


def _changes(old: Any, new: Any) -> str:
  """Returns the fields of a file that differ, or the counts of a unit."""
  if isinstance(old, dict) and isinstance(new, dict):
    fields = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    return ", ".join(f"{key}: {_changes(old.get(key), new.get(key))}" for key in fields)
  return f"{_shown(old)} in the workdir, {_shown(new)} now"


def _shown(value: Any) -> str:
  match value:
    case None:
      return "absent"
    case [rows, count]:
      return f"{rows} rows, {count} per epoch"
    case dict():
      return "there"
    case _:
      return repr(value)
