"""What a run will read, before it reads it: by file and language, as a table and a picture."""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mlembed_jax.data import order
from mlembed_jax.data.manifest import OPTIONAL, REQUIRED, File
from mlembed_jax.data.mixture import Unit
from mlembed_jax.data.order import Order

KNOWN = {*REQUIRED, *OPTIONAL}
SHOWN = 12  # languages at either end of the printed table


@dataclasses.dataclass(frozen=True)
class Plan:
  """The units of a run and how often each comes."""

  files: list[File]
  units: list[Unit]
  per_epoch: np.ndarray  # rows of each unit
  batch_size: int
  seed: int
  dataset: str  # fingerprint of the prepared records

  def order(self) -> Order:
    """Returns the rows of every step."""
    names = [file.name for file in self.files]
    files = np.array([names.index(unit.file) for unit in self.units])
    rows = np.array([unit.rows for unit in self.units])
    return Order(files, rows, self.per_epoch, self.batch_size, self.seed)

  def small_files(self) -> list[str]:
    """Returns the files that have less than one batch per epoch."""
    batches = self.order().batches()
    return [file.name for file, n in zip(self.files, batches, strict=True) if not n]

  def as_json(self) -> dict[str, Any]:
    """Returns all that decides which rows a step has."""
    return {
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


@dataclasses.dataclass(frozen=True)
class Line:
  """Sums over the units of one file or language."""

  name: str
  rows: int
  per_epoch: int
  share: float  # of the rows of an epoch
  repeats: float  # passes over its rows in the run
  tokens: float  # in the run


def lines(
  plan: Plan,
  by: Callable[[Unit], str],
  epochs: float,
  used_negatives: dict[str, float],
) -> list[Line]:
  """Returns a line per file or language, most rows per epoch first.

  `used_negatives`: share of the stored negatives that a step uses, by file.
  """
  sums: dict[str, np.ndarray] = {}
  for unit, count in zip(plan.units, plan.per_epoch, strict=True):
    per_row = unit.tokens - unit.negative_tokens * (1 - used_negatives[unit.file])
    total = sums.setdefault(by(unit), np.zeros(3))
    total += unit.rows, count, count * epochs * per_row
  whole = plan.per_epoch.sum()
  made = [
    Line(name, int(rows), int(count), count / whole, epochs * count / rows, tokens)
    for name, (rows, count, tokens) in sums.items()
  ]
  return sorted(made, key=lambda line: (-line.per_epoch, line.name))


def table(title: str, lines: Sequence[Line]) -> str:
  """Returns the lines as text; of many, the first and the last."""
  shown = [
    [
      line.name,
      f"{line.rows:,}",
      f"{line.per_epoch:,}",
      f"{line.share:.2%}",
      f"{line.repeats:.2f}",
      f"{line.tokens / 1e6:,.1f}",
    ]
    for line in lines
  ]
  if len(shown) > 2 * SHOWN + 1:
    hidden = f"... {len(shown) - 2 * SHOWN} more"
    shown = [*shown[:SHOWN], [hidden, *[""] * 5], *shown[-SHOWN:]]
  header = [title, "rows", "per epoch", "share", "passes", "M tokens"]
  widths = [max(len(row[i]) for row in [header, *shown]) for i in range(len(header))]
  return "\n".join(
    "  ".join(
      cell.rjust(width) if i else cell.ljust(width)
      for i, (cell, width) in enumerate(zip(row, widths, strict=True))
    ).rstrip()
    for row in [header, *shown]
  )


def picture(path: pathlib.Path, files: Sequence[Line], languages: Sequence[Line]) -> None:
  """Writes shares by size and as planned, of each file and language, as an image."""
  from matplotlib.figure import Figure  # a second to import; without the global state of pyplot

  files = files[:40]  # as many as can be read
  figure = Figure(figsize=(12, 3 + 0.22 * len(files)), layout="constrained")
  left, right = figure.subplots(1, 2)
  places = np.arange(len(files))
  rows = sum(line.rows for line in files)
  left.barh(places - 0.2, [line.rows / rows for line in files], 0.4, label="rows")
  left.barh(places + 0.2, [line.share for line in files], 0.4, label="planned")
  left.set_yticks(places, [line.name for line in files], fontsize=7)
  left.invert_yaxis()
  left.set_xlabel("share")
  left.legend()
  by_size = sorted(languages, key=lambda line: -line.rows)
  total = sum(line.rows for line in languages)
  right.plot([line.rows / total for line in by_size], label="rows")
  right.plot([line.share for line in by_size], label="planned")
  right.set_yscale("log")
  right.set_xlabel(f"{len(languages)} languages, most rows first")
  right.set_ylabel("share")
  right.legend()
  figure.savefig(path, dpi=100)
