"""Tasks of mteb over files that a test writes, and mteb's own mock tasks."""

import pathlib
from typing import Any

import datasets
import pyarrow.parquet as pq
from mteb.abstasks import AbsTask, AbsTaskClassification, AbsTaskClustering, AbsTaskRetrieval
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.abstasks.text.bitext_mining import AbsTaskBitextMining
from mteb.mocks.mock_tasks import (
  LegacyMockClusteringFastTask,
  MockBitextMiningTask,
  MockClassificationTask,
  MockMultilingualBitextMiningTask,
  MockMultilingualClusteringFastTask,
  MockMultilingualParallelBitextMiningTask,
  MockMultilingualRetrievalTask,
  MockPairClassificationTask,
  MockRerankingTask,
  MockRetrievalTask,
  MockSTSTask,
)

from tests import material

MOCKS = (
  LegacyMockClusteringFastTask,
  MockBitextMiningTask,
  MockClassificationTask,
  MockMultilingualBitextMiningTask,
  MockMultilingualClusteringFastTask,
  MockMultilingualParallelBitextMiningTask,
  MockMultilingualRetrievalTask,
  MockPairClassificationTask,
  MockRerankingTask,
  MockRetrievalTask,
  MockSTSTask,
)
LANGUAGES = {"de-en": ["deu-Latn", "eng-Latn"], "zh-en": ["zho-Hans", "eng-Latn"]}


def write(folder: pathlib.Path) -> None:
  """Writes parallel phrases, and whether a phrase has a colour."""
  english = material.sentences("en")[::10]
  for name in LANGUAGES:
    other = material.sentences(name[:2])[::10]
    columns = {"sentence1": other, "sentence2": english}
    material.write_parquet(folder / f"{name}.parquet", columns)
  labels = [int(bool({"red", "green", "blue"} & set(text.split()))) for text in english]
  material.write_parquet(folder / "colours.parquet", {"text": english, "label": labels})


def all_of(folder: pathlib.Path) -> list[AbsTask]:
  """Returns new tasks over what `write` wrote."""
  found: list[AbsTask] = [LocalBitext(), LocalRetrieval(), LocalClassification(), LocalClusters()]
  for task in found:
    task.folder = folder  # type: ignore[attr-defined]
  return found


def _metadata(name: str, kind: Any, main_score: str, eval_langs: Any) -> TaskMetadata:
  return TaskMetadata(
    name=name,
    description="Phrases that a test writes.",
    dataset={"path": "local", "revision": "1"},
    type=kind,
    category="t2t",
    modalities=["text"],
    eval_splits=["test"],
    eval_langs=eval_langs,
    main_score=main_score,
  )


def _read(path: pathlib.Path) -> datasets.Dataset:
  return datasets.Dataset(pq.read_table(path))


class LocalBitext(AbsTaskBitextMining):
  metadata = _metadata("LocalBitext", "BitextMining", "f1", LANGUAGES)
  folder: pathlib.Path

  def load_data(self, num_proc: int | None = None, **kwargs: Any) -> None:
    files = {name: _read(self.folder / f"{name}.parquet") for name in LANGUAGES}
    self.dataset = {name: datasets.DatasetDict(test=file) for name, file in files.items()}
    self.data_loaded = True


class LocalRetrieval(AbsTaskRetrieval):
  metadata = _metadata("LocalRetrieval", "Retrieval", "ndcg_at_10", ["deu-Latn"])
  folder: pathlib.Path

  def load_data(self, num_proc: int | None = None, **kwargs: Any) -> None:
    file = _read(self.folder / "de-en.parquet")
    pairs = list(zip(file["sentence1"], file["sentence2"], strict=True))
    split = {
      "queries": datasets.Dataset.from_list(
        [{"id": f"q{i}", "text": query} for i, (query, _) in enumerate(pairs)]
      ),
      "corpus": datasets.Dataset.from_list(
        [{"id": f"d{i}", "title": "", "text": text} for i, (_, text) in enumerate(pairs)]
      ),
      "relevant_docs": {f"q{i}": {f"d{i}": 2, f"d{i + 1}": 1} for i in range(len(pairs) - 1)},
      "top_ranked": None,
    }
    self.dataset = {"default": {"test": split}}  # type: ignore[dict-item]
    self.data_loaded = True


class LocalClassification(AbsTaskClassification):
  metadata = _metadata("LocalClassification", "Classification", "accuracy", ["eng-Latn"])
  folder: pathlib.Path

  def load_data(self, num_proc: int | None = None, **kwargs: Any) -> None:
    file = _read(self.folder / "colours.parquet")
    self.dataset = datasets.DatasetDict(  # type: ignore[assignment]
      train=file.select(range(24)), test=file.select(range(24, len(file)))
    )
    self.data_loaded = True


class LocalClusters(AbsTaskClustering):
  """Draws both the texts and the bootstraps at random."""

  metadata = _metadata("LocalClusters", "Clustering", "v_measure", ["eng-Latn"])
  folder: pathlib.Path
  max_fraction_of_documents_to_embed = 0.5
  max_documents_per_cluster = 64
  n_clusters = 3

  def load_data(self, num_proc: int | None = None, **kwargs: Any) -> None:
    file = _read(self.folder / "colours.parquet")
    file = file.rename_columns({"text": "sentences", "label": "labels"})
    self.dataset = datasets.DatasetDict(test=file)  # type: ignore[assignment]
    self.data_loaded = True
