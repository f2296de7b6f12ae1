"""The objective of ML-Embed over all exits and output dims, and the terms beside it. Arrays only.

Letters: E exits, B rows of the global batch, C texts per row (query, P positives, K negatives),
D width, M output dims.

Cross-entropies are written as softplus(l - s): s is the logit of the positive, l the log-sum-exp
over its negatives alone. A row without negatives has l = EMPTY and loss 0, not a NaN.
"""

import dataclasses
import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from mlembed_jax.batch import Arrays, Kind
from mlembed_jax.config_fields import NO_LIMIT, KdConfig, LossesConfig
from mlembed_jax.matryoshka import Matryoshka, truncate
from mlembed_jax.objective import regularizers, tiles
from mlembed_jax.objective.distillation import (
  Choice,
  choice_of,
  from_teacher,
  project,
  self_distillation,
  similarity_to,
)
from mlembed_jax.objective.negatives import (
  Logits,
  Pairing,
  batch_logits,
  batch_pairings,
  cut_texts,
  flat,
  text_ids,
)
from mlembed_jax.objective.similarity import own_logits
from mlembed_jax.objective.tiles import EMPTY

Terms = dict[str, Float[Array, "M"]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Objective:
  """The loss, and its parts. Only the loss is differentiable."""

  loss: Float[Array, ""]
  terms: dict[str, Float[Array, "E"]]  # with their weights, summed over dims
  negatives: Float[Array, ""]  # per row, mean over rows; of scored pairs: rows of another score
  empty_rows: Float[Array, ""]  # rows without negatives


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Teachers:
  """States that the batch learns from; no gradient reaches them."""

  exits: Float[Array, "E B C D"] | None = None  # of the teacher, per student exit or one for all
  full: Float[Array, "1 B C D"] | None = None  # of the student, deepest exit at full rank


class Learnt(NamedTuple):
  """What the objective depends on beside states, with a gradient."""

  temperature: Any  # a scalar by which cosines are divided
  projection: Float[Array, "D D2"] | None = None  # to the width of the teacher


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Known:
  """Arrays of a batch that no gradient reaches."""

  ids: Int[Array, "B C"]
  pairings: tuple[Pairing, Pairing] | None  # both directions; None: of their own row alone
  scores: Float[Array, "B"] | None
  teacher: Float[Array, "X B C D"] | None  # X is E, or 1 for a teacher without exits
  choice: Choice | None = None  # the full model's, for self-distillation


@dataclasses.dataclass(frozen=True)
class LossSettings:
  """What the objective of a batch depends on beside arrays; programs are compiled for it."""

  kind: Kind
  axes: Matryoshka
  losses: LossesConfig
  kd: KdConfig


@dataclasses.dataclass(frozen=True)
class AtExit:
  """What a term may be computed from: the states of one exit, and all that is known beside them."""

  settings: LossSettings
  states_BCD: Float[Array, "B C D"]
  index: Int[Array, ""]  # of the exit
  learnt: Learnt
  known: Known

  def logits_of(self, states_BCD: Float[Array, "B C D"], dims: Sequence[int]) -> Logits:
    """Returns the logits of these or other states of the batch."""
    texts = cut_texts(states_BCD, dims, self.settings.kind.positives, self.learnt.temperature)
    losses, pairings = self.settings.losses, self.known.pairings
    return batch_logits(
      texts,
      self.known.ids,
      pairings and pairings[0],
      others_negatives=losses.inbatch_negatives,
      passage_grad=losses.inbatch_passage_grad,
    )

  @property
  def teacher(self) -> Float[Array, "B C2 D2"] | None:
    """The teacher's states at its exit for this one, of the first texts of each row."""
    if self.known.teacher is None:
      return None
    return self.known.teacher[jnp.minimum(self.index, len(self.known.teacher) - 1)]

  @functools.cached_property
  def logits(self) -> Logits:
    """The logits of the states at all output dims."""
    return self.logits_of(self.states_BCD, self.settings.axes.dims)


def main_terms(at: AtExit, logits: Logits) -> Terms:
  """Returns what the rows themselves teach: contrastive terms, or `scored`."""
  if at.known.scores is not None:
    return {"scored": cosent(logits.own[:, 0], at.known.scores)}
  if not at.known.pairings:
    return {"hard": _cross_entropy(logits.hard, logits.own)}
  losses = at.settings.losses
  symmetric = getattr(losses, at.settings.kind.task_type).symmetric
  return contrastive(logits, at.known.pairings[1] if symmetric else None, losses)


def _weighted_main_terms(at: AtExit) -> Terms:
  """Returns the main terms with their weight, none of texts alone."""
  weight = at.settings.losses.contrastive
  if not weight or at.settings.kind.is_text:
    return {}
  return {name: weight * term for name, term in main_terms(at, at.logits).items()}


def _quantized(quantize: Callable[[Array], Array], at: AtExit) -> Float[Array, "M"] | None:
  """Returns the sum of the main terms over quantised vectors; None where there are none."""
  weight = at.settings.losses.contrastive
  if not weight or at.settings.kind.is_text:
    return None
  logits = at.logits_of(quantize(at.states_BCD), at.settings.axes.dims)
  return weight * sum(main_terms(at, logits).values(), jnp.zeros(()))


def _spread_out(at: AtExit) -> Float[Array, "M"]:
  """Returns the mean over queries and first positives, each spread out among themselves."""
  terms = [
    regularizers.spread_out(at.states_BCD[:, i], at.known.ids[:, i], at.settings.axes.dims)
    for i in range(min(2, at.states_BCD.shape[1]))
  ]
  return sum(terms, jnp.zeros(())) / len(terms)


def _self_distillation(at: AtExit) -> Float[Array, "M"] | None:
  return self_distillation(at.logits, at.known.choice) if at.known.choice else None


def _distillation(at: AtExit) -> Float[Array, ""] | None:
  """Returns the distance to the teacher's states at its exit for this one."""
  if (teacher := at.teacher) is None:
    return None
  settings, states = at.settings, at.states_BCD
  if at.learnt.projection is not None:
    states = project(states, at.learnt.projection)
  return from_teacher(states, teacher, settings.kind.positives, settings.kd.space)


def _prefix(at: AtExit) -> Float[Array, "M"] | None:
  """Returns the distance of unit vectors at each dim to the teacher's leading coordinates."""
  if (teacher := at.teacher) is None:
    return None
  states, positives = at.states_BCD, at.settings.kind.positives
  cut = [from_teacher(states[..., :d], teacher, positives, "unit") for d in at.settings.axes.dims]
  return jnp.stack(cut)


def _similarity(at: AtExit) -> Float[Array, "M"] | None:
  if (teacher := at.teacher) is None:
    return None
  settings = at.settings
  return similarity_to(
    at.states_BCD, teacher, at.known.ids, settings.axes.dims, settings.kd.temperature
  )


class Term(NamedTuple):
  """A term beside the main ones. It is added where its weight is not 0."""

  weight: str  # the setting
  # Gives one number per dim, [M], or one for all, []; None where the batch has no such term.
  value: Callable[[AtExit], Array | None]


TERMS = {
  "int8": Term("losses.int8", functools.partial(_quantized, regularizers.int8)),
  "binary": Term("losses.binary", functools.partial(_quantized, regularizers.binary)),
  "spread_out": Term("losses.spread_out", _spread_out),
  "self_distillation": Term("losses.self_distillation", _self_distillation),
  "distillation": Term("kd.weight", _distillation),
  "prefix": Term("kd.prefix", _prefix),
  "similarity": Term("kd.similarity", _similarity),
}


def _loss_at(at: AtExit) -> tuple[Array, tuple[dict[str, Array], Array]]:
  """Returns (loss, (its terms, the number of each row's negatives))."""
  terms: dict[str, Any] = _weighted_main_terms(at)
  for name, term in TERMS.items():
    weight = operator.attrgetter(term.weight)(at.settings)
    if weight and (value := term.value(at)) is not None:
      terms[name] = weight * value
  weights_M = jnp.array(at.settings.axes.dim_weights)
  terms = {name: jnp.sum(x * weights_M) if x.ndim else x for name, x in terms.items()}
  count = _negatives(at)
  return sum(terms.values(), jnp.zeros(())), (terms, count)


def _negatives(at: AtExit) -> Float[Array, "B"]:
  """Returns how many negatives each row has; of texts alone, how many others there are."""
  if at.settings.kind.is_text:
    return partners(at.known.ids[:, 0])
  return at.logits.count if at.known.scores is None else partners(at.known.scores)


def objective(
  states_EBCD: Float[Array, "E B C D"],
  batch: Arrays,
  settings: LossSettings,
  learnt: Learnt,
  teachers: Teachers,
) -> Objective:
  """Returns the mean over exits of the sum of all terms, each a weighted sum over output dims.

  Args:
    states_EBCD: states after the final norm, not normalised.
    batch: arrays of B rows; hashes are read, and scores where the rows are scored pairs.
    settings: what the objective depends on beside arrays.
    learnt: the temperature and what else has a gradient beside the states.
    teachers: states to learn from.
  """
  learnt = learnt._replace(temperature=jnp.asarray(learnt.temperature, jnp.float32))
  known = _known(states_EBCD, batch, settings, teachers)
  if settings.losses.self_distillation and settings.losses.task(settings.kind.task_type):
    full = states_EBCD if teachers.full is None else teachers.full
    at = AtExit(settings, full[-1], jnp.int32(0), learnt, known)
    choice = choice_of(at.logits_of(full[-1], settings.axes.dims[-1:]))
    known = dataclasses.replace(known, choice=choice)
  result: Any = _mean_over_exits(settings, states_EBCD, learnt, jax.lax.stop_gradient(known))
  loss, (terms, counts) = result
  count_B = counts[0]  # the same at every exit
  return Objective(loss, terms, jnp.mean(count_B), jnp.sum(count_B == 0))


def _known(states_EBCD: Array, batch: Arrays, settings: LossSettings, teachers: Teachers) -> Known:
  ids_BC = text_ids(batch.hashes, settings.losses.mask_duplicates)
  if settings.kind.is_scored and batch.scores is None:
    raise ValueError(f"a batch of {settings.kind.task_type} without scores")
  return Known(
    ids=ids_BC,
    pairings=_pairings(states_EBCD, ids_BC, settings, teachers),
    scores=batch.scores if settings.kind.is_scored else None,
    teacher=teachers.exits if settings.kd.learns else None,
  )


def _pairings(
  states_EBCD: Array, ids_BC: Array, settings: LossSettings, teachers: Teachers
) -> tuple[Pairing, Pairing] | None:
  losses, kind = settings.losses, settings.kind
  if not (task := losses.task(kind.task_type)) or not task.inbatch:
    return None
  used = ids_BC.shape[1] if losses.inbatch_negatives else 1 + kind.positives
  judge = None
  if losses.false_negative_margin < NO_LIMIT:
    own = states_EBCD if teachers.full is None else teachers.full
    judges: Any = own if losses.false_negative_score == "own" else teachers.exits
    judge = truncate(judges[-1], None)
  return batch_pairings(ids_BC, kind.positives, used, judge, losses.false_negative_margin)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _mean_over_exits(
  settings: LossSettings, states_EBCD: Array, learnt: Learnt, known: Known
) -> Any:
  """Returns (the mean loss over exits, what else `_loss_at` returns of each exit, stacked).

  The gradient of an exit is taken together with its value. So memory holds what one exit needs,
  not what all of them keep from the forward to the backward pass.
  """

  def each(numbered: tuple[Array, Array]) -> Any:
    return _loss_at(AtExit(settings, *numbered, learnt, known))

  values, others = jax.lax.map(each, _numbered(states_EBCD))
  return jnp.mean(values), others


def _mean_over_exits_fwd(
  settings: LossSettings, states_EBCD: Array, learnt: Learnt, known: Known
) -> Any:
  def share(states_BCD: Array, learnt: Learnt, index: Array) -> tuple[Array, Any]:
    value, others = _loss_at(AtExit(settings, states_BCD, index, learnt, known))
    # As the value is divided here, the gradients need no further pass over them: the cotangent of
    # the mean is 1.
    return value / len(states_EBCD), others

  def each(total: Learnt, numbered: tuple[Array, Array]) -> Any:
    both = jax.value_and_grad(share, argnums=(0, 1), has_aux=True)
    value, (d_states, d_learnt) = both(numbered[0], learnt, numbered[1])
    return jax.tree.map(jnp.add, total, d_learnt), (value, d_states)

  zeros = jax.tree.map(jnp.zeros_like, learnt)
  d_learnt, ((shares, others), d_states) = jax.lax.scan(each, zeros, _numbered(states_EBCD))
  return (jnp.sum(shares), others), (d_states, d_learnt)


def _mean_over_exits_bwd(
  settings: LossSettings, gradients: tuple[Array, Learnt], cotangents: Any
) -> Any:
  return *jax.tree.map(lambda x: (x * cotangents[0]).astype(x.dtype), gradients), None


_mean_over_exits.defvjp(_mean_over_exits_fwd, _mean_over_exits_bwd)


def _numbered(states_EBCD: Array) -> tuple[Array, Array]:
  return states_EBCD, jnp.arange(len(states_EBCD))


def _cross_entropy(negatives_BM: Array, own_BPM: Array) -> Float[Array, "M"]:
  """Returns the mean over rows and positives."""
  return jnp.mean(jax.nn.softplus(negatives_BM[:, None] - own_BPM), axis=(0, 1))


def contrastive(logits: Logits, backward: Pairing | None, config: LossesConfig) -> Terms:
  """Returns the terms `hard` and `inbatch`; a joint softmax counts as `inbatch`.

  `backward` asks for the mean of both directions, query to passage and passage to query.
  """
  query, positives, own = logits.texts.query, logits.texts.positives, logits.own
  if not config.inbatch_passage_grad:
    positives = jax.lax.stop_gradient(positives)
    own = own_logits(query, positives)
  if config.softmax == "joint":
    terms = {"inbatch": _cross_entropy(jnp.logaddexp(logits.hard, logits.inbatch), logits.own)}
  else:
    hard = _cross_entropy(logits.hard, logits.own)
    terms = {"hard": hard, "inbatch": _cross_entropy(logits.inbatch, own)}
  if backward:
    others, _ = tiles.log_sum_exp(flat(positives), query, *backward)
    back = jnp.mean(jax.nn.softplus(others.reshape(own.shape) - own), axis=(0, 1))
    terms["inbatch"] = (terms["inbatch"] + back) / 2
  return terms


def partners(scores_B: Shaped[Array, "B"]) -> Float[Array, "B"]:
  """Returns how many rows have another score, or other number, than each row."""
  ordered = jnp.sort(scores_B)
  first, last = (jnp.searchsorted(ordered, scores_B, side=side) for side in ("left", "right"))
  return (len(scores_B) - (last - first)).astype(jnp.float32)


def cosent(logits_BM: Float[Array, "B M"], scores_B: Float[Array, "B"]) -> Float[Array, "M"]:
  """Returns log(1 + sum of exp(logit_j - logit_i)) over all pairs of rows with score_i > score_j.

  After sorting by score the sum over j is a cumulative one, so no pair is ever written down.
  Source: CoSENT (kexue.fm/archives/8847).
  """
  order = jnp.argsort(scores_B)
  x, scores = logits_BM[order], scores_B[order]
  lower = jnp.searchsorted(scores, scores, side="left")  # rows with a strictly lower score
  sums = jax.lax.cumlogsumexp(x, axis=0)[jnp.maximum(lower - 1, 0)]
  pairs = jnp.where((lower > 0)[:, None], sums - x, tiles.MASKED)
  return jax.nn.softplus(jnp.maximum(jax.nn.logsumexp(pairs, axis=0), EMPTY))
