"""Scores of vectors, as MTEB defines them (mteb 2.26): its main score of a task type comes first.

Vectors have unit length; scores lie between 0 and 1, those of STS between -1 and 1. numpy, scipy
and scikit-learn alone.
"""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import threadpoolctl
from jaxtyping import Float, Int

from mlembed_jax.quantize import Vectors, unit

Scores = dict[str, float]

SEED = 42
EXPERIMENTS, SAMPLES_PER_LABEL = 10, 8  # of a classification
BOOTSTRAPS, DRAWS = 10, 2048  # of a clustering; MTEB's tasks draw 2,048 or 16,384 texts
TOP = 10
TIE = 1e-6  # scores this near are ties: sums of equal products may round in another order
QUERIES_AT_ONCE = 1024  # the similarities of so many to all documents stand in memory


def bitext(sources: Vectors, targets: Vectors, right: Int[np.ndarray, " N"]) -> Scores:
  """Returns how often row i of `sources` finds row `right[i]` of `targets` among all.

  `f1` is weighted over targets, so one that many sources find costs; `accuracy` is the plain share.
  """
  found = np.concatenate([np.argmax(part @ targets.T, axis=1) for part in _parts(sources)])
  times, wanted, hits = (
    np.bincount(places, minlength=len(targets)) for places in (found, right, right[found == right])
  )
  f1 = 2 * hits[right] / (wanted + times)[right]  # of the target of each source
  return {"f1": float(np.mean(f1)), "accuracy": float(np.mean(found == right))}


def retrieval(
  queries: Vectors, documents: Vectors, relevant: Sequence[Int[np.ndarray, " K"]]
) -> Scores:
  """Returns the means over queries; `relevant` are the right documents of each, at least one.

  Documents that score the same as a right one stand before it.
  """
  places = np.arange(1, TOP + 1)
  gains, first = 1 / np.log2(1 + places), []
  ndcg = []
  for start, part in zip(range(0, len(queries), QUERIES_AT_ONCE), _parts(queries), strict=True):
    similarity = part @ documents.T
    for row, right in zip(similarity, relevant[start : start + len(part)], strict=True):
      hits = _places(row, right)
      ndcg.append(gains[hits[hits < TOP]].sum() / gains[: len(right)].sum())
      first.append(hits[0] == 0)
  return {"ndcg_at_10": float(np.mean(ndcg)), "accuracy": float(np.mean(first))}


def _places(scores: np.ndarray, right: np.ndarray) -> np.ndarray:
  """Returns the places of the right documents, ascending, from 0 on; ties count against them."""
  own = np.sort(scores[right])[::-1]
  wrong = np.sort(np.delete(scores, right))
  return len(wrong) - np.searchsorted(wrong, own - TIE, side="left") + np.arange(len(right))


def classification(
  train: Vectors, labels: np.ndarray, test: Vectors, expected: np.ndarray
) -> dict[str, Float[np.ndarray, " N"]]:
  """Returns how right each vector of `test` is labelled by what `train` teaches, 0 to 1.

  `accuracy`: the share of ten logistic regressions on 8 vectors per label. `centroid_accuracy`:
  the label whose vectors have the nearest mean direction. Their means over vectors are the scores.
  """
  # Threads wait for each other longer than products this small take.
  with _libraries().limit(limits=1):
    found = [_logistic(train[rows], labels[rows], test) for rows in samples(labels)]
  nearest = _nearest_centroid(train, labels, test)
  return {
    "accuracy": np.mean([labels == expected for labels in found], axis=0),
    "centroid_accuracy": (nearest == expected).astype(float),
  }


def samples(labels: np.ndarray) -> list[list[int]]:
  """Returns the rows of each experiment, as MTEB draws them: a permutation applied once more."""
  order, found = list(range(len(labels))), []
  for _ in range(EXPERIMENTS):
    np.random.RandomState(SEED).shuffle(order)
    seen: dict[object, int] = {}
    chosen = []
    for row in order:
      seen[labels[row]] = seen.get(labels[row], 0) + 1
      if seen[labels[row]] <= SAMPLES_PER_LABEL:
        chosen.append(row)
    found.append(chosen)
  return found


def _logistic(train: Vectors, labels: np.ndarray, test: Vectors) -> np.ndarray:
  if len(set(labels)) == 1:
    return np.repeat(labels[:1], len(test))
  from sklearn.linear_model import LogisticRegression

  return LogisticRegression(max_iter=100).fit(train, labels).predict(test)


@functools.cache
def _libraries() -> threadpoolctl.ThreadpoolController:
  """Returns the loaded libraries that have threads; looking for them takes as long as a fit."""
  import sklearn.linear_model  # noqa: F401  its libraries are among them

  return threadpoolctl.ThreadpoolController()


def _nearest_centroid(train: Vectors, labels: np.ndarray, test: Vectors) -> np.ndarray:
  classes, numbers = np.unique(labels, return_inverse=True)
  centroids = np.eye(len(classes), dtype=np.float32)[numbers].T @ train
  return classes[np.argmax(test @ unit(centroids).T, axis=1)]


def clustering(vectors: Vectors, labels: np.ndarray) -> Scores:
  """Returns `v_measure`, the mean over ten draws with replacement, of k-means with k labels."""
  from sklearn.cluster import MiniBatchKMeans
  from sklearn.metrics import v_measure_score

  draw = np.random.default_rng(SEED)
  count = len(set(labels))
  options: dict[str, Any] = {"batch_size": 512, "n_init": 1, "random_state": SEED}
  kmeans = MiniBatchKMeans(count, **options)
  found = []
  for _ in range(BOOTSTRAPS):
    rows = draw.integers(len(labels), size=max(DRAWS, count))
    found.append(v_measure_score(labels[rows], kmeans.fit_predict(vectors[rows])))
  return {"v_measure": float(np.mean(found))}


def sts(first: Vectors, second: Vectors, gold: Float[np.ndarray, " N"]) -> Scores:
  """Returns the rank correlation of cosines with human scores; 0 where all cosines are equal."""
  import scipy.stats

  cosines = np.sum(first * second, axis=1)
  if np.ptp(cosines) == 0:
    return {"cosine_spearman": 0.0}
  found: Any = scipy.stats.spearmanr(gold, cosines)
  return {"cosine_spearman": float(found.statistic)}


def _parts(queries: Vectors) -> list[Vectors]:
  return [queries[i : i + QUERIES_AT_ONCE] for i in range(0, len(queries), QUERIES_AT_ONCE)]
