"""The objective of ML-Embed over all exits and output dims, and the terms beside it. Arrays only.

Letters: E exits, B rows of the global batch, C texts per row (query, P positives, K negatives),
D width, M output dims.

Cross-entropies are written as softplus(l - s): s is the logit of the positive, l the log-sum-exp
over its negatives alone. A row without negatives has l = EMPTY and loss 0, not a NaN.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mlembed_jax import regularizers, streaming
from mlembed_jax.config import KdConfig, LossesConfig
from mlembed_jax.contrast import (
  Contrast,
  Keys,
  batch_keys,
  contrast,
  flat,
  make_views,
  text_ids,
)
from mlembed_jax.distillation import by_exit, self_distillation
from mlembed_jax.matryoshka import Matryoshka, truncate
from mlembed_jax.similarity import own_logits
from mlembed_jax.streaming import EMPTY

NO_LIMIT = 2.0  # no two cosines are further apart

Terms = dict[str, Float[Array, "E M"]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Objective:
  """The loss, and its parts."""

  loss: Float[Array, ""]
  terms: dict[str, Float[Array, "E"]]  # with their weights, summed over dims
  negatives: Float[Array, ""]  # candidates beside the positive, mean over rows
  empty_rows: Float[Array, ""]  # rows with nothing to tell their positive from


@dataclasses.dataclass(frozen=True)
class Task:
  """What is static of a batch."""

  kind: str  # task type
  positives: int = 1  # per row


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Teachers:
  """States that the batch learns from; no gradient reaches them."""

  exits: Float[Array, "E B C D"] | None = None  # of the teacher, per student exit or one for all
  full: Float[Array, "1 B C D"] | None = None  # of the student, deepest exit at full rank


def objective(
  states_EBCD: Float[Array, "E B C D"],
  batch: Mapping[str, Array],
  *,
  task: Task,
  axes: Matryoshka,
  config: LossesConfig,
  kd: KdConfig,
  temperature: Any,
  teachers: Teachers,
) -> Objective:
  """Returns the mean over exits of the sum of all terms, each a weighted sum over output dims.

  `states` are final-norm states, not normalised. `batch` holds `hashes` [B, C, 2], and `scores`
  [B] for scored pairs.
  """
  ids_BC = text_ids(batch["hashes"], config.mask_duplicates)
  keys = _keys(states_EBCD, ids_BC, task, config, teachers)

  def contrasted(states: Array, dims: Sequence[int]) -> Contrast:
    views = make_views(states, dims, task.positives, temperature)
    met = config.inbatch_negatives, config.inbatch_passage_grad
    return contrast(views, ids_BC, keys and keys[0], *met)

  c = contrasted(states_EBCD, axes.dims)
  terms = _main_terms(c, batch, keys, task, config)
  for name, quantize in regularizers.QUANTIZERS.items():
    if weight := getattr(config, name):
      quantized = contrasted(quantize(states_EBCD), axes.dims)
      terms[name] = weight * sum(_main_terms(quantized, batch, keys, task, config).values())
  if config.spread_out:
    columns = [
      regularizers.spread_out(states_EBCD[:, :, i], ids_BC[:, i], axes.dims) for i in (0, 1)
    ]
    terms["spread_out"] = config.spread_out * (columns[0] + columns[1]) / 2
  if config.self_distillation:
    full = states_EBCD[-1:] if teachers.full is None else teachers.full
    divergence = self_distillation(c, contrasted(full, axes.dims[-1:]))
    terms["self_distillation"] = config.self_distillation * divergence
  return _summed(terms, c, axes, _distillation(states_EBCD, task, kd, teachers))


def _keys(
  states_EBCD: Array, ids_BC: Array, task: Task, config: LossesConfig, teachers: Teachers
) -> tuple[Keys, Keys] | None:
  """Returns who meets whom in both directions; None where rows learn from their own texts alone."""
  if not (settings := config.task(task.kind)) or not settings.inbatch:
    return None
  used = ids_BC.shape[1] if config.inbatch_negatives else 1 + task.positives
  guide = None
  if config.false_negative_margin < NO_LIMIT:
    judge = states_EBCD if config.false_negative_score == "own" else teachers.exits
    # A file without stored teacher vectors is trained without a limit.
    guide = None if judge is None else truncate(jax.lax.stop_gradient(judge[-1]), None)
  return batch_keys(ids_BC, task.positives, used, guide, config.false_negative_margin)


def _main_terms(
  c: Contrast,
  batch: Mapping[str, Array],
  keys: tuple[Keys, Keys] | None,
  task: Task,
  config: LossesConfig,
) -> Terms:
  if not (settings := config.task(task.kind)):
    return {"scored": cosent(c.own[:, :, 0], batch["scores"])}
  if not keys:
    return {"hard": _cross_entropy(c.hard, c.own)}
  return contrastive(c, keys[1] if settings.symmetric else None, config)


def _distillation(
  states_EBCD: Array, task: Task, kd: KdConfig, teachers: Teachers
) -> dict[str, Float[Array, "E"]]:
  if teachers.exits is None:
    return {}
  return {
    "distillation": kd.weight * by_exit(states_EBCD, teachers.exits, task.positives, kd.space)
  }


def _summed(
  terms: Terms, c: Contrast, axes: Matryoshka, others: dict[str, Float[Array, "E"]]
) -> Objective:
  weights_1M = jnp.array(axes.dim_weights)[None]
  parts = {name: jnp.sum(term * weights_1M, axis=1) for name, term in terms.items()} | others
  loss = jnp.mean(sum(parts.values(), jnp.zeros(len(axes.exits))))
  return Objective(loss, parts, jnp.mean(c.count), jnp.sum(c.count == 0))


def _cross_entropy(negatives_EBM: Array, own_EBPM: Array) -> Float[Array, "E M"]:
  """Returns the mean over rows and positives."""
  return jnp.mean(jax.nn.softplus(negatives_EBM[:, :, None] - own_EBPM), axis=(1, 2))


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
    back = jnp.mean(jax.nn.softplus(others.reshape(own.shape) - own), axis=(1, 2))
    terms["inbatch"] = (terms["inbatch"] + back) / 2
  return terms


def cosent(logits_EBM: Float[Array, "E B M"], scores_B: Float[Array, "B"]) -> Float[Array, "E M"]:
  """Returns log(1 + sum of exp(logit_j - logit_i)) over all pairs of rows with score_i > score_j.

  After sorting by score the sum over j is a cumulative one, so no pair is ever written down.
  Source: CoSENT (kexue.fm/archives/8847).
  """
  order = jnp.argsort(scores_B)
  x, scores = logits_EBM[:, order], scores_B[order]
  lower = jnp.searchsorted(scores, scores, side="left")  # rows with a strictly lower score
  sums = jax.lax.cumlogsumexp(x, axis=1)[:, jnp.maximum(lower - 1, 0)]
  pairs = jnp.where((lower > 0)[None, :, None], sums - x, streaming.MASKED)
  return jax.nn.softplus(jnp.maximum(jax.nn.logsumexp(pairs, axis=1), EMPTY))
