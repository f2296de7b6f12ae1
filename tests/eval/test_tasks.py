"""Scores from vectors whose answers are known, and refusals of unusable held-out files."""

import numpy as np
import pytest

from mlembed_jax.data.manifest import File
from mlembed_jax.data.tokenizer import DataError
from mlembed_jax.eval import tasks
from tests.material import entry, write_parquet


def load(folder, task_type, **columns):
  write_parquet(folder / "t.parquet", columns)
  return tasks.load(File("t.parquet", entry(task_type, 0, "Do."), str(folder)))


def vectors(task, by_text):
  """Returns one unit vector per text of the task; `by_text` is keyed without instruction."""
  return np.array([by_text[t.removeprefix("Instruct: Do.\nQuery: ")] for t in task.texts])


def test_bitext_counts_own_translations_within_a_language(tmp_path):
  task = load(
    tmp_path,
    "bitext",
    lang=["de", "de", "fr", "fr"],
    text=["eins", "zwei", "un", "deux"],
    en=["one", "two", "one", "two"],
  )
  assert sum(text == "one" for text in task.texts) == 1
  east, north = [1.0, 0.0], [0.0, 1.0]
  known = {"one": east, "two": north, "eins": east, "zwei": north, "un": north, "deux": north}
  assert task.score(vectors(task, known)) == {"de": 1.0, "fr": 0.5}


def test_ties_count_against():
  same = np.ones((3, 2)) / np.sqrt(2)
  assert tasks.top1(same, same) == 0.0


def test_retrieval_finds_the_passage(tmp_path):
  task = load(tmp_path, "retrieval", lang=["de"] * 2, title=["a", "b"], passage=["x", "y"])
  known = {"a": [1.0, 0], "b": [0, 1.0], "x": [0.9, 0.1], "y": [0.8, 0.2]}
  assert task.score(vectors(task, known)) == {"de": 1.0}


def test_classification_uses_english_centroids_and_scores_the_others(tmp_path):
  task = load(
    tmp_path,
    "classification",
    lang=["en", "en", "en", "de", "de", "en"],
    intent=["on", "on", "off", "on", "off", "off"],
    text=["on 1", "on 2", "off 1", "an", "aus", "off 2"],
    split=["support", "support", "support", "test", "test", "test"],
  )
  known = {"on 1": [1, 0], "on 2": [0.6, 0.8], "off 1": [0, 1], "off 2": [0, 1]}
  known |= {"an": [0.8, 0.6], "aus": [0.9, 0.1]}
  assert task.score(vectors(task, known)) == {"de": 0.5}


@pytest.mark.parametrize(
  ("task_type", "columns", "message"),
  [
    ("bitext", {"lang": ["de"], "text": ["a"]}, "column en is missing"),
    ("bitext", {"lang": ["de"], "text": ["a"], "en": [None]}, "expected string"),
    (
      "bitext",
      {"lang": ["de", "de"], "text": ["a", "b"], "en": [None, "x"]},
      "null or empty texts in en; held-out files must be whole",
    ),
    (
      "classification",
      {"lang": ["de"], "intent": ["x"], "text": ["a"], "split": ["support"]},
      "no English rows with split 'support'",
    ),
    ("clustering", {"lang": ["de"]}, "task_type 'clustering' has no evaluation"),
  ],
)
def test_unusable_files_are_refused(tmp_path, task_type, columns, message):
  with pytest.raises(DataError, match=message):
    load(tmp_path, task_type, **columns)
