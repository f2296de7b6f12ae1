"""The objective of ML-Embed over all exits and output dims, and the terms beside it. Arrays only.

Letters: E exits, B rows of the global batch, C texts per row (query, P positives, K negatives),
D width, M output dims.

Cross-entropies are written as softplus(l - s): s is the logit of the positive, l the log-sum-exp
over its negatives alone. A row without negatives has l = EMPTY and loss 0, not a NaN.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mlembed_jax.batch import Arrays, Kind
from mlembed_jax.config_fields import NO_LIMIT, KdConfig, LossesConfig
from mlembed_jax.matryoshka import Matryoshka, truncate
from mlembed_jax.objective import regularizers, streaming
from mlembed_jax.objective.contrast import (
  Contrast,
  Keys,
  batch_keys,
  contrast,
  flat,
  make_views,
  text_ids,
)
from mlembed_jax.objective.distillation import Choice, choice_of, from_teacher, self_distillation
from mlembed_jax.objective.similarity import own_logits
from mlembed_jax.objective.streaming import EMPTY

Terms = dict[str, Float[Array, "M"]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Objective:
  """The loss, and its parts. Only the loss is differentiable."""

  loss: Float[Array, ""]
  terms: dict[str, Float[Array, "E"]]  # with their weights, summed over dims
  negatives: Float[Array, ""]  # texts that a row tells its positive from, mean over rows;
  #                              of scored pairs: rows of another score
  empty_rows: Float[Array, ""]  # rows without any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Teachers:
  """States that the batch learns from; no gradient reaches them."""

  exits: Float[Array, "E B C D"] | None = None  # of the teacher, per student exit or one for all
  full: Float[Array, "1 B C D"] | None = None  # of the student, deepest exit at full rank


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Known:
  """Arrays of a batch that no gradient reaches."""

  ids: Int[Array, "B C"]
  keys: tuple[Keys, Keys] | None  # both directions; None: rows learn from their own texts alone
  scores: Float[Array, "B"] | None
  teacher: Float[Array, "X B C D"] | None  # X is E, or 1 for a teacher without exits
  choice: Choice | None = None  # the full model's, for self-distillation


@dataclasses.dataclass(frozen=True)
class _Exit:
  """The loss of one exit."""

  kind: Kind
  axes: Matryoshka
  config: LossesConfig
  kd: KdConfig

  def __call__(
    self, states_BCD: Array, temperature: Array, known: _Known, index: Array
  ) -> tuple[Array, tuple[dict[str, Array], Array]]:
    """Returns (loss, (its terms, the number of each row's negatives))."""
    c = self.contrasted(states_BCD, self.axes.dims, temperature, known)
    by_dim = self.main_terms(c, known)
    for name, quantize in regularizers.QUANTIZERS.items():
      if weight := getattr(self.config, name):
        quantized = self.contrasted(quantize(states_BCD), self.axes.dims, temperature, known)
        by_dim[name] = weight * sum(self.main_terms(quantized, known).values())
    if weight := self.config.spread_out:
      by_dim["spread_out"] = weight * self.spread_out(states_BCD, known)
    if known.choice:
      divergence = self_distillation(c, known.choice)
      by_dim["self_distillation"] = self.config.self_distillation * divergence
    weights_M = jnp.array(self.axes.dim_weights)
    terms = {name: jnp.sum(term_M * weights_M) for name, term_M in by_dim.items()}
    if known.teacher is not None:
      teacher = known.teacher[jnp.minimum(index, len(known.teacher) - 1)]
      distance = from_teacher(states_BCD, teacher, self.kind.positives, self.kd.space)
      terms["distillation"] = self.kd.weight * distance
    count = c.count if known.scores is None else partners(known.scores)
    return sum(terms.values(), jnp.zeros(())), (terms, count)

  def contrasted(
    self, states_BCD: Array, dims: Sequence[int], temperature: Array, known: _Known
  ) -> Contrast:
    views = make_views(states_BCD, dims, self.kind.positives, temperature)
    met = self.config.inbatch_negatives, self.config.inbatch_passage_grad
    return contrast(views, known.ids, known.keys and known.keys[0], *met)

  def main_terms(self, c: Contrast, known: _Known) -> Terms:
    if known.scores is not None:
      return {"scored": cosent(c.own[:, 0], known.scores)}
    if not known.keys:
      return {"hard": _cross_entropy(c.hard, c.own)}
    symmetric = getattr(self.config, self.kind.task_type).symmetric
    return contrastive(c, known.keys[1] if symmetric else None, self.config)

  def spread_out(self, states_BCD: Array, known: _Known) -> Float[Array, "M"]:
    """Returns the mean over queries and first positives, each spread out among themselves."""
    queries, positives = (
      regularizers.spread_out(states_BCD[:, i], known.ids[:, i], self.axes.dims) for i in (0, 1)
    )
    return (queries + positives) / 2


def objective(
  states_EBCD: Float[Array, "E B C D"],
  batch: Arrays,
  *,
  kind: Kind,
  axes: Matryoshka,
  config: LossesConfig,
  kd: KdConfig,
  temperature: Any,
  teachers: Teachers,
) -> Objective:
  """Returns the mean over exits of the sum of all terms, each a weighted sum over output dims.

  `states` are final-norm states, not normalised. Of `batch` the hashes are read, and the
  scores where the rows are scored pairs.
  """
  each, temperature = _Exit(kind, axes, config, kd), jnp.asarray(temperature, jnp.float32)
  known = _known(states_EBCD, batch, kind, config, kd, teachers)
  if config.self_distillation and known.scores is None:
    full = states_EBCD if teachers.full is None else teachers.full
    c = each.contrasted(full[-1], axes.dims[-1:], temperature, known)
    known = dataclasses.replace(known, choice=choice_of(c))
  result: Any = _mean_over_exits(each, states_EBCD, temperature, jax.lax.stop_gradient(known))
  loss, (terms, counts) = result
  count_B = counts[0]  # the same at every exit
  return Objective(loss, terms, jnp.mean(count_B), jnp.sum(count_B == 0))


def _known(
  states_EBCD: Array,
  batch: Arrays,
  kind: Kind,
  config: LossesConfig,
  kd: KdConfig,
  teachers: Teachers,
) -> _Known:
  ids_BC = text_ids(batch.hashes, config.mask_duplicates)
  return _Known(
    ids=ids_BC,
    keys=_keys(states_EBCD, ids_BC, kind, config, teachers),
    scores=None if config.task(kind.task_type) else batch.scores,
    teacher=teachers.exits if kd.weight else None,
  )


def _keys(
  states_EBCD: Array, ids_BC: Array, kind: Kind, config: LossesConfig, teachers: Teachers
) -> tuple[Keys, Keys] | None:
  if not (settings := config.task(kind.task_type)) or not settings.inbatch:
    return None
  used = ids_BC.shape[1] if config.inbatch_negatives else 1 + kind.positives
  guide = None
  if config.false_negative_margin < NO_LIMIT:
    own = states_EBCD if teachers.full is None else teachers.full
    judge: Any = own if config.false_negative_score == "own" else teachers.exits
    guide = truncate(judge[-1, ..., : states_EBCD.shape[-1]], None)
  return batch_keys(ids_BC, kind.positives, used, guide, config.false_negative_margin)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _mean_over_exits(loss: _Exit, states_EBCD: Array, temperature: Array, known: _Known) -> Any:
  """Returns (the mean of `loss` over exits, what else it returns of each exit, stacked).

  The gradient of an exit is taken together with its value. So memory holds what one exit needs,
  not what all of them keep from the forward to the backward pass.
  """
  each = lambda x: loss(x[0], temperature, known, x[1])  # noqa: E731
  values, others = jax.lax.map(each, _numbered(states_EBCD))
  return jnp.mean(values), others


def _mean_over_exits_fwd(loss: _Exit, states_EBCD: Array, temperature: Array, known: _Known) -> Any:
  def share(*args: Any) -> tuple[Array, Any]:
    value, others = loss(*args)
    # Divided here, the gradients need no further pass over them: the cotangent of the mean is 1.
    return value / len(states_EBCD), others

  both = jax.value_and_grad(share, argnums=(0, 1), has_aux=True)
  each = lambda x: both(x[0], temperature, known, x[1])  # noqa: E731
  (shares, others), (d_states, d_temperature) = jax.lax.map(each, _numbered(states_EBCD))
  return (jnp.sum(shares), others), (d_states, jnp.sum(d_temperature))


def _mean_over_exits_bwd(loss: _Exit, gradients: tuple[Array, Array], cotangents: Any) -> Any:
  return *jax.tree.map(lambda x: (x * cotangents[0]).astype(x.dtype), gradients), None


_mean_over_exits.defvjp(_mean_over_exits_fwd, _mean_over_exits_bwd)


def _numbered(states_EBCD: Array) -> tuple[Array, Array]:
  return states_EBCD, jnp.arange(len(states_EBCD))


def _cross_entropy(negatives_BM: Array, own_BPM: Array) -> Float[Array, "M"]:
  """Returns the mean over rows and positives."""
  return jnp.mean(jax.nn.softplus(negatives_BM[:, None] - own_BPM), axis=(0, 1))


def contrastive(c: Contrast, backward: Keys | None, config: LossesConfig) -> Terms:
  """Returns the terms `hard` and `inbatch`; a joint softmax counts as `inbatch`.

  `backward` asks for the mean of both directions, query to passage and passage to query.
  """
  positives, own = c.views.positives, c.own
  if not config.inbatch_passage_grad:
    positives = jax.lax.stop_gradient(positives)
    own = own_logits(c.views.query, positives)
  if config.softmax == "joint":
    terms = {"inbatch": _cross_entropy(jnp.logaddexp(c.hard, c.inbatch), c.own)}
  else:
    terms = {"hard": _cross_entropy(c.hard, c.own), "inbatch": _cross_entropy(c.inbatch, own)}
  if backward:
    others, _ = streaming.log_sum_exp(flat(positives), c.views.query, *backward)
    back = jnp.mean(jax.nn.softplus(others.reshape(own.shape) - own), axis=(0, 1))
    terms["inbatch"] = (terms["inbatch"] + back) / 2
  return terms


def partners(scores_B: Float[Array, "B"]) -> Float[Array, "B"]:
  """Returns how many rows have another score than each row."""
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
  pairs = jnp.where((lower > 0)[:, None], sums - x, streaming.MASKED)
  return jax.nn.softplus(jnp.maximum(jax.nn.logsumexp(pairs, axis=0), EMPTY))
