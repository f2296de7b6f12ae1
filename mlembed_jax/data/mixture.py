"""How often each file and language comes in an epoch. Arithmetic on row counts, nothing is read.

File d of n_d rows counts as w_d = min(n_d, max_rows) ** size_exponent, divided among its languages
by their rows. A language's share is (the sum of its w) ** (1 / temperature), at most `max_repeats`
passes over its rows; what that cuts off goes to the other languages (UniMax, arXiv 2304.09151).
Within a language, files share in proportion to w, under the same limit. With the exponent and the
temperature 1 every row of a file below `max_rows` comes once.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from mlembed_jax.data.transforms import RowShard


@dataclasses.dataclass(frozen=True)
class Unit:
  """The rows of one language in one file."""

  file: str
  language: str
  rows: int
  tokens: float  # of a row on average: query, positives and every stored negative
  negative_tokens: float  # those of the negatives among them


def units(shards: Sequence[RowShard]) -> list[Unit]:
  """Returns the units of a split, in the order of files, and of languages within."""
  sums: dict[tuple[str, str], np.ndarray] = {}
  for shard in shards:
    for run in shard.runs:
      negatives = run.negative_tokens
      tokens = run.query_tokens + run.positive_tokens + negatives
      counts = sums.setdefault((shard.file, run.language), np.zeros(3, np.int64))
      counts += run.rows, tokens, negatives
  files = list(dict.fromkeys(shard.file for shard in shards))
  ordered = sorted(sums, key=lambda key: (files.index(key[0]), key[1]))
  made = []
  for file, language in ordered:
    rows, tokens, negatives = sums[file, language].tolist()
    made.append(Unit(file, language, rows, tokens / rows, negatives / rows))
  return made


def per_epoch(
  units: Sequence[Unit],
  *,
  max_rows: int,
  size_exponent: float,
  language_temperature: float,
  max_repeats: float,
) -> np.ndarray:
  """Returns how many rows of each unit an epoch has, [U] int64.

  An epoch has as many rows as the files have together, each counted up to `max_rows`.

  Args:
    units: U units, the rows of one language in one file each.
    max_rows: rows of a file that count; 0: all.
    size_exponent: below 1, small files come more often.
    language_temperature: above 1, languages with few rows come more often.
    max_repeats: passes over the rows of a unit or language in one epoch, at most.
  """
  rows = np.array([unit.rows for unit in units], np.float64)
  file, language = (
    _codes([getattr(unit, name) for unit in units]) for name in ("file", "language")
  )
  in_file = np.bincount(file, rows)
  capped = np.minimum(in_file, max_rows) if max_rows else in_file
  weight = (capped**size_exponent)[file] * rows / in_file[file]
  by_language = np.bincount(language, weight)
  share = by_language ** (1 / language_temperature)
  limit = max_repeats * np.bincount(language, rows)
  of_language = _fill(capped.sum(), share / share.sum(), limit)
  given = np.zeros_like(weight)
  for number, total in enumerate(of_language):
    mine = language == number
    given[mine] = _fill(total, weight[mine] / weight[mine].sum(), max_repeats * rows[mine])
  return _rounded(given)


def _codes(names: list[str]) -> np.ndarray:
  return np.unique(np.array(names, object), return_inverse=True)[1]


def _fill(total: float, share: np.ndarray, limit: np.ndarray) -> np.ndarray:
  """Returns `total` divided by share, none above its limit; what is cut goes to the others."""
  given, open_ = np.zeros_like(share), np.ones(share.size, bool)
  while open_.any() and (rest := total - given.sum()) > 0:
    offered = np.where(open_, rest * share / share[open_].sum(), given)
    over = open_ & (offered >= limit)
    given = np.where(over, limit, given)
    if not over.any():
      return offered
    open_ &= ~over
  return given


def _rounded(values: np.ndarray) -> np.ndarray:
  """Returns whole numbers of the same sum, the largest remainders rounded up."""
  values = np.round(values, 6)  # 99.9999999 is 100 that lost a bit
  floors = np.floor(values)
  up = round(float(values.sum() - floors.sum()))
  floors[np.argsort(floors - values, kind="stable")[:up]] += 1
  return floors.astype(np.int64)
