"""Scores against scikit-learn's and scipy's, and against formulas written down."""

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics
from sklearn.linear_model import LogisticRegression

from mlembed_jax.eval import scores
from mlembed_jax.quantize import unit


def vectors(rows, seed=0, width=16):
  return unit(np.random.default_rng(seed).normal(size=(rows, width)).astype(np.float32))


def near(targets, noise, seed=1):
  return unit(targets + noise * vectors(len(targets), seed, targets.shape[1]))


def test_bitext_is_the_weighted_f1_of_the_nearest_targets():
  targets = vectors(300)
  sources = near(targets, 1.2)
  found = np.argmax(sources @ targets.T, axis=1)
  for right in (np.arange(300), np.arange(300) // 2):  # two rows of each target
    expected = sklearn.metrics.f1_score(right, found, average="weighted", zero_division=0)
    result = scores.bitext(sources, targets, right)
    assert 0.001 < expected < 0.9
    assert result["f1"] == pytest.approx(expected, rel=1e-6)
    assert result["accuracy"] == pytest.approx(np.mean(found == right))


def test_bitext_searches_all_targets_in_parts(monkeypatch):
  targets = vectors(50)
  sources = near(targets, 1.2)
  whole = scores.bitext(sources, targets, np.arange(50))
  monkeypatch.setattr(scores, "QUERIES_AT_ONCE", 7)
  assert scores.bitext(sources, targets, np.arange(50)) == whole


def test_a_collapsed_model_has_no_bitext_score():
  same = np.ones((40, 2), np.float32) / np.sqrt(2)
  assert scores.bitext(same, same, np.arange(40))["f1"] < 0.01


def test_ndcg_is_that_of_scikit_learn(monkeypatch):
  monkeypatch.setattr(scores, "QUERIES_AT_ONCE", 7)
  documents, queries = vectors(80), vectors(20, 2)
  rng = np.random.default_rng(3)
  relevant = [rng.choice(80, size=1 + i % 15, replace=False) for i in range(20)]
  truth = np.zeros((20, 80))
  for row, right in zip(truth, relevant, strict=True):
    row[right] = 1
  expected = sklearn.metrics.ndcg_score(truth, queries @ documents.T, k=10)
  result = scores.retrieval(queries, documents, relevant)
  assert result["ndcg_at_10"] == pytest.approx(expected, rel=1e-6)
  top = np.argmax(queries @ documents.T, axis=1)
  hits = [best in right for best, right in zip(top, relevant, strict=True)]
  assert result["accuracy"] == pytest.approx(np.mean(hits))


def test_equal_scores_stand_before_the_right_document():
  same = np.ones((12, 2), np.float32) / np.sqrt(2)
  assert scores.retrieval(same[:1], same, [np.array([0])])["ndcg_at_10"] == 0.0
  assert scores.retrieval(same[:1], same[:3], [np.array([0])])["ndcg_at_10"] == pytest.approx(0.5)


def test_bits_that_are_equally_far_are_equal_in_every_dim():
  signs = np.random.default_rng(5).choice(np.float32([-1, 1]), size=(400, 32))
  documents, queries = unit(signs), unit(signs[:1] * np.float32([-1] * 4 + [1] * 28))
  hamming = (signs != np.sign(queries)).sum(axis=1)
  for right in range(20):
    places = scores._places((queries @ documents.T)[0], np.array([right]))
    assert places[0] == np.sum(hamming <= hamming[right]) - 1


def means(right):
  return {metric: values.mean() for metric, values in right.items()}


def labelled(noise=1.6, per_label=20, seed=4):
  centres = vectors(5, seed)
  labels = np.repeat([f"label {i}" for i in range(5)], per_label)
  return near(np.repeat(centres, per_label, axis=0), noise, seed + 1), labels


def test_classification_is_the_mean_of_ten_regressions_on_eight_vectors_a_label():
  train, labels = labelled()
  test, expected = labelled(seed=4, noise=1.7)
  rows = scores.samples(labels)
  assert len(rows) == 10 and len({tuple(sorted(r)) for r in rows}) == 10
  assert all((np.unique(labels[r], return_counts=True)[1] == 8).all() for r in rows)
  accuracies = [
    LogisticRegression(max_iter=100).fit(train[r], labels[r]).score(test, expected) for r in rows
  ]
  result = means(scores.classification(train, labels, test, expected))
  assert 0.4 < result["accuracy"] < 0.95
  assert result["accuracy"] == pytest.approx(np.mean(accuracies))


def test_centroids_are_mean_directions():
  train = unit(np.array([[1, 0], [0.6, 0.8], [0, 1]], np.float32))
  labels = np.array(["on", "on", "off"])
  test = unit(np.array([[0.8, 0.6], [0.1, 0.9]], np.float32))
  result = means(scores.classification(train, labels, test, np.array(["on", "on"])))
  assert result["centroid_accuracy"] == 0.5


def test_one_label_is_always_right():
  train, labels = vectors(3), np.array(["a"] * 3)
  found = scores.classification(train, labels, train, labels)
  assert means(found) == {"accuracy": 1.0, "centroid_accuracy": 1.0}


def test_clustering_measures_how_labels_lie_together():
  together, labels = labelled(noise=0.3)
  mixed = vectors(len(labels))
  assert scores.clustering(together, labels)["v_measure"] > 0.95
  assert scores.clustering(mixed, labels)["v_measure"] < 0.4
  assert scores.clustering(mixed, labels) == scores.clustering(mixed, labels)


def test_sts_is_the_rank_correlation_of_cosines():
  first = vectors(60)
  second = near(first, np.linspace(0.2, 3, 60, dtype=np.float32)[:, None])
  gold = np.linspace(5, 0, 60)
  expected = scipy.stats.spearmanr(gold, np.sum(first * second, axis=1))[0]
  assert scores.sts(first, second, gold)["cosine_spearman"] == pytest.approx(expected)
  same = np.ones((3, 2)) / np.sqrt(2)
  assert scores.sts(same, same, np.arange(3.0)) == {"cosine_spearman": 0.0}
