"""The contrastive objective of ML-Embed over all exits and output dims. Takes arrays only.

Letters: E exits, B rows of the global batch, C texts per row (query, positive, negatives...),
D width, M an output dim. Arrays are global: the compiler adds the gathers between devices and
differentiates them, so passages learn from the queries of every device.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, UInt32

from mlembed_jax.matryoshka import truncate


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Objective:
  """The loss and its two parts at each exit, summed over dims with their weights."""

  loss: Float[Array, ""]
  hard_E: Float[Array, "E"]
  inbatch_E: Float[Array, "E"]


def cosines(equation: str, *vectors: Array) -> Array:
  """Returns the einsum in full float32; on TPU the default would round its inputs to bfloat16."""
  return jnp.einsum(equation, *vectors, precision=jax.lax.Precision.HIGHEST)


def cross_entropy(logits: Float[Array, "E B C"], keep: Bool[Array, "B C"], target: Array) -> Array:
  """Returns the cross-entropy of each row, [E, B]; candidates with keep=False leave the softmax."""
  logits = jnp.where(keep[None], logits, -jnp.inf)
  chosen = jnp.take_along_axis(logits, target[None, :, None], axis=-1)[..., 0]
  return jax.nn.logsumexp(logits, axis=-1) - chosen


def hard_rows(
  q_EBM: Float[Array, "E B M"],
  docs_EBCM: Float[Array, "E B C M"],
  keep_BC: Bool[Array, "B C"],
  temperature: float,
) -> Float[Array, "E B"]:
  """Returns each row's loss of choosing its positive (document 0) among its own documents."""
  logits_EBC = cosines("EBM,EBCM->EBC", q_EBM, docs_EBCM) / temperature
  return cross_entropy(logits_EBC, keep_BC, jnp.zeros(keep_BC.shape[0], jnp.int32))


def inbatch_rows(
  q_EBM: Float[Array, "E B M"],
  p_EBM: Float[Array, "E B M"],
  keep_BB: Bool[Array, "B B"],
  temperature: float,
) -> Float[Array, "E B"]:
  """Returns each row's loss of choosing its positive among the positives of the global batch."""
  logits_EBB = cosines("EBM,ECM->EBC", q_EBM, p_EBM) / temperature
  return cross_entropy(logits_EBB, keep_BB, jnp.arange(keep_BB.shape[0]))


def duplicate_masks(
  hashes_BC2: UInt32[Array, "B C 2"], masked: bool
) -> tuple[Bool[Array, "B K"], Bool[Array, "B B"]]:
  """Returns which own documents and which positives of the batch may be candidates of each row.

  A candidate that is not the row's own positive is left out where its text equals the row's
  positive or query, and a positive also where its row has the same query. With masked=False
  everything is a candidate.
  """
  B, C, _ = hashes_BC2.shape
  if not masked:
    return jnp.ones((B, C - 1), bool), jnp.ones((B, B), bool)
  query_B2, docs_BK2, positive_B2 = hashes_BC2[:, 0], hashes_BC2[:, 1:], hashes_BC2[:, 1]
  hard_same = _same(docs_BK2, positive_B2[:, None]) | _same(docs_BK2, query_B2[:, None])
  candidate_1B2 = positive_B2[None]
  inbatch_same = (
    _same(candidate_1B2, positive_B2[:, None])
    | _same(candidate_1B2, query_B2[:, None])
    | _same(query_B2[None], query_B2[:, None])
  )
  own_BK = jnp.broadcast_to(jnp.arange(C - 1)[None] == 0, (B, C - 1))
  return ~hard_same | own_BK, ~inbatch_same | jnp.eye(B, dtype=bool)


def _same(a: Array, b: Array) -> Array:
  return jnp.all(a == b, axis=-1)


def objective(
  states_EBCD: Float[Array, "E B C D"],
  hashes_BC2: UInt32[Array, "B C 2"],
  *,
  dims: Sequence[int],
  dim_weights: Sequence[float],
  temperature: float,
  inbatch: bool,
  inbatch_passage_grad: bool,
  mask_duplicates: bool,
) -> Objective:
  """Returns mean over exits of (hard + in-batch), each a weighted sum over output dims.

  `states` are final-norm states, not normalised. `inbatch=False` (clustering, classification)
  leaves the hard term alone; without stored negatives the hard term is zero.
  """
  hard_keep_BK, inbatch_keep_BB = duplicate_masks(hashes_BC2, mask_duplicates)
  hard_E = inbatch_E = jnp.zeros(states_EBCD.shape[0])
  for dim, weight in zip(dims, dim_weights, strict=True):
    unit_EBCM = truncate(states_EBCD, dim)
    q_EBM, docs_EBKM = unit_EBCM[:, :, 0], unit_EBCM[:, :, 1:]
    rows_EB = hard_rows(q_EBM, docs_EBKM, hard_keep_BK, temperature)
    hard_E += weight * jnp.mean(rows_EB, axis=-1)
    if inbatch:
      p_EBM = docs_EBKM[:, :, 0]
      p_EBM = p_EBM if inbatch_passage_grad else jax.lax.stop_gradient(p_EBM)
      rows_EB = inbatch_rows(q_EBM, p_EBM, inbatch_keep_BB, temperature)
      inbatch_E += weight * jnp.mean(rows_EB, axis=-1)
  return Objective(jnp.mean(hard_E + inbatch_E), hard_E, inbatch_E)


def distillation(student: Sequence[Any], teacher: Sequence[Any], space: str) -> Float[Array, ""]:
  """Returns the distance of student states [..., d] to the teacher's first d columns.

  `student` and `teacher` are matching lists (queries, positives, negatives); their terms are
  added. Space `raw` is the mean squared error of un-normalised states, `unit` the mean squared
  distance of the normalised ones.
  """
  total = jnp.zeros(())
  for s, t in zip(student, teacher, strict=True):
    t = t[..., : s.shape[-1]]
    if space == "unit":
      total += jnp.mean(jnp.sum((truncate(s, None) - truncate(t, None)) ** 2, axis=-1))
    else:
      total += jnp.mean((s - t) ** 2)
  return total
