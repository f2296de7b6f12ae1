"""Batched encoding gives each text its own vector, in order, from few programs."""

import jax
import numpy as np
import pytest

from mlembed_jax.models import batched
from mlembed_jax.models.batched import Batching, encode_batched
from mlembed_jax.parallel.sharding import batch_sharding, make_mesh
from tests.material import padded


@pytest.fixture(scope="module")
def ids():
  generator = np.random.default_rng(0)
  sizes = generator.permutation(range(1, 64, 3))
  return [generator.integers(0, 600, size).tolist() for size in sizes]


def run(tiny, params, ids, **options):
  batching = Batching(lengths=(32, 64), rows=lambda _: 8, **options)
  return encode_batched(tiny.model, params, ids, (1, 3), batching)


def test_each_text_alone_gives_the_same_vectors(tiny, params, ids):
  apply = jax.jit(padded(tiny.model))
  result = run(tiny, params, ids)
  assert result.shape == (2, 21, tiny.model.width)
  for i, row in enumerate(ids):
    tokens = np.array([row + [0] * (64 - len(row))])
    alone = np.asarray(apply({"params": params}, tokens, np.array([len(row)])))
    np.testing.assert_allclose(result[:, i], alone[[0, 2], 0], atol=5e-6)


def test_a_mesh_changes_nothing(tiny, params, ids):
  sharded = run(tiny, params, ids, sharding=batch_sharding(make_mesh(tiny)))
  np.testing.assert_allclose(sharded, run(tiny, params, ids), atol=5e-6)


def test_one_program_per_length(tiny, params, ids):
  batched._program.cache_clear()
  run(tiny, params, ids)
  run(tiny, params, ids[:13])
  assert batched._program(tiny.model, (1, 3), "lasttoken", None)[0]._cache_size() == 2


def test_no_texts_give_no_vectors(tiny, params):
  assert run(tiny, params, []).shape == (2, 0, tiny.model.width)


def test_bucket_and_pad():
  assert [batched.bucket(n, (32, 64)) for n in (1, 32, 33, 64)] == [32, 32, 64, 64]
  tokens, lengths = batched.pad([[5, 6], [7]], 3)
  np.testing.assert_array_equal(tokens, [[5, 6, 0], [7, 0, 0]])
  np.testing.assert_array_equal(lengths, [2, 1])
