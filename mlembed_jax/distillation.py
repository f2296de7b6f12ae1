"""Learning from a teacher's states, or from the full model itself. Arrays only.

Letters as in contrast.py.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mlembed_jax import streaming
from mlembed_jax.contrast import Contrast
from mlembed_jax.matryoshka import truncate


def match_exits(
  exits: Sequence[int], layers: int, teacher_exits: Sequence[int], teacher_layers: int, match: str
) -> tuple[int, ...]:
  """Returns the teacher exit that each student exit learns from.

  `depth_fraction`: the nearest share of its depth, ties to the deeper one. `index`: by position
  from the deepest, as the published code does, whose depths then differ.

  Raises:
    ValueError: by position, and the teacher has fewer exits.
  """
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


def by_exit(
  states_EBCD: Float[Array, "E B C D"],
  teacher_XBCD: Float[Array, "X B C D"],
  positives: int,
  space: str,
) -> Float[Array, "E"]:
  """Returns the distance of each exit to its teacher; X is E, or 1 for a teacher without exits.

  The teacher may know fewer texts of a row than there are: those stand first.
  """
  known = teacher_XBCD.shape[2]
  teacher = jnp.broadcast_to(teacher_XBCD, (len(states_EBCD), *teacher_XBCD.shape[1:]))

  def one(s_BCD: Array, t_BCD: Array) -> Array:
    student, teacher = (
      [part for part in jnp.split(x, (1, 1 + positives), axis=1) if part.shape[1]]
      for x in (s_BCD[:, :known], t_BCD)
    )
    return distillation(student, teacher, space)

  return jax.vmap(one)(states_EBCD, jax.lax.stop_gradient(teacher))


def _log_total(c: Contrast) -> Float[Array, "E B M"]:
  """Returns the log-sum over positives and negatives of both kinds."""
  return jnp.logaddexp(jnp.logaddexp(jax.nn.logsumexp(c.own, axis=2), c.hard), c.inbatch)


def self_distillation(student: Contrast, full: Contrast) -> Float[Array, "E M"]:
  """Returns KL(full model || each exit and dim) of the choice among a row's candidates.

  Candidates are those of the contrastive terms together. `full` has one exit and one dim; no
  gradient reaches it. Mean over rows.
  """
  full = jax.lax.stop_gradient(full)
  log_total = _log_total(full)[0, :, 0]
  own_BP = jnp.exp(full.own[0, ..., 0] - log_total[:, None])
  stored_BK = jnp.exp(full.stored[0, ..., 0] - log_total[:, None]) * full.keep

  def expected(c: Contrast) -> Float[Array, "E B M"]:
    total = jnp.sum(own_BP[None, :, :, None] * c.own, axis=2)
    total += jnp.sum(stored_BK[None, :, :, None] * c.stored, axis=2)
    if c.keys:
      targets = streaming.SoftTargets(full.views.query[0], full.met[0], log_total)
      total += streaming.expected_logits(c.views.query, c.met, *c.keys, targets)
    return total

  entropy = log_total - expected(full)[0, :, 0]
  return jnp.mean(_log_total(student) - expected(student) - entropy[None, :, None], axis=1)
