"""Spread-out vectors against sentence-transformers; quantised ones on their grid."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from sentence_transformers.sentence_transformer.losses import GlobalOrthogonalRegularizationLoss

from mlembed_jax.matryoshka import dim_weights
from mlembed_jax.objective import regularizers, similarity
from tests.reference import distinct_hashes, ours, random_states

DIMS = (8, 16, 48)


def gor(columns, dims):
  """Returns both moments, mean over columns [rows, D], weighted sum over dims."""
  loss, total = GlobalOrthogonalRegularizationLoss(None), 0.0
  for dim, weight in zip(dims, dim_weights(dims), strict=True):
    parts = loss.compute_loss_from_embeddings([x[:, :dim] for x in columns])
    total = total + weight * sum(parts.values())
  return total


def crowded_even_and_orthogonal():
  """Returns states [3, 8, D]: large moments, those of random vectors, and none at all."""
  x = random_states(3, 1, 8, 48)[:, 0]
  x[0] += 1.0
  x[2] = np.eye(8, 48)
  return x


@jax.jit
def spread_out(x, ids):
  """Returns the terms of each case of x and the gradient of their weighted sum."""

  def weighted(x):
    terms = jnp.stack([regularizers.spread_out(e, ids, DIMS) for e in x])
    return jnp.sum(terms * jnp.array(dim_weights(DIMS))[None]), terms

  (_, terms), gradient = jax.value_and_grad(weighted, has_aux=True)(x)
  return terms, gradient


def test_spread_out_equals_sentence_transformers():
  x = crowded_even_and_orthogonal()
  terms, gradient = spread_out(x, np.arange(8))
  leaf = torch.tensor(x.astype(np.float64), requires_grad=True)
  loss = GlobalOrthogonalRegularizationLoss(None)
  expected = [[sum(loss.compute_gor(e[:, :dim])).item() for dim in DIMS] for e in leaf]
  # Sums of 64 products of unit vectors, from which 8 are taken: 1e-6 is rounding.
  np.testing.assert_allclose(terms, expected, rtol=1e-5, atol=1e-7)
  assert terms[0].min() > 0.1
  assert not np.any(terms[2])
  sum(gor([e], DIMS) for e in leaf).backward()
  scale = np.abs(leaf.grad.numpy()).max()
  np.testing.assert_allclose(gradient, leaf.grad.numpy(), rtol=0, atol=1e-5 * scale)


def test_a_repeated_text_counts_once():
  x = crowded_even_and_orthogonal()
  first = [0, 1, 3, 6]
  expected, expected_gradient = spread_out(x[:, first], np.arange(4))
  found, gradient = spread_out(x, np.array([5, 3, 5, 1, 1, 5, 0, 3]))
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)
  np.testing.assert_allclose(gradient[:, first], expected_gradient, atol=1e-6)
  assert not np.any(np.delete(gradient, first, axis=1))


def test_one_text_alone_is_spread_out():
  terms, gradient = spread_out(crowded_even_and_orthogonal(), np.zeros(8, int))
  assert not np.any(terms > 1e-6)
  assert np.abs(gradient).max() <= 1e-6


def test_the_objective_spreads_queries_and_positives():
  x, hashes = random_states(2, 8, 4, 48) + 1.0, distinct_hashes(8, 4)
  hashes[3, 0], hashes[6, 1] = hashes[1, 0], hashes[2, 1]
  result, _ = ours(x, hashes, DIMS, task_type="clustering", losses__spread_out=0.5)
  double = torch.tensor(x.astype(np.float64))
  columns = lambda e: [np.delete(e[:, 0], 3, axis=0), np.delete(e[:, 1], 6, axis=0)]  # noqa: E731
  expected = [0.5 * gor([torch.as_tensor(c) for c in columns(e)], DIMS) for e in double.numpy()]
  np.testing.assert_allclose(result.terms["spread_out"], expected, rtol=1e-5)
  assert result.loss == pytest.approx(np.mean(sum(result.terms.values())), rel=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_int8_lies_on_the_grid(dtype):
  # 2,000 values per coordinate and exit on at most 255 levels, all of which differ by one step.
  x = jnp.asarray(random_states(2, 1000, 2, 16), dtype)
  found = np.asarray(jax.jit(jax.vmap(regularizers.int8))(x))
  double = np.asarray(x, np.float64)
  unit = double / np.linalg.norm(double, axis=-1, keepdims=True)
  step = np.abs(unit).max(axis=(1, 2), keepdims=True) / 127
  assert found.dtype == np.float32
  assert np.abs(found - unit).max() <= step.max() / 2 * (1 + 1e-5)
  np.testing.assert_allclose(found / step, np.round(found / step), atol=1e-4)
  np.testing.assert_allclose(np.abs(found / step).max(axis=(1, 2)), 127, rtol=1e-6)
  for e in range(2):
    for d in range(16):
      assert len(np.unique(found[e, :, :, d])) <= 255


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_binary_is_one_bit(dtype):
  x = jnp.asarray(random_states(2, 50, 2, 16), dtype).at[0, 0, 0, 0].set(0)
  found = jax.jit(regularizers.binary)(x)
  assert found.dtype == dtype
  np.testing.assert_array_equal(found, np.where(np.asarray(x, np.float32) < 0, -1, 1))


def test_the_gradient_passes_straight_through():
  x = jnp.asarray(random_states(1, 6, 3, 16)[0])
  coefficients = jnp.asarray(random_states(1, 6, 3, 16, seed=1)[0])
  # Not linear, so that the point at which it is differentiated matters.
  f = lambda y: jnp.sum(coefficients * y**3)  # noqa: E731
  at = lambda quantize: 3 * coefficients * quantize(x) ** 2  # noqa: E731
  binary = jax.jit(jax.grad(lambda x: f(regularizers.binary(x))))(x)
  np.testing.assert_array_equal(binary, at(regularizers.binary))
  # int8 is of the unit vector, whose Jacobian is (1 - u u') / norm.
  norm = jnp.linalg.norm(x, axis=-1, keepdims=True)
  u, d = x / norm, at(regularizers.int8)
  expected = (d - u * jnp.sum(u * d, axis=-1, keepdims=True)) / norm
  int8 = jax.jit(jax.grad(lambda x: f(regularizers.int8(x))))(x)
  np.testing.assert_allclose(int8, expected, atol=1e-6)


def test_a_prefix_of_quantised_vectors_is_the_quantised_prefix():
  x = random_states(1, 20, 3, 48)[0]
  found = np.asarray(regularizers.binary(jnp.asarray(x)))
  np.testing.assert_array_equal(found[..., :8], regularizers.binary(jnp.asarray(x[..., :8])))
  # An int8 index rounds the coordinates of the whole unit vector one by one: what the others
  # are does not matter, as long as the norm is the same.
  turned = x.copy()
  turned[..., 8:] *= -1
  turned[..., 8:] = turned[..., ::-1][..., :40]
  a, b = (np.asarray(regularizers.int8(jnp.asarray(v))) for v in (x, turned))
  np.testing.assert_allclose(a[..., :8], b[..., :8], atol=1e-7)
  assert np.any(a[..., 8:] != b[..., 8:])


def test_the_cosine_of_signs_counts_equal_bits():
  x = random_states(1, 9, 5, 48)[0]
  cut = similarity.texts(regularizers.binary(jnp.asarray(x)), DIMS)
  cosines = similarity.own_logits(cut[:, 0], cut[:, 1:])
  bits = x < 0
  for m, dim in enumerate(DIMS):
    hamming = np.sum(bits[:, :1, :dim] != bits[:, 1:, :dim], axis=-1)
    np.testing.assert_allclose(cosines[..., m], 1 - 2 * hamming / dim, atol=1e-6)


@pytest.mark.parametrize(("name", "kind"), [("int8", "retrieval"), ("binary", "scored_pairs")])
def test_the_objective_learns_from_quantised_vectors_too(name, kind):
  x, hashes = random_states(2, 8, 2 if kind == "scored_pairs" else 4, 48), distinct_hashes(8, 4)
  hashes = hashes[:, : x.shape[2]]
  inputs = {"task_type": kind, "scores": np.linspace(0, 1, 8, dtype=np.float32)}
  quantize = jax.vmap(getattr(regularizers, name))
  quantized, pull = jax.vjp(quantize, jnp.asarray(x))
  result, (gradient, _) = ours(x, hashes, (8, 48), **inputs, **{f"losses__{name}": 0.5})
  plain, (d_plain, _) = ours(x, hashes, (8, 48), **inputs)
  again, (d_again, _) = ours(quantized, hashes, (8, 48), **inputs)
  assert set(result.terms) == {*plain.terms, name}
  for term, value in plain.terms.items():
    np.testing.assert_allclose(result.terms[term], value, rtol=1e-6)
  np.testing.assert_allclose(result.terms[name], 0.5 * sum(again.terms.values()), rtol=1e-6)
  assert result.loss == pytest.approx(plain.loss + 0.5 * again.loss, rel=1e-6)
  expected = d_plain + 0.5 * pull(jnp.asarray(d_again))[0]
  np.testing.assert_allclose(gradient, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
