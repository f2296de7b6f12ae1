"""What a run will read, by file and language: a table and a picture of its plan."""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence

import numpy as np

from mlembed_jax.data.mixture import Unit
from mlembed_jax.data.plan import Plan
from mlembed_jax.files import new_file

SHOWN = 12  # the printed table has so many files or languages at either end


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
  read = plan.read_per_epoch()
  for unit, count in zip(plan.units, read, strict=True):
    per_row = unit.tokens - unit.negative_tokens * (1 - used_negatives[unit.file])
    total = sums.setdefault(by(unit), np.zeros(3))
    total += unit.rows, count, count * epochs * per_row
  whole = read.sum()
  made = [
    Line(name, int(rows), round(count), count / whole, epochs * count / rows, tokens)
    for name, (rows, count, tokens) in sums.items()
  ]
  return sorted(made, key=lambda line: (-line.per_epoch, line.name))


def plan_table(title: str, lines: Sequence[Line]) -> str:
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
  with new_file(path) as new:
    figure.savefig(new, dpi=100, format="png")
