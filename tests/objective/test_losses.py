"""The objective: worked examples, and a plain float64 formula over random inputs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from sentence_transformers.sentence_transformer.losses import CoSENTLoss

from mlembed_jax.matryoshka import default_dims, dim_weights
from mlembed_jax.objective import negatives
from mlembed_jax.objective.losses import Teachers
from mlembed_jax.objective.similarity import tile_keep
from tests import reference
from tests.reference import distinct_hashes, ours, random_states, repeated_hashes

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
DIMS = (2, 4)


def states(*exits):
  """Returns [E, B, C, D] of (queries, positives, negatives) per exit."""
  return jnp.stack([jnp.stack([jnp.array(texts) for texts in e], axis=1) for e in exits])


@functools.partial(jax.jit, static_argnames="masked")
def rows_of(x, hashes, masked=True):
  """Returns the two cross-entropies of each row [B, M] of states [1, B, C, D] before any mean."""
  ids = negatives.text_ids(hashes, masked)
  forward, _ = negatives.batch_pairings(ids, 1, 2)
  texts = negatives.cut_texts(x[0], DIMS, 1, 0.05)
  c = negatives.batch_logits(texts, ids, forward, others_negatives=False, passage_grad=True)
  return jax.nn.softplus(c.hard - c.own[:, 0]), jax.nn.softplus(c.inbatch - c.own[:, 0])


def test_worked_example_of_two_exits_and_two_dims():
  result, _ = ours(states((Q_A, P_A, N_A), (Q_B, P_B, N_B)), distinct_hashes(2, 3), DIMS)
  np.testing.assert_allclose(result.terms["hard"], [0.725767, 0.585433], atol=TOLERANCE)
  np.testing.assert_allclose(result.terms["inbatch"], [0.434610, 0.179030], atol=TOLERANCE)
  assert result.loss == pytest.approx(0.962420, abs=TOLERANCE)


@pytest.mark.parametrize("kind", ["clustering", "classification"])
def test_worked_example_without_the_inbatch_term(kind):
  x = states((Q_A, P_A, N_A), (Q_B, P_B, N_B))
  result, _ = ours(x, distinct_hashes(2, 3), DIMS, task_type=kind)
  assert result.loss == pytest.approx(0.655600, abs=TOLERANCE)
  assert set(result.terms) == {"hard"}


def test_worked_example_row_by_row():
  hard, inbatch = rows_of(states((Q_A, P_A, N_A)), distinct_hashes(2, 3))
  # Columns are the dims 2 and 4.
  np.testing.assert_allclose(hard.T, [[0.597684, 0.424206], [0.336884, 0.753358]], atol=TOLERANCE)
  np.testing.assert_allclose(
    inbatch.T, [[0.401621, 0.164257], [0.487602, 0.181550]], atol=TOLERANCE
  )


D_POSITIVES = [
  [-0.147861, 0.243556, 0.347834, -0.147807],
  [0.272330, -0.351708, -0.278444, 0.164871],
]
D_QUERIES = [[-0.112704, 0.365423, -0.035460, -0.027311], [0.113991, -0.129868, 0.031753, 0.016866]]


@pytest.mark.parametrize("passage_grad", [True, False])
def test_worked_example_of_the_gradient_switch(passage_grad):
  _, (gradient, _) = ours(
    states((Q_A, P_A)),
    distinct_hashes(2, 2),
    DIMS,
    losses__inbatch_passage_grad=passage_grad,
  )
  np.testing.assert_allclose(gradient[0, :, 0], D_QUERIES, atol=TOLERANCE)
  expected = D_POSITIVES if passage_grad else np.zeros((2, 4))
  np.testing.assert_allclose(gradient[0, :, 1], expected, atol=TOLERANCE if passage_grad else 0)


@pytest.mark.parametrize(
  ("masked", "rows"),
  [(False, [0.966378, 0.335149, 0.757271]), (True, [0.487602, 0.335149, 0.124382])],
)
def test_worked_example_of_a_repeated_positive(masked, rows):
  x, hashes = states(([*Q_A, [3.0, 0, 1, 1]], [*P_A, P_A[0]])), distinct_hashes(3, 2)
  hashes[2, 1] = hashes[0, 1]
  np.testing.assert_allclose(rows_of(x, hashes, masked)[1][:, 1], rows, atol=TOLERANCE)
  result, _ = ours(x, hashes, (4,), losses__mask_duplicates=masked)
  assert result.loss == pytest.approx(np.mean(rows), abs=TOLERANCE)


@pytest.mark.parametrize(("masked", "loss"), [(True, 0.0), (False, np.log(4))])
def test_copies_of_a_row_do_not_meet_each_other_as_negatives(masked, loss):
  """A file of one row that is completed to a batch of four: there is nothing to tell apart."""
  x = states(([Q_A[0]] * 4, [P_A[0]] * 4))
  hashes = np.repeat(distinct_hashes(1, 2), 4, axis=0)
  result, (gradient, _) = ours(x, hashes, (4,), losses__mask_duplicates=masked)
  assert result.loss == pytest.approx(loss, abs=1e-6)
  assert masked == (not np.any(gradient))


def test_masks_follow_the_texts():
  a, b, c, d, e = (jnp.array([i, 7], jnp.uint32) for i in range(5))
  # Row 0: a -> b, negatives c and b (its own positive). Row 1: a -> d (same query), negative a.
  # Row 2: c -> a (row 0's query), negative e.
  hashes = jnp.stack([jnp.stack(row) for row in ([a, b, c, b], [a, d, a, e], [c, a, e, d])])
  ids = negatives.text_ids(hashes, True)
  np.testing.assert_array_equal(negatives.stored_keep(ids, 1), [[1, 0], [0, 1], [1, 1]])
  forward, backward = negatives.batch_pairings(ids, 1, 2)
  np.testing.assert_array_equal(tile_keep(*forward), [[0, 0, 0], [0, 0, 0], [1, 1, 0]])
  # Positives b, d, a meet queries a, a, c: a is rows 0 and 1's own query, and row 2's positive.
  np.testing.assert_array_equal(tile_keep(*backward), [[0, 0, 1], [0, 0, 1], [0, 0, 0]])
  forward, _ = negatives.batch_pairings(ids, 1, 4)
  np.testing.assert_array_equal(
    tile_keep(*forward),
    [[0, 0, 0, 0, 0, 0, 0, 1, 1], [0, 0, 0, 0, 0, 0, 0, 1, 0], [1, 0, 1, 1, 0, 1, 0, 0, 0]],
  )


def test_hashes_that_differ_in_one_half_are_different_texts():
  # Sorted, (0, 2) (1, 2) (1, 3) stand side by side: either half alone would take two for one.
  hashes = jnp.array([[[1, 2], [1, 3]], [[0, 2], [1, 2]], [[3, 1], [1, 3]]], jnp.uint32)
  ids = negatives.text_ids(hashes, True).reshape(-1)
  same = np.zeros((6, 6), bool)
  same[[0, 3, 1, 5], [3, 0, 5, 1]] = True
  np.testing.assert_array_equal(ids[:, None] == ids[None], same | np.eye(6, dtype=bool))
  assert len(set(negatives.text_ids(hashes, False).reshape(-1).tolist())) == 6


def assert_agrees(
  x, hashes, dims, settings, options, task_type="retrieval", gradient=1e-5, loss=1e-6, **inputs
):
  """Compares with the plain formula; `settings` configure the package, `options` the formula."""
  result, (d_states, d_learnt) = ours(
    x,
    hashes,
    dims,
    task_type=task_type,
    positives=options.get("positives", 1),
    **inputs,
    **settings,
  )
  expected = reference.objective(np.asarray(x, np.float32), hashes, dims, **options)
  assert set(result.terms) == set(expected.terms)
  for name, term in expected.terms.items():
    np.testing.assert_allclose(result.terms[name], term, rtol=10 * loss)
  assert np.mean(sum(result.terms.values())) == pytest.approx(result.loss, rel=1e-6)
  assert result.loss == pytest.approx(expected.loss, rel=loss)
  limit = gradient * np.abs(expected.gradient).max()
  assert np.abs(np.asarray(d_states, np.float64) - expected.gradient).max() <= limit
  assert d_learnt.temperature == pytest.approx(expected.temperature_gradient, rel=10 * loss)
  assert result.negatives == pytest.approx(expected.negatives, rel=1e-6)
  assert result.empty_rows == expected.empty_rows
  return result, d_states


# Widths of the published family; every pair of values of two columns stands in some row.
@pytest.mark.parametrize(
  ("width", "matryoshka", "negatives", "exits", "masked"),
  [
    (48, True, 1, 1, True),
    (48, True, 9, 8, False),
    (48, False, 4, 8, True),
    (320, True, 4, 1, False),
    (320, False, 1, 8, False),
    (320, False, 9, 1, True),
    (640, True, 9, 8, True),
    (640, False, 4, 1, False),
    (640, False, 1, 8, True),
    (1024, True, 1, 8, True),
    (1024, False, 9, 1, False),
    (1024, False, 4, 1, True),
    (2560, True, 4, 8, True),
    (2560, False, 1, 1, False),
    (2560, False, 9, 8, False),
  ],
)
def test_objective_equals_the_plain_formula(width, matryoshka, negatives, exits, masked):
  x = random_states(exits, 8, 2 + negatives, width)
  assert_agrees(
    x,
    repeated_hashes(8, 2 + negatives),
    default_dims(width) if matryoshka else (width,),
    {"losses__mask_duplicates": masked},
    {"masked": masked},
  )


SYMMETRIC, ALL_NEGATIVES, JOINT, CONSTANT_PASSAGES, MARGIN, WIDE_MARGIN, UNMASKED, ALONE = (
  ({"losses__retrieval__symmetric": True}, {"symmetric": True}),
  ({"losses__inbatch_negatives": True}, {"inbatch_negatives": True}),
  ({"losses__softmax": "joint"}, {"joint": True}),
  ({"losses__inbatch_passage_grad": False}, {"passage_grad": False}),
  ({"losses__false_negative_margin": -0.05}, {"margin": -0.05}),
  ({"losses__false_negative_margin": 0.1}, {"margin": 0.1}),
  ({"losses__mask_duplicates": False}, {"masked": False}),
  ({"losses__retrieval__inbatch": False}, {"inbatch": False}),
)


@pytest.mark.parametrize(
  ("positives", "changes"),
  [
    (1, [JOINT]),
    (1, [ALL_NEGATIVES]),
    (1, [SYMMETRIC]),
    (2, [ALONE]),
    (2, [SYMMETRIC, UNMASKED]),
    (2, [ALL_NEGATIVES, MARGIN]),
    (1, [WIDE_MARGIN, SYMMETRIC]),
    (1, [CONSTANT_PASSAGES, SYMMETRIC]),
    (2, [CONSTANT_PASSAGES, JOINT, ALL_NEGATIVES]),
    (2, [JOINT, SYMMETRIC, ALL_NEGATIVES]),
  ],
)
def test_options_equal_the_plain_formula(positives, changes):
  texts = 4 + positives
  settings = {name: value for ours, _ in changes for name, value in ours.items()}
  options = {name: value for _, plain in changes for name, value in plain.items()}
  assert_agrees(
    random_states(2, 8, texts, 48, seed=positives),
    repeated_hashes(8, texts, positives),
    (8, 16, 48),
    settings,
    options | {"positives": positives},
  )


# It judges, and teaches nothing else.
BY_TEACHER = {
  "losses__false_negative_score": "teacher",
  "kd__teacher": "stored",
  "kd__weight": 0,
}


def test_margin_by_the_score_of_a_teacher():
  # Wider than the student, two exits: the deepest judges, by its whole vectors.
  teacher = random_states(2, 8, 5, 64, seed=1)
  settings = BY_TEACHER | MARGIN[0] | SYMMETRIC[0] | ALL_NEGATIVES[0]
  options = MARGIN[1] | SYMMETRIC[1] | ALL_NEGATIVES[1] | {"judge": teacher[-1]}
  x, hashes, dims = random_states(2, 8, 5, 48), repeated_hashes(8, 5), (8, 48)
  result, _ = assert_agrees(
    x, hashes, dims, settings, options, teachers=Teachers(jnp.asarray(teacher))
  )
  assert result.negatives < reference.objective(x, hashes, dims, **ALL_NEGATIVES[1]).negatives


@pytest.mark.parametrize("change", [JOINT, SYMMETRIC])
def test_constant_passages_leave_the_gradient_of_queries(change):
  x, hashes = random_states(1, 8, 2, 48), distinct_hashes(8, 2)

  def gradient(passage_grad):
    settings = change[0] | {"losses__inbatch_passage_grad": passage_grad}
    return ours(x, hashes, (48,), **settings)[1][0][0]

  constant, learned = gradient(False), gradient(True)
  np.testing.assert_allclose(constant[:, 0], learned[:, 0], atol=1e-6)
  assert np.any(learned[:, 1])
  # A joint softmax holds the row's own texts too, and they go on learning.
  assert np.any(constant[:, 1:]) == (change is JOINT)


def test_a_batch_of_one_repeated_pair_has_no_loss():
  hashes = np.broadcast_to(distinct_hashes(1, 2), (8, 2, 2)).copy()
  x = random_states(2, 8, 2, 48)
  for settings in ({}, SYMMETRIC[0] | JOINT[0] | {"losses__self_distillation": 1.0}):
    result, gradients = ours(x, hashes, (8, 48), **settings)
    assert result.loss == 0
    assert not np.any(gradients[0])
    assert gradients[1].temperature == 0
    assert result.empty_rows == 8
    assert result.negatives == 0


def test_rows_whose_stored_negatives_are_all_masked_have_no_loss():
  hashes = distinct_hashes(8, 4)
  hashes[:, 2], hashes[:, 3] = hashes[:, 1], hashes[:, 0]
  result, (gradient, _) = ours(random_states(1, 8, 4, 48), hashes, (8, 48), task_type="clustering")
  assert result.loss == 0
  assert not np.any(gradient)
  assert result.empty_rows == 8


def test_without_the_rows_own_lesson_their_quantised_vectors_teach_nothing():
  x, half = random_states(1, 8, 3, 48), {"losses__int8": 0.5, "losses__contrastive": 0.5}
  taught = {"teachers": Teachers(exits=jnp.asarray(x)), "kd__teacher": "stored"}
  whole = ours(x, distinct_hashes(8, 3), (8, 48), **half | {"losses__contrastive": 1.0})[0]
  found = ours(x, distinct_hashes(8, 3), (8, 48), **half)[0]
  np.testing.assert_allclose(2 * found.terms["int8"], whole.terms["int8"], rtol=1e-6)
  found = ours(x, distinct_hashes(8, 3), (8, 48), **half | taught | {"losses__contrastive": 0})[0]
  assert set(found.terms) == {"distillation"}


def test_a_zero_state_has_a_finite_gradient():
  x = random_states(1, 8, 3, 48)
  x[0, 0, 0] = x[0, 1, 1] = x[0, 2, 2] = 0
  result, gradients = ours(x, distinct_hashes(8, 3), (8, 48), **SYMMETRIC[0])
  assert np.isfinite(result.loss)
  assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves(gradients))


def test_bfloat16_states_lose_nothing_in_the_loss():
  # Products of bfloat16 numbers are exact in float32; the gradient is rounded to bfloat16.
  x = jnp.asarray(random_states(2, 8, 5, 320), jnp.bfloat16)
  settings = SYMMETRIC[0] | ALL_NEGATIVES[0]
  options = SYMMETRIC[1] | ALL_NEGATIVES[1]
  _, gradient = assert_agrees(
    x, repeated_hashes(8, 5), (64, 320), settings, options, gradient=2e-2, loss=1e-5
  )
  assert gradient.dtype == jnp.bfloat16


def cosent(x, scores, dims, temperature=0.05):
  """Returns the weighted loss of sentence-transformers, mean over exits, and its gradient."""
  x = torch.tensor(np.asarray(x, np.float64), requires_grad=True)
  loss, labels = CoSENTLoss(None, scale=1 / temperature), torch.tensor(scores)
  total = sum(
    weight * loss.compute_loss_from_embeddings([e[:, 0, :dim], e[:, 1, :dim]], labels)
    for e in x
    for dim, weight in zip(dims, dim_weights(dims), strict=True)
  ) / len(x)
  total.backward()
  return total.item(), x.grad.numpy()


def test_scored_pairs_need_their_scores():
  with pytest.raises(ValueError, match="a batch of scored_pairs without scores"):
    ours(random_states(1, 4, 2, 8), distinct_hashes(4, 2), (8,), task_type="scored_pairs")


@pytest.mark.parametrize(
  "scores", [np.linspace(1, 0, 12), np.arange(12) % 4 / 3, np.full(12, 0.5)], ids=str
)
def test_scored_pairs_equal_cosent(scores):
  x, scores, dims = random_states(2, 12, 2, 48), scores.astype(np.float32), (8, 16, 48)
  result, (gradient, _) = ours(
    x, distinct_hashes(12, 2), dims, task_type="scored_pairs", scores=scores
  )
  expected, expected_gradient = cosent(x, scores, dims)
  assert result.loss == pytest.approx(expected, rel=1e-6)
  assert np.abs(gradient - expected_gradient).max() <= 1e-5 * np.abs(expected_gradient).max()
  assert set(result.terms) == {"scored"}
  if len(set(scores)) == 1:
    assert result.loss == 0
  # Each score occurs three, one or twelve times: rows of another score are what a row learns from.
  counts = [np.sum(scores != score) for score in scores]
  assert result.negatives == np.mean(counts)
  assert result.empty_rows == np.sum(np.array(counts) == 0)
