"""What a step draws beside its rows: hard negatives and instructions of documents."""

import numpy as np

from mlembed_jax.data import batching


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


def test_instructions_are_drawn_by_step_in_the_share_that_is_asked():
  draws = [batching.instructed_documents((50, 8), 0.3, 0, step) for step in range(100)]
  # 40,000 draws, standard deviation 0.0023.
  assert abs(np.mean(draws) - 0.3) < 0.012
  again = [batching.instructed_documents((50, 8), 0.3, 0, step) for step in range(100)]
  np.testing.assert_array_equal(draws, again)
  assert not np.array_equal(draws[0], draws[1])
  assert not np.array_equal(draws[0], batching.instructed_documents((50, 8), 0.3, 1, 0))
  more = batching.instructed_documents((50, 8), 0.6, 0, 0)
  assert np.all(more[draws[0]])  # a larger share has those of a smaller one
  assert not batching.instructed_documents((50, 8), 0.0, 0, 0).any()
  assert batching.instructed_documents((50, 8), 1.0, 0, 0).all()
