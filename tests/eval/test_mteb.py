"""Tasks of mteb on slices, against mteb with sentence-transformers on the same folder."""

import collections
import importlib
import json
import pathlib
import shutil
import sys
from collections.abc import Iterator

import datasets
import huggingface_hub
import jax
import mteb
import numpy as np
import pyarrow.parquet as pq
import pytest
import threadpoolctl
from mteb.types import PromptType

from mlembed_jax.errors import DataError
from mlembed_jax.eval import mteb as ours
from mlembed_jax.eval import report, scores
from mlembed_jax.eval.evaluation import Costs, Evaluation
from mlembed_jax.eval.mteb import MTEBEncoder, evaluate, find_task, model_meta
from mlembed_jax.inference import Encoder
from mlembed_jax.matryoshka import Slice
from mlembed_jax.models.encoder import parameter_count
from tests.eval import local_tasks
from tests.hf.exports import load_st, trained
from tests.material import sentences

SLICES = [Slice(), Slice(depth=2, dim=16), Slice(rank=8), Slice(rank=8, depth=3, dim=8)]


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
  """Programs run for milliseconds here and compile for seconds.

  On cores that are busy two threads of torch or scikit-learn wait for each other a hundred times
  longer than one works.
  """
  jax.config.update("jax_disable_most_optimizations", True)
  with threadpoolctl.threadpool_limits(1):
    yield
  jax.config.update("jax_disable_most_optimizations", False)


class Counting(Encoder):
  """Counts how often each text is encoded, by rank."""

  def __init__(self, *args, **options):
    super().__init__(*args, **options)
    self.passes = collections.Counter()

  def states(self, ids, exits, depth=None, rank=None, show_progress_bar=False):
    self.passes.update((rank, tuple(row)) for row in ids)
    return super().states(ids, exits, depth, rank, show_progress_bar)


@pytest.fixture(scope="module")
def folder(data, tmp_path_factory) -> pathlib.Path:
  return trained(data).export(tmp_path_factory.mktemp("mteb") / "full")


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> pathlib.Path:
  path = tmp_path_factory.mktemp("local")
  local_tasks.write(path)
  return path


@pytest.fixture(scope="module")
def encoder(folder) -> Counting:
  return Counting.load(folder)  # type: ignore[return-value]


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> pathlib.Path:
  return tmp_path_factory.mktemp("out")


def by_size(found) -> dict:
  return {(s.task, s.rank, s.depth, s.dim): s for s in found}


@pytest.fixture(scope="module")
def records(encoder, files, out) -> dict:
  """Of every local task and slice."""
  encoder.passes.clear()
  found = evaluate(encoder, local_tasks.all_of(files), SLICES, out)
  assert len(found) == 4 * len(SLICES)
  return by_size(found)


def alone(model, tasks) -> dict[str, mteb.TaskResult]:
  options = {"co2_tracker": False, "cache": None, "show_progress_bar": False}
  results = mteb.evaluate(model, tasks, encode_kwargs={"batch_size": 64}, **options)
  return {result.task_name: result for result in results.task_results}


def test_scores_are_those_of_sentence_transformers(encoder, folder, files, records, tmp_path):
  mocks = evaluate(encoder, [task() for task in local_tasks.MOCKS], [Slice()], tmp_path)
  model = load_st(folder)
  model = mteb.SentenceTransformerEncoderWrapper(model, model_prompts=model.prompts)
  tasks = [*(task() for task in local_tasks.MOCKS), *local_tasks.all_of(files)]
  theirs = alone(model, tasks)
  found = [*mocks, *(r for key, r in records.items() if key[1:] == (0, 4, 48))]
  assert len(found) == len(theirs) == len(tasks)
  for record in found:
    result = theirs[record.task.removeprefix("mteb:")]
    assert record.score == pytest.approx(result.get_score(), abs=1e-4), record.task
    assert record.by_language == pytest.approx(by_language(result), abs=1e-4)


def by_language(result) -> dict[str, float]:
  """Returns the mean of the subsets that have a language, as mteb says of each."""
  found = collections.defaultdict(list)
  for part in result.scores["test"]:
    tags = set(part["languages"])
    for tag in tags - {"eng-Latn"} or tags:
      found[tag].append(part["main_score"])
  return {tag: np.mean(of) for tag, of in found.items()}


@pytest.mark.parametrize("cut", SLICES[1::2])
def test_a_slice_scores_as_it_does_alone(encoder, files, records, cut):
  found = alone(MTEBEncoder(encoder, cut), local_tasks.all_of(files))
  for name, result in found.items():
    record = records[f"mteb:{name}", cut.rank or 0, cut.depth or 4, cut.dim or 48]
    assert record.score == pytest.approx(result.get_score(), abs=1e-4), name


def test_our_own_scores_are_those_of_mteb(encoder, files, records):
  def vectors(texts, prompt):
    return encoder.encode(texts.to_pylist(), prompt_name=prompt)

  stated = records["mteb:LocalBitext", 0, 4, 48].by_language
  for name, lang in (("de-en", "deu-Latn"), ("zh-en", "zho-Hans")):
    pairs = pq.read_table(files / f"{name}.parquet")
    sides = (vectors(pairs[f"sentence{i}"], "BitextMining") for i in (1, 2))
    found = scores.bitext(*sides, np.arange(len(pairs)))["f1"]
    assert found == pytest.approx(stated[lang], abs=1e-4)
  table = pq.read_table(files / "colours.parquet")
  labels, found = table["label"].to_numpy(), vectors(table["text"], "Classification")
  halves = found[:24], labels[:24], found[24:], labels[24:]
  stated = records["mteb:LocalClassification", 0, 4, 48].score
  assert scores.classification(*halves)["accuracy"].mean() == pytest.approx(stated, abs=1e-4)


def test_records(records):
  record = records["mteb:LocalBitext", 8, 3, 8]
  assert record.metric == "f1"
  assert record.precision == "float32"
  assert set(record.by_language) == {"deu-Latn", "zho-Hans"}
  assert record.score == pytest.approx(np.mean([*record.by_language.values()]), abs=1e-6)
  assert len({r.score for r in records.values()}) > 12  # slices differ


def test_the_report_has_real_languages(records):
  """mteb calls the subset of three of the four tasks `default`: two are English, one is German."""
  whole = {task: record for (task, *size), record in records.items() if size == [0, 4, 48]}
  assert {task: list(record.by_language) for task, record in whole.items()} == {
    "mteb:LocalBitext": ["deu-Latn", "zho-Hans"],
    "mteb:LocalRetrieval": ["deu-Latn"],
    "mteb:LocalClassification": ["eng-Latn"],
    "mteb:LocalClusters": ["eng-Latn"],
  }
  evaluation = Evaluation("m", ["float32"], [], [*records.values()], Costs([], [], "cpu"), {})
  found = report.payload(evaluation)
  assert found["views"][0]["languages"] == [["deu-Latn", 2], ["eng-Latn", 2], ["zho-Hans", 1]]
  german = [whole[f"mteb:Local{name}"].by_language["deu-Latn"] for name in ("Bitext", "Retrieval")]
  shown = found["slices"][found["full"]]["languages"][0][0]
  assert shown == pytest.approx(np.mean(german), abs=1e-4)


def test_every_text_is_encoded_once_per_rank_and_task(encoder, files, tmp_path):
  encoder.passes.clear()
  evaluate(encoder, [local_tasks.all_of(files)[0]], SLICES, tmp_path)
  assert set(encoder.passes.values()) == {1}
  texts = {text for lang in ("en", "de", "zh") for text in sentences(lang)[::10]}
  assert collections.Counter(rank for rank, _ in encoder.passes) == {
    None: len(texts),
    8: len(texts),
  }


def test_results_are_read_by_mteb(encoder, records, out):
  cache = mteb.ResultCache(out)
  meta = model_meta(encoder, Slice(depth=2, dim=16))
  result = cache.load_task_result("LocalClusters", meta.name, meta.revision)
  assert result is not None
  assert result.get_score() == records["mteb:LocalClusters", 0, 2, 16].score
  folder = out / "results" / "mlembed__tiny-d16-l2" / (meta.revision or "")
  assert len(list(folder.glob("Local*.json"))) == 4
  written = json.loads((folder / "model_meta.json").read_text())
  assert (written["framework"], written["embed_dim"]) == (["JAX"], 16)
  assert {model.model_name for model in cache.load_results()} == {
    f"mlembed/tiny{suffix}" for suffix in ("", "-d16-l2", "-r8", "-d8-l3-r8")
  }


def test_results_that_are_there_are_not_computed_again(encoder, files, records, out):
  encoder.passes.clear()
  tasks = local_tasks.all_of(files / "gone")
  again = evaluate(encoder, tasks, SLICES, out)
  assert by_size(again) == records
  assert not encoder.passes


def test_metadata(encoder, folder):
  meta = model_meta(encoder, Slice(rank=8, depth=2, dim=16))
  assert meta.name == "mlembed/tiny-d16-l2-r8"
  assert meta.n_parameters == parameter_count(encoder.config(2, 8))
  assert meta.n_parameters < model_meta(encoder).n_parameters
  assert meta.max_tokens == 128
  assert "zho-Hans" in meta.languages
  assert model_meta(encoder, Slice(depth=4, dim=48)).name == "mlembed/tiny"


def test_the_revision_follows_the_content(encoder, folder, tmp_path):
  shutil.copytree(folder, tmp_path / "copy")
  copy = Encoder.load(tmp_path / "copy")
  assert model_meta(copy).revision == model_meta(encoder).revision
  copy.max_seq_length -= 1
  assert model_meta(copy).revision != model_meta(encoder).revision
  copy.max_seq_length += 1
  assert model_meta(copy).revision == model_meta(encoder).revision
  (tmp_path / "copy" / "README.md").write_text("another card")
  assert model_meta(copy).revision != model_meta(encoder).revision


def test_prompts(encoder):
  model = MTEBEncoder(encoder)
  query, document = PromptType.query, PromptType.document
  bitext, retrieval, classification, clusters = (
    task.metadata for task in local_tasks.all_of(pathlib.Path())
  )
  for task, kind, name in (
    (retrieval, query, "Retrieval-query"),
    (retrieval, document, "document"),
    (local_tasks.MockRerankingTask.metadata, query, "query"),
    (local_tasks.MockRerankingTask.metadata, document, "document"),
    (bitext, None, "BitextMining"),
    (classification, None, "Classification"),
    (clusters, None, "Clustering"),
    (local_tasks.MockSTSTask.metadata, None, "STS"),
    (local_tasks.MockPairClassificationTask.metadata, None, "PairClassification"),
  ):
    assert model.get_prompt_name(task, kind) == name
  assert encoder.prompts["document"] == ""


def test_states_are_computed_in_parts(encoder, tmp_path, monkeypatch):
  monkeypatch.setattr(ours, "PASS_BYTES", 4 * 2 * 48 * 10)  # ten texts
  states = ours.States(encoder, None, (4, 2, 4), 16, str(tmp_path))
  texts = [*sentences("de")[:25], *sentences("de")[:5], *sentences("zh")[:5]]
  assert states.read(texts[:3], "", 4).shape == (3, 16)
  for prompt, depth in (("", 2), ("Find: ", 4)):
    found = states.read(texts, prompt, depth)
    expected = encoder.encode(texts, prompt=prompt, depth=depth, dim=16, normalize=False)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_an_unknown_task_is_named_with_those_near_it():
  assert find_task("mteb:STS22.v2").metadata.name == "STS22.v2"
  with pytest.raises(DataError, match=r"mteb:BornholmBitext: .* near it: BornholmBitextMining"):
    find_task("mteb:BornholmBitext")


def test_data_that_is_not_here(encoder, files, tmp_path, monkeypatch):
  monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
  monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
  with pytest.raises(DataError, match=r"mteb:BornholmBitextMining: its data is not here.*get_task"):
    evaluate(encoder, ["mteb:BornholmBitextMining"], [Slice()], tmp_path)
  with pytest.raises(DataError, match=r"mteb:LocalBitext: its data is not here: .*de-en.parquet"):
    evaluate(encoder, local_tasks.all_of(files / "gone")[:1], [Slice()], tmp_path)


def test_what_cannot_be_evaluated_is_refused_first(encoder, files, tmp_path):
  with pytest.raises(DataError, match="mteb:CIFAR10Clustering: has image; the model reads text"):
    evaluate(encoder, ["CIFAR10Clustering"], [Slice()], tmp_path)
  with pytest.raises(ValueError, match="dim: 20 was not trained"):
    evaluate(encoder, local_tasks.all_of(files), [Slice(), Slice(dim=20)], tmp_path)
  assert not list(tmp_path.iterdir())


def test_without_mteb(monkeypatch):
  monkeypatch.setitem(sys.modules, "mteb", None)
  monkeypatch.delitem(sys.modules, "mlembed_jax.eval.mteb")
  with pytest.raises(ImportError, match=r'pip install "mlembed_jax\[mteb\]"'):
    importlib.import_module("mlembed_jax.eval.mteb")
