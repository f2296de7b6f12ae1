"""How often files and languages come: worked numbers, caps, and what steps then really draw."""

import numpy as np
import pytest

from mlembed_jax.data import mixture
from mlembed_jax.data.mixture import Unit
from mlembed_jax.data.order import Order
from mlembed_jax.data.transforms import LanguageRun, RowShard, Written

SETTINGS = {"max_rows": 0, "size_exponent": 1.0, "language_temperature": 1.0, "max_repeats": 4.0}


def units_of(*rows):
  """`rows`: (file, language, number)."""
  return [Unit(file, language, n, 10.0, 5.0) for file, language, n in rows]


def per_epoch(units, **changes):
  return mixture.per_epoch(units, **(SETTINGS | changes))


def shares(units, **changes):
  counts = per_epoch(units, **changes)
  return counts / counts.sum()


WORKED = units_of(("a", "en", 900 * 10**4), ("b", "sw", 90 * 10**4), ("c", "sw", 10 * 10**4))


@pytest.mark.parametrize(
  ("exponent", "temperature", "expected"),
  [
    (1.0, 1.0, (0.9, 0.09, 0.01)),
    (0.5, 1.0, (0.703414, 0.222439, 0.074146)),
    (1.0, 2.0, (0.75, 0.225, 0.025)),
    (0.5, 2.0, (0.606305, 0.295272, 0.098424)),
  ],
)
def test_worked_numbers(exponent, temperature, expected):
  found = shares(
    WORKED, size_exponent=exponent, language_temperature=temperature, max_repeats=1000.0
  )
  np.testing.assert_allclose(found, expected, atol=1e-6)
  counts = per_epoch(WORKED, size_exponent=exponent, language_temperature=temperature)
  assert counts.sum() == 10**7 and counts.dtype == np.int64


def test_by_size_every_row_comes_once():
  generator = np.random.default_rng(0)
  units = units_of(
    *(("abc"[i % 3], f"l{i}", int(n)) for i, n in enumerate(generator.integers(1, 10**6, 60)))
  )
  np.testing.assert_array_equal(per_epoch(units), [unit.rows for unit in units])


def test_a_large_file_counts_up_to_max_rows_and_keeps_its_languages():
  units = units_of(("a", "de", 600), ("a", "en", 400), ("b", "de", 50))
  np.testing.assert_array_equal(per_epoch(units, max_rows=100), [60, 40, 50])
  np.testing.assert_array_equal(per_epoch(units, max_rows=5000), [600, 400, 50])
  # 100 and 50 rows count as 10 and 50 ** 0.5; the epoch still has 150.
  found = per_epoch(units, max_rows=100, size_exponent=0.5)
  weights = np.array([6, 4, 50**0.5])
  np.testing.assert_allclose(found, 150 * weights / weights.sum(), atol=1)
  assert found.sum() == 150


def test_a_language_comes_at_most_max_repeats_times_and_the_rest_goes_to_the_others():
  units = units_of(("a", "en", 10_000), ("b", "de", 1000), ("c", "sw", 10), ("d", "sw", 30))
  free = per_epoch(units, language_temperature=100.0, max_repeats=1000.0)
  assert free[2] + free[3] > 3000  # nearly a third each
  found = per_epoch(units, language_temperature=100.0, max_repeats=5.0)
  assert found[2:].tolist() == [50, 150]
  # The other two would have nearly half of the rest each, more than 5 * 1000.
  assert found[1] == 5000 and found[0] == 11_040 - 200 - 5000
  tight = per_epoch(units, language_temperature=100.0, max_repeats=1.0)
  assert tight.tolist() == [10_000, 1000, 10, 30]


def test_what_a_cap_cuts_off_is_shared_by_the_others_as_before():
  units = units_of(("a", "en", 8000), ("b", "de", 4000), ("c", "sw", 4))
  found = per_epoch(units, language_temperature=2.0, max_repeats=4.0)
  root = np.sqrt([8000, 4000])
  np.testing.assert_allclose(found[:2], (12_004 - 16) * root / root.sum(), atol=1)
  assert found[2] == 16


@pytest.mark.parametrize("seed", range(20))
def test_whole_numbers_add_up_and_stay_within_the_caps(seed):
  generator = np.random.default_rng(seed)
  units = units_of(
    *(
      (f"f{generator.integers(9)}", f"l{generator.integers(9)}", int(generator.integers(1, 5000)))
      for _ in range(40)
    )
  )
  settings = {
    "max_rows": int(generator.integers(1, 9000)),
    "size_exponent": float(generator.uniform(0.1, 1)),
    "language_temperature": float(generator.uniform(1, 9)),
    "max_repeats": float(generator.uniform(1, 4)),
  }
  found = per_epoch(units, **settings)
  in_file, languages = {}, {}
  for unit in units:
    in_file[unit.file] = in_file.get(unit.file, 0) + unit.rows
  assert found.sum() == sum(min(n, settings["max_rows"]) for n in in_file.values())
  for unit, count in zip(units, found, strict=True):
    rows, taken = languages.get(unit.language, (0, 0))
    languages[unit.language] = rows + unit.rows, taken + int(count)
  for rows, taken in languages.values():
    assert taken <= rows * settings["max_repeats"] + 40  # rounding of each unit


def test_rounding_is_by_the_largest_remainder():
  """Thirds of 100 rows: 34, 33 and 33; the first of equal ones is rounded up."""
  units = units_of(("a", "x", 10), ("b", "y", 10), ("c", "z", 80))
  found = per_epoch(units, language_temperature=1e9, max_repeats=10.0)
  assert found.tolist() == [34, 33, 33]


def test_units_sum_the_runs_of_all_shards():
  def shard(file, *runs):
    return RowShard(file, Written(0, 0, ""), 0, [LanguageRun(*run) for run in runs])

  shards = [
    shard("b", ("de", 3, 30, 60, 90), ("en", 1, 5, 6, 7)),
    shard("a", ("en", 2, 20, 40, 60)),
    shard("b", ("de", 1, 2, 4, 10)),
  ]
  assert mixture.units(shards) == [
    Unit("b", "de", 4, (32 + 64 + 100) / 4, 25.0),
    Unit("b", "en", 1, 18.0, 7.0),
    Unit("a", "en", 2, 60.0, 30.0),
  ]


def test_drawn_batches_have_the_planned_shares_of_languages():
  """Over 2,000 steps of an epoch of 3,000; within 5 deviations of independent draws."""
  languages = ("de", "en", "hi", "ru", "sw")
  rows = [
    (f"f{k}", lang, 2000 * (k + 1) ** 2 // (j + 1))
    for k in range(6)
    for j, lang in enumerate(languages)
  ]
  units = units_of(*rows)
  counts = per_epoch(units, size_exponent=0.7, language_temperature=3.0, max_rows=60_000)
  files = np.array([int(unit.file[1:]) for unit in units])
  order = Order(files, np.array([u.rows for u in units]), counts, batch_size=64, seed=0)
  assert order.steps_per_epoch > 3000
  drawn = np.bincount(np.concatenate([order[s].units for s in range(2000)]), minlength=len(units))
  for lang in languages:
    mine = [i for i, unit in enumerate(units) if unit.language == lang]
    planned, found = counts[mine].sum() / counts.sum(), drawn[mine].sum() / drawn.sum()
    deviation = np.sqrt(planned * (1 - planned) / 2000)  # of whole batches: they have one file
    assert abs(found - planned) < 5 * deviation
    by_size = sum(units[i].rows for i in mine) / sum(u.rows for u in units)
    assert lang not in ("de", "sw") or abs(planned - by_size) > 5 * deviation


def test_a_small_file_of_a_large_language_has_the_same_limit():
  units = units_of(("a", "en", 1_000_000), ("b", "en", 600))
  assert per_epoch(units, size_exponent=0.3, max_repeats=4.0).tolist() == [998_200, 2400]
