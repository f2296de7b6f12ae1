"""Worked examples of the objective, and a plain numpy formula over random inputs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlembed_jax import losses

Q_A, P_A, N_A = (
  [[3.0, 1, 0, 1], [2, 2, 1, 0]],
  [[3.0, 1, 1, 1], [3, 2, 1, 1]],
  [[2.0, 1, 1, 1], [2, 1, 1, 0]],
)
Q_B, P_B, N_B = (
  [[2.0, 1, 1, 0], [1, 2, 1, 1]],
  [[2.0, 2, 1, 0], [1, 2, 2, 1]],
  [[2.0, 0, 1, 0], [1, 1, 1, 1]],
)
# Logits reach 20, where float32 values are 2e-6 apart; the examples are printed to 1e-6.
TOLERANCE = 2e-6
DIMS, WEIGHTS = (4, 2), (1.0, 0.5**0.5 / 2)


def states(*exits):
  """Returns [E, B, C, D] of (queries, positives, negatives) per exit."""
  return jnp.stack([jnp.stack([jnp.array(texts) for texts in e], axis=1) for e in exits])


def distinct(rows, texts):
  """Returns hashes of texts that are all different."""
  return jnp.arange(rows * texts * 2, dtype=jnp.uint32).reshape(rows, texts, 2)


def objective(x, hashes=None, dims=DIMS, weights=WEIGHTS, **kwargs):
  options = {"inbatch": True, "inbatch_passage_grad": True, "mask_duplicates": True} | kwargs
  hashes = distinct(*x.shape[1:3]) if hashes is None else hashes
  return losses.objective(x, hashes, dims=dims, dim_weights=weights, temperature=0.05, **options)


def test_worked_example_of_two_exits_and_two_dims():
  result = objective(states((Q_A, P_A, N_A), (Q_B, P_B, N_B)))
  np.testing.assert_allclose(result.hard_E, [0.725767, 0.585433], atol=TOLERANCE)
  np.testing.assert_allclose(result.inbatch_E, [0.434610, 0.179030], atol=TOLERANCE)
  assert result.loss == pytest.approx(0.962420, abs=TOLERANCE)


def test_worked_example_without_the_inbatch_term():
  result = objective(states((Q_A, P_A, N_A), (Q_B, P_B, N_B)), inbatch=False)
  assert result.loss == pytest.approx(0.655600, abs=TOLERANCE)
  assert not np.any(result.inbatch_E)


@pytest.mark.parametrize(
  ("dim", "hard", "inbatch"),
  [
    (4, [0.336884, 0.753358], [0.487602, 0.181550]),
    (2, [0.597684, 0.424206], [0.401621, 0.164257]),
  ],
)
def test_worked_example_row_by_row(dim, hard, inbatch):
  unit = losses.truncate(states((Q_A, P_A, N_A)), dim)
  keep = jnp.ones((2, 2), bool)
  rows = losses.hard_rows(unit[:, :, 0], unit[:, :, 1:], keep, 0.05)
  np.testing.assert_allclose(rows[0], hard, atol=TOLERANCE)
  rows = losses.inbatch_rows(unit[:, :, 0], unit[:, :, 1], keep, 0.05)
  np.testing.assert_allclose(rows[0], inbatch, atol=TOLERANCE)


D_POSITIVES = [
  [-0.147861, 0.243556, 0.347834, -0.147807],
  [0.272330, -0.351708, -0.278444, 0.164871],
]
D_QUERIES = [[-0.112704, 0.365423, -0.035460, -0.027311], [0.113991, -0.129868, 0.031753, 0.016866]]


@pytest.mark.parametrize("passage_grad", [True, False])
def test_worked_example_of_the_gradient_switch(passage_grad):
  def inbatch(x):
    return objective(x, inbatch_passage_grad=passage_grad).inbatch_E[0]

  grad = jax.grad(inbatch)(states((Q_A, P_A, N_A)))[0]
  np.testing.assert_allclose(grad[:, 0], D_QUERIES, atol=TOLERANCE)
  np.testing.assert_allclose(
    grad[:, 1], D_POSITIVES if passage_grad else np.zeros((2, 4)), atol=1e-6
  )
  assert not np.any(grad[:, 2])


@pytest.mark.parametrize(
  ("masked", "rows"),
  [(False, [0.966378, 0.335149, 0.757271]), (True, [0.487602, 0.335149, 0.124382])],
)
def test_worked_example_of_a_repeated_positive(masked, rows):
  q, p = [*Q_A, [3.0, 0, 1, 1]], [*P_A, P_A[0]]
  hashes = distinct(3, 2).at[2, 1].set(distinct(3, 2)[0, 1])
  _, keep = losses.duplicate_masks(hashes, masked)
  unit = losses.truncate(states((q, p)), 4)
  result = losses.inbatch_rows(unit[:, :, 0], unit[:, :, 1], keep, 0.05)[0]
  np.testing.assert_allclose(result, rows, atol=TOLERANCE)
  mean = objective(states((q, p)), hashes, (4,), (1.0,), mask_duplicates=masked).loss
  assert mean == pytest.approx(np.mean(rows), abs=TOLERANCE)


def test_masks_follow_the_texts():
  a, b, c, d, e = (jnp.array([i, 7], jnp.uint32) for i in range(5))
  # Row 0: a -> b, negatives c and b (its own positive). Row 1: a -> d (same query), negative a.
  # Row 2: c -> a (row 0's query), negative e. Only one half of the 64 bits differs.
  hashes = jnp.stack([jnp.stack(row) for row in ([a, b, c, b], [a, d, a, e], [c, a, e, d])])
  hard, inbatch = losses.duplicate_masks(hashes, True)
  np.testing.assert_array_equal(
    hard, [[True, True, False], [True, False, True], [True, True, True]]
  )
  np.testing.assert_array_equal(
    inbatch, [[True, False, False], [False, True, False], [True, True, True]]
  )


def test_worked_example_of_distillation():
  student = [
    jnp.array(x, jnp.float32) for x in ([[1, 2], [0, 1]], [[1, 0], [2, 1]], [[0, 1], [1, 1]])
  ]
  teacher = [
    jnp.array(x, jnp.float32)
    for x in ([[1.5, 2, 9], [0, 2, 9]], [[1, 1, 9], [2, 2, 9]], [[1, 1, 9], [1, 3, 9]])
  ]
  each = [losses.distillation([s], [t], "raw") for s, t in zip(student, teacher, strict=True)]
  np.testing.assert_allclose(each, [0.3125, 0.5, 1.25], atol=TOLERANCE)
  assert losses.distillation(student, teacher, "raw") == pytest.approx(2.0625, abs=TOLERANCE)
  each = [losses.distillation([s], [t], "unit") for s, t in zip(student, teacher, strict=True)]
  np.testing.assert_allclose(each, [0.016130, 0.344210, 0.398466], atol=TOLERANCE)
  assert losses.distillation(student, teacher, "unit") == pytest.approx(0.758806, abs=TOLERANCE)


def numpy_objective(x, dims, weights, inbatch):
  """Returns the loss in float64, one cross-entropy at a time."""
  x, total = np.asarray(x, np.float64), 0.0
  for exit_BCD in x:
    for dim, weight in zip(dims, weights, strict=True):
      v = exit_BCD[:, :, :dim] / np.linalg.norm(exit_BCD[:, :, :dim], axis=-1, keepdims=True)
      for i in range(len(v)):
        own = v[i, 1:] @ v[i, 0] / 0.05
        total += weight * (np.log(np.exp(own).sum()) - own[0]) / len(v) / len(x)
        if inbatch:
          batch = v[:, 1] @ v[i, 0] / 0.05
          total += weight * (np.log(np.exp(batch).sum()) - batch[i]) / len(v) / len(x)
  return total


@pytest.mark.parametrize("inbatch", [True, False])
@pytest.mark.parametrize(("exits", "negatives"), [(1, 1), (3, 9)])
def test_objective_equals_the_numpy_formula(inbatch, exits, negatives):
  x = np.random.default_rng(exits).normal(size=(exits, 6, 2 + negatives, 48)).astype(np.float32)
  dims, weights = (8, 16, 48), (0.2, 0.5, 1.0)
  result = objective(jnp.array(x), None, dims, weights, inbatch=inbatch)
  assert result.loss == pytest.approx(numpy_objective(x, dims, weights, inbatch), rel=1e-6)


def test_rows_without_negatives_have_no_hard_loss():
  x = jnp.array(np.random.default_rng(0).normal(size=(1, 4, 2, 8)), jnp.float32)
  assert not np.any(objective(x, None, (8,), (1.0,)).hard_E)
