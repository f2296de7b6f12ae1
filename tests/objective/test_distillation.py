"""Learning from a teacher's states and from the full model: worked examples, plain formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from mlembed_jax.matryoshka import dim_weights
from mlembed_jax.objective.distillation import distillation, from_teacher, match_exits
from mlembed_jax.objective.losses import Teachers
from tests import reference
from tests.reference import distinct_hashes, ours, random_states, repeated_hashes

CODE_EXITS = {16: (1, 2, 4, 8, 16), 28: (1, 2, 4, 8, 16, 24, 28)}


def test_worked_example_of_distillation():
  student = [
    jnp.array(x, jnp.float32) for x in ([[1, 2], [0, 1]], [[1, 0], [2, 1]], [[0, 1], [1, 1]])
  ]
  teacher = [
    jnp.array(x, jnp.float32)
    for x in ([[1.5, 2, 9], [0, 2, 9]], [[1, 1, 9], [2, 2, 9]], [[1, 1, 9], [1, 3, 9]])
  ]
  each = [distillation([s], [t], "raw") for s, t in zip(student, teacher, strict=True)]
  np.testing.assert_allclose(each, [0.3125, 0.5, 1.25], atol=1e-6)
  assert distillation(student, teacher, "raw") == pytest.approx(2.0625, abs=1e-6)
  each = [distillation([s], [t], "unit") for s, t in zip(student, teacher, strict=True)]
  np.testing.assert_allclose(each, [0.016130, 0.344210, 0.398466], atol=1e-6)
  assert distillation(student, teacher, "unit") == pytest.approx(0.758806, abs=1e-6)


@pytest.mark.parametrize(
  ("exits", "teacher_exits", "match", "expected"),
  [
    (CODE_EXITS[16], CODE_EXITS[28], "depth_fraction", (2, 4, 8, 16, 28)),
    (CODE_EXITS[16], CODE_EXITS[28], "index", (4, 8, 16, 24, 28)),
    (
      CODE_EXITS[28],
      (1, 2, 4, 8, 16, 24, 32, 36),
      "depth_fraction",
      (1, 2, 4, 8, 24, 32, 36),
    ),
    (CODE_EXITS[16], (28,), "depth_fraction", (28,) * 5),
    (CODE_EXITS[16], CODE_EXITS[28], "last", (28,)),
    ((2, 4), (1, 3, 4), "depth_fraction", (3, 4)),  # 2/4 is as near to 1/4 as to 3/4: the deeper
  ],
)
def test_worked_examples_of_matched_exits(exits, teacher_exits, match, expected):
  matched = match_exits(exits, exits[-1], teacher_exits, teacher_exits[-1], match)
  assert matched == expected


def test_by_position_a_teacher_needs_as_many_exits():
  with pytest.raises(ValueError, match="1 exits for the student's 5; use depth_fraction"):
    match_exits(CODE_EXITS[16], 16, (28,), 28, "index")


def plain_by_exit(x, teacher, positives, space):
  """Returns [E], one group of texts after the other."""
  out = []
  for s, t in zip(x, np.broadcast_to(teacher, (len(x), *teacher.shape[1:])), strict=True):
    s, t = s[:, : t.shape[1]].astype(np.float64), t[..., : s.shape[-1]].astype(np.float64)
    if space == "unit":
      s, t = (v / np.linalg.norm(v, axis=-1, keepdims=True) for v in (s, t))
    groups = slice(0, 1), slice(1, 1 + positives), slice(1 + positives, None)
    squares = [(s[:, g] - t[:, g]) ** 2 for g in groups if s[:, g].size]
    out.append(sum(np.mean(v.sum(-1) if space == "unit" else v) for v in squares))
  return out


# Of a row's query, 2 positives and 3 negatives the teacher knows all, no negatives, or one less.
@pytest.mark.parametrize("space", ["raw", "unit"])
@pytest.mark.parametrize(("known", "exits"), [(6, 3), (6, 1), (3, 1), (5, 3)])
def test_each_exit_learns_the_texts_that_the_teacher_knows(known, exits, space):
  x, teacher = random_states(3, 4, 6, 8), random_states(exits, 4, known, 12, seed=1)
  teachers = np.broadcast_to(teacher, (len(x), *teacher.shape[1:]))
  found = [from_teacher(jnp.asarray(s), t, 2, space) for s, t in zip(x, teachers, strict=True)]
  np.testing.assert_allclose(found, plain_by_exit(x, teacher, 2, space), rtol=1e-6)


@pytest.mark.parametrize("space", ["raw", "unit"])
def test_no_gradient_reaches_the_teacher_or_texts_it_does_not_know(space):
  x, teacher = random_states(1, 4, 4, 8)[0], random_states(1, 4, 2, 8, seed=1)[0]
  distance = lambda x, t: from_teacher(x, t, 1, space)  # noqa: E731
  d_x, d_teacher = jax.jit(jax.grad(distance, argnums=(0, 1)))(x, teacher)
  assert not np.any(d_teacher)
  assert np.all(np.any(d_x[:, :2], axis=-1))
  assert not np.any(d_x[:, 2:])


def test_the_teacher_term_is_added_with_its_weight():
  x, teacher = random_states(2, 8, 3, 48), random_states(1, 8, 2, 64, seed=1)
  settings = {"task_type": "clustering", "kd__weight": 0.3, "kd__space": "unit"}
  given = Teachers(exits=jnp.asarray(teacher))
  result, _ = ours(x, distinct_hashes(8, 3), (8, 48), teachers=given, **settings)
  expected = 0.3 * np.array(plain_by_exit(x, teacher, 1, "unit"))
  np.testing.assert_allclose(result.terms["distillation"], expected, rtol=1e-6)
  assert result.loss == pytest.approx(np.mean(sum(result.terms.values())), rel=1e-6)


@pytest.mark.parametrize("space", ["raw", "unit"])
@pytest.mark.parametrize("width", [24, 96])
def test_a_map_is_learnt_to_the_width_of_the_teacher(space, width):
  x, teacher = random_states(2, 8, 3, 48), random_states(1, 8, 2, width, seed=1)
  w = np.random.default_rng(2).normal(size=(48, width)).astype(np.float32) / 7
  settings = {"losses__contrastive": 0, "kd__space": space, "kd__projection": width, **ONLINE}
  options = {"teachers": Teachers(exits=jnp.asarray(teacher)), "projection": jnp.asarray(w)}
  result, (d_states, d_learnt) = ours(x, distinct_hashes(8, 3), (8, 48), **options, **settings)
  states, of_map = (torch.tensor(a, dtype=torch.float64, requires_grad=True) for a in (x, w))
  unit = lambda v: v / v.norm(dim=-1, keepdim=True) if space == "unit" else v  # noqa: E731
  wide, goal = unit(states[:, :, :2] @ of_map), unit(torch.tensor(teacher, dtype=torch.float64))
  squares = (wide - goal) ** 2
  terms = (squares.sum(-1) if space == "unit" else squares.mean(-1)).mean(1).sum(-1)  # [E]
  terms.mean().backward()
  np.testing.assert_allclose(result.terms["distillation"], terms.detach(), rtol=1e-5)
  pairs = (d_states, states.grad.numpy()), (d_learnt.projection, of_map.grad.numpy())
  for found, expected in pairs:
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_each_dim_learns_the_leading_coordinates_of_the_teacher():
  x, teacher = random_states(2, 8, 3, 48), random_states(1, 8, 2, 64, seed=1)
  settings = {"task_type": "clustering", "kd__weight": 0, "kd__prefix": 0.3, **ONLINE}
  given = Teachers(exits=jnp.asarray(teacher))
  result, _ = ours(x, distinct_hashes(8, 3), (8, 48), teachers=given, **settings)
  each = [plain_by_exit(x[..., :dim], teacher, 1, "unit") for dim in (8, 48)]
  expected = 0.3 * np.array(dim_weights((8, 48))) @ np.array(each)
  np.testing.assert_allclose(result.terms["prefix"], expected, rtol=1e-6)
  assert "distillation" not in result.terms


ONLINE = {"kd__teacher": "stored"}


def plain_similarity(x, teacher, hashes, dims, temperature):
  """Returns the term of every exit, weighted over dims, and its gradient; float64, by torch."""
  states, known = torch.tensor(x, dtype=torch.float64, requires_grad=True), teacher.shape[2]
  texts = [tuple(text) for text in hashes[:, :known].reshape(-1, 2).tolist()]
  rows, B = np.repeat(np.arange(len(hashes)), known), len(hashes)
  query = [tuple(text) for text in hashes[:, 0].tolist()]
  keep = torch.tensor(
    [[rows[n] != b and texts[n] != query[b] for n in range(B * known)] for b in range(B)]
  )
  unit = lambda v: v / v.norm(dim=-1, keepdim=True)  # noqa: E731

  def log_choice(v):
    v = unit(v)
    logits = v[:, 0] @ v.reshape(B * known, -1).T / temperature
    return torch.log_softmax(logits.masked_fill(~keep, -torch.inf), dim=1)

  found = []
  for exit_, s in enumerate(states):
    goal = log_choice(torch.tensor(teacher[min(exit_, len(teacher) - 1)], dtype=torch.float64))
    each = []
    for dim in dims:
      own = log_choice(s[:, :known, :dim])
      terms = torch.where(keep, goal.exp() * (goal - own), 0.0)
      each.append(terms.sum(dim=1).mean())
    found.append(sum(w * e for w, e in zip(dim_weights(dims), each, strict=True)))
  sum(found).backward()
  return torch.stack(found).detach().numpy(), states.grad.numpy()


# Texts alone; pairs of which the teacher knows all texts, or the first two; of any width.
@pytest.mark.parametrize(
  ("texts", "known", "exits", "width"), [(1, 1, 1, 24), (4, 4, 2, 64), (4, 2, 1, 24)]
)
def test_each_dim_learns_the_choice_of_the_teacher(texts, known, exits, width):
  x, teacher = random_states(2, 8, texts, 48), random_states(exits, 8, known, width, seed=1)
  hashes = repeated_hashes(8, texts) if texts > 1 else distinct_hashes(8, 1)
  hashes[6, 0] = hashes[5, 0]  # two equal queries
  settings = {"kd__weight": 0, "kd__similarity": 0.5, "kd__temperature": 0.1, **ONLINE}
  settings |= {"losses__contrastive": 0, "task_type": "text" if texts == 1 else "retrieval"}
  given = Teachers(exits=jnp.asarray(teacher))
  options = {"positives": min(1, texts - 1), "teachers": given}
  result, (gradient, _) = ours(x, hashes, (8, 48), **options, **settings)
  expected, expected_gradient = plain_similarity(x, teacher, hashes, (8, 48), 0.1)
  assert set(result.terms) == {"similarity"} and result.empty_rows == 0
  if texts == 1:  # two of eight have 6 others, the rest 7
    assert result.negatives == pytest.approx(6.75)
  np.testing.assert_allclose(result.terms["similarity"], 0.5 * expected, rtol=1e-5)
  scale = np.abs(expected_gradient).max() / 2
  np.testing.assert_allclose(2 * gradient, 0.5 * expected_gradient, rtol=0, atol=1e-5 * scale)


def test_a_student_that_is_its_teacher_has_nothing_to_learn():
  x = random_states(2, 8, 1, 48)
  settings = {"kd__weight": 1, "kd__space": "unit", "kd__prefix": 1, "kd__similarity": 1}
  given = Teachers(exits=jnp.asarray(x))
  options = {"positives": 0, "teachers": given, "task_type": "text", **ONLINE}
  result, (gradient, _) = ours(x, distinct_hashes(8, 1), (48,), **options, **settings)
  assert set(result.terms) == {"distillation", "prefix", "similarity"}
  assert result.loss == pytest.approx(0, abs=1e-5) and np.abs(gradient).max() < 1e-5


def divergence(x, hashes, dims, **kwargs):
  """Returns the term of each exit, of weight 0.5, and the gradient of their sum."""
  result, (gradient, _) = ours(x, hashes, dims, losses__self_distillation=0.5, **kwargs)
  _, (without, _) = ours(x, hashes, dims, **kwargs)
  return result.terms["self_distillation"], (gradient - without) * len(x)


@pytest.mark.parametrize(
  ("positives", "has_full", "settings", "options"),
  [
    (1, False, {}, {}),
    (1, True, {"losses__inbatch_negatives": True}, {"inbatch_negatives": True}),
    (2, True, {"losses__softmax": "joint", "losses__mask_duplicates": False}, {"masked": False}),
    (2, False, {"losses__retrieval__inbatch": False}, {"inbatch": False}),
    (
      1,
      True,
      {"losses__inbatch_passage_grad": False, "losses__false_negative_margin": 0.05},
      {"passage_grad": False, "margin": 0.05},
    ),
  ],
)
def test_self_distillation_equals_the_plain_formula(positives, has_full, settings, options):
  texts = 4 + positives
  x, hashes = random_states(2, 8, texts, 48), repeated_hashes(8, texts, positives)
  # The full model's states: another rank of the token table, or the deepest exit itself.
  full = random_states(1, 8, texts, 48, seed=1) if has_full else x[-1:]
  found, gradient = divergence(
    x,
    hashes,
    (8, 48),
    positives=positives,
    teachers=Teachers(full=jnp.asarray(full) if has_full else None),
    **settings,
  )
  expected, expected_gradient = reference.self_distillation(
    x, full[0], hashes, (8, 48), positives=positives, **options
  )
  np.testing.assert_allclose(found, 0.5 * expected, rtol=1e-6)
  scale = np.abs(expected_gradient).max()
  np.testing.assert_allclose(gradient, 0.5 * expected_gradient, rtol=0, atol=1e-5 * scale)


@pytest.mark.parametrize("inbatch", [True, False])
def test_the_full_model_has_nothing_to_learn_from_itself(inbatch):
  x, hashes = random_states(2, 8, 5, 48), repeated_hashes(8, 5)
  x[0] = x[1]
  (first, last), gradient = divergence(x, hashes, (48,), losses__retrieval__inbatch=inbatch)
  # Zero but for the rounding of logits of 20.
  assert first == last == pytest.approx(0, abs=5e-6)
  # At another student the gradient is 0.1.
  assert np.abs(gradient).max() <= 1e-6
