"""Learning from a teacher's states, or from the full model itself. Arrays only.

Letters as in negatives.py.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mlembed_jax.matryoshka import truncate
from mlembed_jax.objective import tiles
from mlembed_jax.objective.negatives import Logits
from mlembed_jax.objective.similarity import Anchors, Candidates, Texts, divide, texts
from mlembed_jax.objective.tiles import SoftTargets


def match_exits(
  exits: Sequence[int], layers: int, teacher_exits: Sequence[int], teacher_layers: int, match: str
) -> tuple[int, ...]:
  """Returns the teacher exit that each student exit learns from; with `last` one for all.

  `depth_fraction`: the nearest share of its depth, ties to the deeper one. `index`: by position
  from the deepest, as the published code does, whose depths then differ.

  Raises:
    ValueError: exits are matched by position, and the teacher has fewer than the student.
  """
  if match == "last":
    return tuple(teacher_exits[-1:])
  if match == "index":
    if len(teacher_exits) < len(exits):
      raise ValueError(
        f"kd.match: the teacher has {len(teacher_exits)} exits for the student's {len(exits)}; "
        "use depth_fraction"
      )
    return tuple(teacher_exits[-len(exits) :])
  # Compared as integers: |t / L_t - l / L| over a common denominator.
  return tuple(
    min(teacher_exits, key=lambda t: (abs(t * layers - e * teacher_layers), -t)) for e in exits
  )


def distillation(
  student: Sequence[Array], teacher: Sequence[Array], space: str
) -> Float[Array, ""]:
  """Returns the distance of student states [..., d] to the teacher's first d columns.

  `student` and `teacher` are matching lists (queries, positives, negatives); their terms are
  added. Space `raw` is the mean squared error of un-normalised states, `unit` the mean squared
  distance of the normalised ones, 2 - 2 * cosine.
  """
  total = jnp.zeros(())
  for s, t in zip(student, teacher, strict=True):
    s, t = s.astype(jnp.float32), t[..., : s.shape[-1]].astype(jnp.float32)
    if space == "unit":
      total += jnp.mean(jnp.sum((truncate(s, None) - truncate(t, None)) ** 2, axis=-1))
    else:
      total += jnp.mean((s - t) ** 2)
  return total


def from_teacher(
  states_BCD: Float[Array, "B C D"], teacher_BCD: Float[Array, "B C D"], positives: int, space: str
) -> Float[Array, ""]:
  """Returns the distance of a batch's states at one exit to the teacher's.

  The teacher may know only the first texts of each row; the others are left out.
  """
  known = states_BCD[:, : teacher_BCD.shape[1]]
  student, teacher = (
    [part for part in jnp.split(x, (1, 1 + positives), axis=1) if part.shape[1]]
    for x in (known, jax.lax.stop_gradient(teacher_BCD))
  )
  return distillation(student, teacher, space)


def project(
  states_BCD: Float[Array, "B C D"], projection: Float[Array, "D D2"]
) -> Float[Array, "B C D2"]:
  """Returns states at the width of a teacher: a product in their dtype, summed in float32."""
  return jnp.matmul(
    states_BCD, projection.astype(states_BCD.dtype), preferred_element_type=jnp.float32
  )


def similarity_to(
  states_BCD: Float[Array, "B C D"],
  teacher_BCD: Float[Array, "B C2 D2"],
  ids_BC: Int[Array, "B C"],
  dims: Sequence[int],
  temperature: float,
) -> Float[Array, "M"]:
  """Returns KL(teacher || each dim) of a query's choice among the texts of other rows, a mean.

  The teacher chooses by its whole vectors, of any width. It may know only the first texts of each
  row, which then are the candidates. No gradient reaches it.
  """
  known = teacher_BCD.shape[1]
  who = _others(ids_BC[:, :known])
  student = _both(states_BCD[:, :known], dims, temperature)
  taught = _both(jax.lax.stop_gradient(teacher_BCD), teacher_BCD.shape[-1:], temperature)
  return jnp.mean(tiles.divergence(*student, *who, taught), axis=0)


def _both(x_BCD: Array, dims: Sequence[int], temperature: float) -> tuple[Texts, Texts]:
  """Returns the queries as anchors, and all texts as candidates."""
  found = texts(x_BCD, dims)
  candidates = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), found)
  return divide(found[:, 0], temperature), candidates


def _others(ids_BC: Int[Array, "B C"]) -> tuple[Anchors, Candidates]:
  """Returns who meets whom: queries, and the texts of other rows that are not equal to them."""
  B, C = ids_BC.shape
  row_B, none = jnp.arange(B, dtype=jnp.int32), jnp.zeros((B * C, 0), jnp.int32)
  candidates = Candidates(jnp.repeat(row_B, C), ids_BC.reshape(-1), none)
  return Anchors(row_B, ids_BC[:, 0], none[:B]), candidates


def _log_total(logits: Logits) -> Float[Array, "B M"]:
  """Returns the log-sum over positives and negatives of both kinds."""
  return jnp.logaddexp(
    jnp.logaddexp(jax.nn.logsumexp(logits.own, axis=1), logits.hard), logits.inbatch
  )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Choice:
  """A model's choice among the candidates of each row: those of the contrastive terms together."""

  own: Float[Array, "B P"]  # probabilities of the positives
  stored: Float[Array, "B K"]
  others: SoftTargets
  entropy: Float[Array, "B"]


def choice_of(full: Logits) -> Choice:
  """Returns the softmax over each row's candidates of a model's logits at one dim."""
  log_total = _log_total(full)[:, 0]
  choice = Choice(
    own=jnp.exp(full.own[..., 0] - log_total[:, None]),
    stored=jnp.where(full.keep, jnp.exp(full.stored[..., 0] - log_total[:, None]), 0.0),
    others=SoftTargets(full.texts.query, full.candidates, log_total),
    entropy=log_total,
  )
  return dataclasses.replace(choice, entropy=log_total - _expected(full, choice)[:, 0])


def _expected(logits: Logits, choice: Choice) -> Float[Array, "B M"]:
  """Returns the mean logit of a row's candidates under a choice."""
  total = jnp.sum(choice.own[..., None] * logits.own, axis=1)
  total += jnp.sum(choice.stored[..., None] * logits.stored, axis=1)
  if logits.pairing:
    total += tiles.expected_logits(
      logits.texts.query, logits.candidates, *logits.pairing, choice.others
    )
  return total


def self_distillation(student: Logits, full: Choice) -> Float[Array, "M"]:
  """Returns KL(full model || each dim) of the choice of a candidate, mean over rows.

  No gradient reaches the full model.
  """
  full = jax.lax.stop_gradient(full)
  cross_entropy = _log_total(student) - _expected(student, full)
  return jnp.mean(cross_entropy - full.entropy[:, None], axis=0)
