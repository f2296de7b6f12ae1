"""The rows of each step: a pure function of plan, seed and step that misses and doubles nothing."""

import collections
import subprocess
import sys

import numpy as np
import pytest

from mlembed_jax.data.order import BATCHES, PASSES, ROWS, Order, mix, permute

SEED = 3
# Three files of 4, 1 and 2 units. Every file fills whole batches of 32.
FILES = np.array([0, 0, 0, 0, 1, 2, 2])
SIZES = np.array([500, 7, 1, 132, 64, 90, 70])
BATCH = 32


def order_of(rows=SIZES, per_epoch=None, files=FILES, seed=SEED, batch=BATCH):
  return Order(files, rows, rows if per_epoch is None else np.array(per_epoch), batch, seed)


def rows_of(order, steps):
  """Returns (unit, row) of every row of the steps."""
  chosen = [order[step] for step in steps]
  return [
    tuple(pair) for c in chosen for pair in zip(c.units.tolist(), c.rows.tolist(), strict=True)
  ]


def every_row(sizes):
  return {(unit, row) for unit, size in enumerate(sizes) for row in range(size)}


# The shuffle.


@pytest.mark.parametrize("size", [*range(1, 70), 255, 256, 257, 1000, 4095, 4096, 4097, 65_537])
def test_a_shuffle_has_every_place_once(size):
  key = mix(7, size)
  found = permute(np.arange(size), size, key)
  assert found.dtype == np.int64
  np.testing.assert_array_equal(np.sort(found), np.arange(size))


def test_sizes_beyond_32_bits_are_shuffled_too():
  size = 5 * 10**12 + 1
  index = np.concatenate([np.arange(20_000), size - 1 - np.arange(20_000)])
  found = permute(index, size, mix(1))
  assert len(set(found.tolist())) == 40_000 and found.min() >= 0 and found.max() < size
  counts = np.bincount((found // (size // 16 + 1)).astype(int), minlength=16)
  assert abs(counts - 2500).max() < 250  # 5 standard deviations


def test_places_are_as_good_as_random():
  """Chi-square of (index, place) cells, and of places of neighbours, over many keys."""
  size, keys = 48, 2000
  found = np.array([permute(np.arange(size), size, mix(11, k)) for k in range(keys)])
  counts = np.array([np.bincount(found[:, i], minlength=size) for i in range(size)])
  expected = keys / size
  chi = ((counts - expected) ** 2 / expected).sum()
  freedom = (size - 1) ** 2
  assert abs(chi - freedom) < 5 * np.sqrt(2 * freedom)
  steps = (np.diff(found, axis=1) % size).reshape(-1)
  counts = np.bincount(steps, minlength=size)[1:]
  expected = steps.size / (size - 1)
  assert ((counts - expected) ** 2 / expected).sum() < size - 2 + 5 * np.sqrt(2 * (size - 2))


def test_shuffles_of_two_keys_have_nothing_to_do_with_each_other():
  first, second = (permute(np.arange(10_000), 10_000, mix(key)) for key in (1, 2))
  assert abs(np.corrcoef(first, second)[0, 1]) < 0.05
  assert np.mean(first == second) < 0.001


def test_each_index_has_its_own_size_and_key():
  index, size = np.array([3, 3, 3, 0]), np.array([10, 10, 5000, 1])
  key = mix(5, np.array([0, 1, 1, 9]))
  alone = [int(permute(index[i : i + 1], int(size[i]), key[i])[0]) for i in range(4)]
  assert permute(index, size, key).tolist() == alone


# Steps.


def test_an_epoch_has_every_row_once_where_shares_are_by_size():
  order = order_of()
  assert order.steps_per_epoch == sum(SIZES) // BATCH == 27
  np.testing.assert_array_equal(order.batches(), [20, 2, 5])
  for epoch in range(3):
    found = rows_of(order, range(epoch * 27, (epoch + 1) * 27))
    assert len(found) == len(set(found)) and set(found) == every_row(SIZES)


def test_rows_beyond_the_last_whole_batch_wait_for_another_epoch():
  rows = SIZES + np.array([13, 0, 0, 0, 5, 0, 31])
  order = order_of(rows)
  assert order.steps_per_epoch == 27
  seen = collections.Counter()
  for epoch in range(12):
    found = rows_of(order, range(epoch * 27, (epoch + 1) * 27))
    assert len(found) == len(set(found)) == 27 * BATCH
    seen.update(found)
  assert set(seen) == every_row(rows) and min(seen.values()) > 5


@pytest.mark.parametrize("rows", [[20], [70], [64], [1]])
def test_what_is_left_is_completed_from_the_beginning_of_the_epoch(rows):
  sizes, files = np.array(rows), np.zeros(1, int)
  order = Order(files, sizes, sizes, BATCH, SEED, complete=True)
  batches = -(-rows[0] // BATCH)
  assert order.steps_per_epoch == batches
  for epoch in range(2):
    steps = range(epoch * batches, (epoch + 1) * batches)
    drawn = [order[step].rows.tolist() for step in steps]
    counts = collections.Counter(row for part in drawn for row in part)
    assert set(counts) == set(range(rows[0])) and sum(counts.values()) == batches * BATCH
    assert max(counts.values()) - min(counts.values()) <= 1
    if batches == 1:
      assert drawn[0] == (drawn[0][: rows[0]] * BATCH)[:BATCH]


def test_whole_batches_are_the_same_whether_others_are_completed_or_not():
  sizes, files = np.array([64, 96]), np.array([0, 1])
  plain, completed = (Order(files, sizes, sizes, BATCH, SEED, complete=c) for c in (False, True))
  assert rows_of(plain, range(10)) == rows_of(completed, range(10))


def test_all_rows_of_a_step_are_of_its_file_and_its_languages_are_mixed():
  order = order_of()
  chosen = [order[step] for step in range(27)]
  assert all(c.units.shape == c.rows.shape == (BATCH,) for c in chosen)
  assert all(np.all(FILES[c.units] == c.file) for c in chosen)
  of_first = np.array([np.mean(c.units == 0) for c in chosen if c.file == 0])
  np.testing.assert_allclose(of_first.mean(), 500 / 640)
  assert 0.05 < of_first.std() < 0.12  # 0.07 where rows are drawn one by one


def test_every_epoch_has_other_batches_in_another_order():
  order = order_of()
  first, second = ([order[s] for s in range(e * 27, (e + 1) * 27)] for e in (0, 1))
  assert [c.file for c in first] != [c.file for c in second]
  sets = [
    {frozenset(zip(c.units.tolist(), c.rows.tolist(), strict=True)) for c in epoch}
    for epoch in (first, second)
  ]
  assert not sets[0] & sets[1]


def test_a_unit_that_is_repeated_comes_evenly():
  """Each row floor or ceil of the mean times, after every epoch; others are left out evenly."""
  per_epoch = [200, 20, 10, 410, 64, 50, 110]
  order = order_of(per_epoch=per_epoch)
  seen = collections.Counter()
  for epoch in range(5):
    seen.update(rows_of(order, range(epoch * 27, (epoch + 1) * 27)))
    for unit, (size, count) in enumerate(zip(SIZES.tolist(), per_epoch, strict=True)):
      mean = (epoch + 1) * count / size
      times = [seen[unit, row] for row in range(size)]
      assert set(times) <= {int(np.floor(mean)), int(np.ceil(mean))}
      assert sum(times) == (epoch + 1) * count


def test_a_unit_without_rows_in_an_epoch_never_comes():
  per_epoch = [507, 0, 1, 132, 64, 160, 0]
  found = rows_of(order_of(per_epoch=per_epoch), range(54))
  assert {unit for unit, _ in found} == {0, 2, 3, 4, 5}


def feistel(index, size, key):
  """Permutes one number, with Python's integers alone."""
  bits = max(1, -(-(max(size, 2) - 1).bit_length() // 2))
  place = index
  while True:
    left, right = place >> bits, place & ((1 << bits) - 1)
    for number in range(6):
      left, right = right, left ^ (splitmix(key, number, right) & ((1 << bits) - 1))
    place = left << bits | right
    if place < size:
      return place


def splitmix(*values):
  state, every = 0, (1 << 64) - 1
  for value in values:
    state = ((state ^ value) + 0x9E3779B97F4A7C15) & every
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & every
    state = (state ^ (state >> 27)) * 0x94D049BB133111EB & every
    state ^= state >> 31
  return state


def naive(per_epoch, step):
  """Returns (unit, row) of a step as the documentation says it, list by list."""
  lists = [  # of each file: every row of an epoch as (unit, number within the unit)
    [(u, i) for u in range(len(FILES)) if FILES[u] == file for i in range(per_epoch[u])]
    for file in range(3)
  ]
  batches = [(file, b) for file in range(3) for b in range(len(lists[file]) // BATCH)]
  epoch, place = divmod(step, len(batches))
  number = feistel(place, len(batches), splitmix(SEED, BATCHES, epoch))
  file, b = batches[number]
  key = splitmix(SEED, ROWS, epoch, file)
  found = []
  for i in range(b * BATCH, (b + 1) * BATCH):
    unit, within = lists[file][feistel(i, len(lists[file]), key)]
    passes, at = divmod(epoch * per_epoch[unit] + within, int(SIZES[unit]))
    found.append((unit, feistel(at, int(SIZES[unit]), splitmix(SEED, PASSES, unit, passes))))
  return found


@pytest.mark.parametrize("per_epoch", [SIZES.tolist(), [200, 20, 10, 410, 64, 50, 110]])
def test_any_step_is_that_of_a_plain_implementation(per_epoch):
  order = order_of(per_epoch=per_epoch)
  for step in (0, 1, 26, 27, 500, 5_000_000):
    assert rows_of(order, [step]) == naive(per_epoch, step)


def test_a_step_depends_on_nothing_before_it():
  order = order_of()
  forward = {step: rows_of(order, [step]) for step in range(60)}
  assert {step: rows_of(order_of(), [step]) for step in (41, 7, 59)} == {
    step: forward[step] for step in (41, 7, 59)
  }
  assert rows_of(order_of(seed=SEED + 1), range(5)) != rows_of(order, range(5))


def test_another_process_reads_the_same_steps():
  code = (
    "from tests.data.test_order import order_of, rows_of;print(rows_of(order_of(), [3, 5_000_000]))"
  )
  found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
  assert eval(found.stdout) == rows_of(order_of(), [3, 5_000_000])
