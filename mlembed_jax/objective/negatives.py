"""The logits of a batch: which texts are each other's negatives, and sums over them. Arrays only.

Letters: B rows of the global batch, C texts per row (query, P positives, K negatives),
D width, M output dims, N candidates. Arrays are global: passages learn from the queries of every
device.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

from mlembed_jax.objective import tiles
from mlembed_jax.objective.similarity import Anchors, Candidates, Texts, divide, own_logits, texts
from mlembed_jax.objective.tiles import EMPTY

Pairing = tuple[Anchors, Candidates]


def text_ids(hashes_BC2: UInt32[Array, "B C 2"], masked: bool) -> Int[Array, "B C"]:
  """Returns a number per text, the same for equal texts; with masked=False all are different.

  64-bit integers do not exist on the device, and one comparison per pair is cheaper than two.
  """
  B, C, _ = hashes_BC2.shape
  if not masked:
    return jnp.arange(B * C, dtype=jnp.int32).reshape(B, C)
  low, high = hashes_BC2.reshape(-1, 2).T
  order = jnp.lexsort((low, high))
  low, high = low[order], high[order]
  is_new = jnp.concatenate([jnp.ones(1, bool), (low[1:] != low[:-1]) | (high[1:] != high[:-1])])
  ids = jnp.zeros(B * C, jnp.int32).at[order].set(jnp.cumsum(is_new, dtype=jnp.int32))
  return ids.reshape(B, C)


def stored_keep(ids_BC: Int[Array, "B C"], positives: int) -> Bool[Array, "B K"]:
  """Returns which stored negatives are negatives: neither the row's query nor a positive."""
  own_BX, negatives_BK = ids_BC[:, : 1 + positives], ids_BC[:, 1 + positives :]
  return ~jnp.any(negatives_BK[:, :, None] == own_BX[:, None], axis=-1)


def batch_pairings(
  ids_BC: Int[Array, "B C"],
  positives: int,
  used: int,
  judge_BCD: Float[Array, "B C D"] | None = None,
  margin: float = 0.0,
) -> tuple[Pairing, Pairing]:
  """Returns who meets whom: queries and passages, and the way back, positives and queries.

  The first `used` texts of a row stand in the batch, its query included. `judge` are unit vectors:
  a candidate whose cosine with the query is `margin` above the positive's is not a negative.
  """
  row_B, query_B = jnp.arange(len(ids_BC), dtype=jnp.int32), ids_BC[:, 0]
  own_BP, documents_BK = ids_BC[:, 1 : 1 + positives], ids_BC[:, 1:used]

  def repeated(x: Array, texts_BK: Array) -> Array:
    return jnp.repeat(x, texts_BK.shape[1], axis=0)

  forward = (
    Anchors(row_B, query_B, own_BP),
    Candidates(
      repeated(row_B, documents_BK),
      _rows(documents_BK),
      repeated(query_B, documents_BK)[:, None],
    ),
  )
  backward = (
    Anchors(repeated(row_B, own_BP), _rows(own_BP), repeated(query_B, own_BP)[:, None]),
    Candidates(row_B, query_B, own_BP),
  )
  if judge_BCD is None:
    return forward, backward
  query, passages = judge_BCD[:, 0], judge_BCD[:, 1 : 1 + positives]
  limit_B = jnp.max(jnp.sum(query[:, None] * passages, axis=-1), axis=1) + margin
  judged = dataclasses.replace
  return (
    judged(forward[0], judge=query, limit=limit_B),
    judged(forward[1], judge=_rows(judge_BCD[:, 1:used])),
  ), (
    judged(backward[0], judge=_rows(passages), limit=repeated(limit_B, own_BP)),
    judged(backward[1], judge=query),
  )


def _rows(x: Array) -> Array:
  """Returns [B, K, ...] as [B * K, ...]."""
  return x.reshape(-1, *x.shape[2:])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CutTexts:
  """The three kinds of text of a batch, cut at the dims; queries carry 1 / temperature."""

  query: Texts  # [B, ...]
  positives: Texts  # [B, P, ...]
  negatives: Texts  # [B, K, ...]


def cut_texts(
  states_BCD: Float[Array, "B C D"], dims: Sequence[int], positives: int, temperature: Any
) -> CutTexts:
  """Returns the texts of a batch; `states` are not normalised."""
  # split, not slices: its transpose is one concatenation instead of a sum of padded arrays.
  query, positive, negative = jnp.split(states_BCD, (1, 1 + positives), axis=1)
  return CutTexts(
    divide(texts(query[:, 0], dims), temperature), texts(positive, dims), texts(negative, dims)
  )


def flat(*groups: Texts) -> Texts:
  """Returns groups of texts [B, K, ...] as one, [B * sum of K, ...]."""
  return jax.tree.map(lambda *arrays: _rows(jnp.concatenate(arrays, axis=1)), *groups)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Logits:
  """Logits of a batch at one exit, those with other rows only as their log-sum."""

  texts: CutTexts
  candidates: Texts  # candidates from other rows, [N, ...]
  pairing: Pairing | None  # None: no candidates from other rows
  own: Float[Array, "B P M"]  # logits of the positives
  stored: Float[Array, "B K M"]  # logits of the stored negatives
  keep: Bool[Array, "B K"]  # stored negatives that are negatives
  hard: Float[Array, "B M"]  # log-sum over those
  inbatch: Float[Array, "B M"]  # log-sum over the candidates from other rows
  count: Float[Array, "B"]  # negatives of both kinds


def batch_logits(
  texts: CutTexts,
  ids_BC: Int[Array, "B C"],
  pairing: Pairing | None,
  *,
  others_negatives: bool,
  passage_grad: bool,
) -> Logits:
  """Returns the logits and log-sums of a batch.

  `others_negatives`: stored negatives of other rows are candidates too. Without `passage_grad`
  candidates from other rows are constants.
  """
  own, stored = (own_logits(texts.query, t) for t in (texts.positives, texts.negatives))
  keep = stored_keep(ids_BC, own.shape[1])
  count = jnp.sum(keep, axis=1, dtype=jnp.float32)
  hard = inbatch = jnp.full((own.shape[0], own.shape[2]), EMPTY)
  if keep.shape[1]:
    masked = jnp.where(keep[..., None], stored, tiles.MASKED)
    hard = jnp.maximum(jax.nn.logsumexp(masked, axis=1), EMPTY)
  candidates = flat(texts.positives, *([texts.negatives] if others_negatives else []))
  if not passage_grad:
    candidates = jax.lax.stop_gradient(candidates)
  if pairing:
    inbatch, seen = tiles.log_sum_exp(texts.query, candidates, *pairing)
    count += seen
  return Logits(texts, candidates, pairing, own, stored, keep, hard, inbatch, count)
