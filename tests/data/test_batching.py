"""The data order: a pure function of the step, homogeneous, in proportion to size."""

import collections

import numpy as np
import pytest

from mlembed_jax.data import batching
from mlembed_jax.data.tokenizer import DataError

SIZES = {"a": 1000, "b": 330, "c": 64}
BATCH = 32
EPOCH = batching.steps_per_epoch(SIZES, BATCH)


def steps(numbers, seed=0, sizes=SIZES):
  order = batching.order(sizes, BATCH, seed)
  return [order[n] for n in numbers]


def equal(a, b):
  return all(x[0] == y[0] and np.array_equal(x[1], y[1]) for x, y in zip(a, b, strict=True))


def test_a_step_is_a_pure_function_of_seed_and_number():
  numbers = [0, 41, 7, 5_000_000, 7]
  assert equal(steps(numbers), steps(numbers))
  forward = dict(zip(range(60), steps(range(60)), strict=True))
  assert equal(steps([41, 7]), [forward[41], forward[7]])
  assert not equal(steps(range(5)), steps(range(5), seed=1))


def test_an_epoch_visits_each_batch_once_and_no_row_twice():
  rows = collections.defaultdict(list)
  for name, chosen in steps(range(EPOCH)):
    assert chosen.shape == (BATCH,)
    rows[name].extend(chosen)
  for name, size in SIZES.items():
    assert len(rows[name]) == len(set(rows[name])) == size // BATCH * BATCH
    assert set(rows[name]) <= set(range(size))


def test_files_appear_in_proportion_to_their_size():
  counts = collections.Counter(name for name, _ in steps(range(EPOCH)))
  assert counts == {"a": 31, "b": 10, "c": 2}


def test_every_epoch_has_new_batches_in_a_new_order():
  first, second = steps(range(EPOCH)), steps(range(EPOCH, 2 * EPOCH))
  assert [name for name, _ in first] != [name for name, _ in second]
  sets = [{frozenset(rows) for name, rows in epoch if name == "a"} for epoch in (first, second)]
  assert not sets[0] & sets[1]


def test_a_file_smaller_than_a_batch_is_refused():
  with pytest.raises(DataError, match=r"c: 20 usable rows are fewer than data\.global_batch = 32"):
    batching.order({"a": 100, "c": 20}, BATCH, 0)


def test_negative_columns_are_drawn_by_step_without_replacement():
  draws = [batching.negative_columns(24, 7, 0, step) for step in range(2000)]
  assert all(len(set(draw)) == 7 and max(draw) < 24 for draw in draws)
  assert all(np.array_equal(a, batching.negative_columns(24, 7, 0, s)) for s, a in enumerate(draws))
  counts = np.bincount(np.concatenate(draws), minlength=24)
  # 2000 * 7/24 = 583 each, standard deviation 20.
  assert abs(counts - 583).max() < 100
  assert not np.array_equal(draws[0], batching.negative_columns(24, 7, 1, 0))


def test_fewer_stored_than_used_takes_all():
  np.testing.assert_array_equal(batching.negative_columns(3, 7, 0, 0), [0, 1, 2])
  assert batching.negative_columns(0, 7, 0, 0).size == 0


def test_bucket_and_pad():
  assert [batching.bucket(n, (32, 64)) for n in (1, 32, 33, 64)] == [32, 32, 64, 64]
  tokens, lengths = batching.pad([[5, 6], [7]], 3)
  np.testing.assert_array_equal(tokens, [[5, 6, 0], [7, 0, 0]])
  np.testing.assert_array_equal(lengths, [2, 1])
