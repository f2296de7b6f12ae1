"""Held-out tasks: the texts they need encoded, and a score per language from the vectors.

A task is a parquet file listed in a manifest, with columns by task type:
  bitext          lang, text, en            `text` finds `en` among the rows of its language
  retrieval       lang, title, passage      `title` finds `passage` among the rows of its language
  classification  lang, intent, text, split nearest English class centroid (split `support`)
Only numpy here.
"""

import dataclasses
from collections.abc import Callable

import numpy as np
from jaxtyping import Float

from mlembed_jax.data.manifest import File
from mlembed_jax.data.rows import has_text, open_parquet
from mlembed_jax.data.tokenizer import DataError, with_instruction

Vectors = Float[np.ndarray, "N D"]


@dataclasses.dataclass(frozen=True)
class Task:
  """One held-out file. `score` takes unit vectors of `texts`, in order."""

  name: str
  metric: str
  texts: list[str]
  score: Callable[[Vectors], dict[str, float]]  # language -> 0..1, higher is better


def load(file: File) -> Task:
  """Returns the task of one file of a manifest.

  Raises:
    DataError: the file cannot be read, or its task type has no evaluation.
  """
  entry, path, name = file.entry, file.path, file.name
  prompt = "" if entry["query_has_instruction"] else entry["instruction"]
  match entry["task_type"]:
    case "bitext":
      return _pairs(name, _columns(path, "lang", "text", "en"), prompt)
    case "retrieval":
      return _pairs(name, _columns(path, "lang", "title", "passage"), prompt)
    case "classification":
      return _classification(name, _columns(path, "lang", "intent", "text", "split"), prompt)
  raise DataError(f"{path}: task_type {entry['task_type']!r} has no evaluation")


def _columns(path: str, *names: str) -> list[list[str]]:
  with open_parquet(path, names) as file:
    table = file.read(columns=list(names))
  empty = [name for name in names if not has_text(table[name]).all()]
  if empty or not table.num_rows:
    found = f"null or empty texts in {', '.join(empty)}" if empty else "no rows"
    raise DataError(f"{path}: {found}; held-out files must be whole")
  return [table[name].to_pylist() for name in names]


def _pairs(name: str, columns: list[list[str]], prompt: str) -> Task:
  langs, queries, documents = columns
  texts, index = _unique([with_instruction(prompt, query) for query in queries] + documents)
  query_index, document_index = index[: len(queries)], index[len(queries) :]
  groups = _groups(langs)

  def score(vectors: Vectors) -> dict[str, float]:
    return {
      lang: top1(vectors[query_index[rows]], vectors[document_index[rows]])
      for lang, rows in groups.items()
    }

  return Task(name, "top1", texts, score)


def top1(queries: Vectors, documents: Vectors) -> float:
  """Returns the share of queries whose own document scores above all others; ties count against."""
  similarity = queries @ documents.T
  rank = (similarity >= np.diag(similarity)[:, None]).sum(axis=1)
  return float(np.mean(rank == 1))


def _classification(name: str, columns: list[list[str]], prompt: str) -> Task:
  langs, intents, queries, splits = columns
  texts, index = _unique([with_instruction(prompt, query) for query in queries])
  classes, labels = np.unique(intents, return_inverse=True)
  is_support = np.array(splits) == "support"
  support = np.flatnonzero(is_support & (np.array(langs) == "en"))
  if not support.size:
    raise DataError(f"{name}: no English rows with split 'support' to make class centroids from")
  tests = {
    lang: rows[~is_support[rows]]
    for lang, rows in _groups(langs).items()
    if lang != "en" and not is_support[rows].all()
  }

  def score(vectors: Vectors) -> dict[str, float]:
    members = np.eye(len(classes), dtype=np.float32)[labels[support]]
    centroids = members.T @ vectors[index[support]]
    centroids /= np.maximum(np.linalg.norm(centroids, axis=1, keepdims=True), 1e-12)
    return {
      lang: float(np.mean(np.argmax(vectors[index[rows]] @ centroids.T, axis=1) == labels[rows]))
      for lang, rows in tests.items()
    }

  return Task(name, "accuracy", texts, score)


def _unique(texts: list[str]) -> tuple[list[str], np.ndarray]:
  position = {text: i for i, text in enumerate(dict.fromkeys(texts))}
  return list(position), np.array([position[text] for text in texts])


def _groups(langs: list[str]) -> dict[str, np.ndarray]:
  values = np.array(langs)
  return {lang: np.flatnonzero(values == lang) for lang in sorted(set(langs))}
