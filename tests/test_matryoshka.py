"""Worked examples of the three axes; cutting a tree."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlembed_jax import matryoshka
from mlembed_jax.matryoshka import PAPER_EXITS, Slice, slice_config, slice_params
from tests.material import padded, random_batch

TABLE = jnp.array([[2.0, 0, 1], [0, 1, 1], [1, 1, 0], [2, 1, 1]])


def test_dims_are_powers_of_two_and_the_width():
  assert matryoshka.default_dims(1024) == (8, 16, 32, 64, 128, 256, 512, 1024)
  assert matryoshka.default_dims(640) == (8, 16, 32, 64, 128, 256, 512, 640)


def test_dim_weights():
  weights = matryoshka.dim_weights(matryoshka.default_dims(1024))
  expected = (1, 0.353553, 0.166667, 0.088388, 0.050000, 0.029463, 0.017857, 0.011049)
  np.testing.assert_allclose(weights[::-1], expected, atol=5e-7)
  assert matryoshka.dim_weights(matryoshka.default_dims(896))[-2] == pytest.approx(
    0.377964, abs=1e-6
  )


@pytest.mark.parametrize(
  ("width", "total"),
  [
    (320, 1.892937),
    (640, 1.906912),
    (896, 1.766481),
    (1024, 1.716977),
    (2048, 1.723921),
    (2560, 1.921286),
    (4096, 1.728341),
    (5120, 1.924880),
  ],
)
def test_sum_of_dim_weights(width, total):
  weights = matryoshka.dim_weights(matryoshka.default_dims(width))
  assert sum(weights) == pytest.approx(total, abs=1e-6)


def test_rank_probabilities_are_proportional_to_rank():
  ranks = matryoshka.default_ranks(512)
  assert ranks == (64, 128, 256, 512)
  assert matryoshka.rank_probabilities(ranks) == pytest.approx((1 / 15, 2 / 15, 4 / 15, 8 / 15))
  assert matryoshka.rank_probabilities(matryoshka.default_ranks(1024)) == pytest.approx(
    (0.032258, 0.064516, 0.129032, 0.258065, 0.516129), abs=1e-6
  )
  assert matryoshka.default_ranks(384) == (64, 128, 256, 384)
  assert matryoshka.rank_probabilities((64, 128, 256, 384)) == pytest.approx(
    (0.076923, 0.153846, 0.307692, 0.461538), abs=1e-6
  )
  assert matryoshka.default_ranks(48) == (48,)
  assert matryoshka.default_ranks(0) == ()


@pytest.mark.parametrize(
  ("layers", "code", "paper"),
  [
    (9, (1, 2, 4, 8, 9), (1, 2, 4, 8, 9)),
    (28, (1, 2, 4, 8, 16, 24, 28), (1, 2, 4, 8, 16, 28)),
    (36, (1, 2, 4, 8, 16, 24, 32, 36), (1, 2, 4, 8, 16, 32, 36)),
    (40, (1, 2, 4, 8, 16, 24, 32, 40), (1, 2, 4, 8, 16, 32, 40)),
  ],
)
def test_exits(layers, code, paper):
  assert matryoshka.default_exits(layers) == code
  assert matryoshka.default_exits(layers, PAPER_EXITS) == paper


@pytest.mark.parametrize(("rank", "error"), [(1, 1.622095), (2, 0.889211), (3, 0.0)])
def test_factorize_is_the_best_approximation(rank, error):
  u, v, _ = matryoshka.factorize(TABLE, rank)
  assert u.shape == (4, rank) and v.shape == (rank, 3)
  assert jnp.linalg.norm(TABLE - u @ v) == pytest.approx(error, abs=2e-6)
  np.testing.assert_allclose(
    jnp.linalg.norm(u, axis=0), [3.516931, 1.356650, 0.889211][:rank], rtol=1e-6
  )


def test_factorize_row_at_rank_two():
  u, v, _ = matryoshka.factorize(TABLE, 2)
  np.testing.assert_allclose((u @ v)[0], [2.088457, 0.137760, 0.715138], atol=2e-6)


def test_leading_ranks_of_a_factorization_are_the_smaller_factorization():
  u, v, _ = matryoshka.factorize(TABLE, 3)
  u1, v1, _ = matryoshka.factorize(TABLE, 1)
  np.testing.assert_allclose(u[:, :1] @ v[:1], u1 @ v1, atol=1e-6)


def test_truncate_renormalises_each_prefix():
  x = jnp.array([[3.0, 4.0, 12.0]])
  np.testing.assert_allclose(matryoshka.truncate(x, 2), [[0.6, 0.8]], rtol=1e-6)
  np.testing.assert_array_equal(matryoshka.truncate(jnp.zeros((1, 3)), 2), [[0, 0]])
  grad = jax.grad(lambda x: jnp.sum(matryoshka.truncate(x, 2)))(jnp.zeros((1, 3)))
  assert np.all(np.isfinite(grad))


SLICES = [Slice(rank=8), Slice(depth=1), Slice(rank=16, depth=2)]


@pytest.mark.parametrize("cut", SLICES, ids=str)
def test_slicing_inside_jit_equals_slicing_outside_bit_for_bit(tiny, params, cut):
  tokens, lengths = random_batch(tiny.model.vocab, 4, 32)
  apply = padded(slice_config(tiny.model, cut))
  inside = jax.jit(lambda p: apply({"params": slice_params(p, cut)}, tokens, lengths))(params)
  outside = jax.jit(lambda p: apply({"params": p}, tokens, lengths))(slice_params(params, cut))
  np.testing.assert_array_equal(inside, outside)


@pytest.mark.parametrize("cut", SLICES, ids=str)
def test_gradients_outside_the_slice_are_exactly_zero(tiny, params, cut):
  tokens, lengths = random_batch(tiny.model.vocab, 4, 32)
  apply = padded(slice_config(tiny.model, cut))

  def loss(p):
    return jnp.sum(apply({"params": slice_params(p, cut)}, tokens, lengths)[-1] ** 3)

  grads = jax.jit(jax.grad(loss))(params)
  kept = jax.tree.map(lambda g, _: g, slice_params(grads, cut), slice_params(params, cut))
  assert all(np.any(leaf) for leaf in jax.tree.leaves(kept))
  if cut.rank:
    assert not np.any(grads["table"][:, cut.rank :]) and not np.any(grads["up"][cut.rank :])
  if cut.depth:
    assert not any(np.any(leaf[cut.depth :]) for leaf in jax.tree.leaves(grads["layers"]))


def test_cuts_beyond_the_model_are_refused(params):
  with pytest.raises(ValueError, match="depth 4: the model has 1 to 3"):
    slice_params(params, Slice(depth=4))
  with pytest.raises(ValueError, match="rank 25: the model has 1 to 24"):
    slice_params(params, Slice(rank=25))
  with pytest.raises(ValueError, match="full token table"):
    slice_params({"table": params["table"], "layers": params["layers"]}, Slice(rank=8))
