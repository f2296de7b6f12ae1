"""Damage to a file: single bits, cut off, emptied, deleted; and the table of what came of it."""

import pathlib
from collections import Counter
from collections.abc import Iterator

import numpy as np

DETECTED, HARMLESS, SILENT = "detected", "harmless", "silently wrong"


def flip(path: pathlib.Path, seed: int) -> str:
  """Flips one bit, by chance; returns what was done.

  With odd seeds it is one of a byte that is not 0, as much of a file of records is filled with 0.
  """
  content = bytearray(path.read_bytes())
  generator = np.random.default_rng(seed)
  places = np.flatnonzero(content) if seed % 2 else np.arange(len(content))
  place, bit = int(generator.choice(places)), int(generator.integers(8))
  content[place] ^= 1 << bit
  path.write_bytes(content)
  return f"bit {bit} of byte {place}"


def ways(flips: int) -> Iterator[tuple[str, int]]:
  """Yields kinds of damage with their seeds: so many flips, and each other kind once."""
  yield from (("flip", seed) for seed in range(flips))
  yield from ((kind, 0) for kind in ("cut", "emptied", "deleted"))


def damage(path: pathlib.Path, kind: str, seed: int) -> str:
  """Damages a file; returns what was done."""
  content = path.read_bytes()
  match kind:
    case "flip":
      return flip(path, seed)
    case "cut":
      path.write_bytes(content[: len(content) // 2])
    case "emptied":
      path.write_bytes(b"")
    case "deleted":
      path.unlink()
  return kind


def lines(table: Counter[tuple[str, str, str, str]]) -> list[str]:
  """Returns the table: a line per file kind, damage and consumer, with what came of it."""
  rows = dict.fromkeys(key[:3] for key in table)
  found = [f"{'file':22} {'damage':8} {'consumer':14} {DETECTED} {HARMLESS} {SILENT}"]
  for row in rows:
    counts = (table[*row, outcome] for outcome in (DETECTED, HARMLESS, SILENT))
    found.append("{:22} {:8} {:14} {:8} {:8} {:8}".format(*row, *counts))
  return found
