"""The command that scores exported models, as a process, against vectors of single slices."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
import safetensors.numpy

from mlembed_jax import evaluate_model
from mlembed_jax.errors import ConfigError, DataError
from mlembed_jax.eval import grid, tasks
from mlembed_jax.inference import Encoder
from mlembed_jax.matryoshka import Slice
from mlembed_jax.quantize import quantize, ranges, rounded, unit
from mlembed_jax.slice_scores import Size
from tests.material import entry, write_parquet

ROOT = pathlib.Path(__file__).parent.parent


def run(model, folder, out, *more):
  flags = f"--model={model}", f"--tasks={folder}", f"--out={out}"
  return subprocess.run(
    [sys.executable, "-m", "mlembed_jax.evaluate", *flags, *more],
    cwd=ROOT,
    env=os.environ | {"JAX_PLATFORMS": "cpu"},
    capture_output=True,
    text=True,
    check=False,
  )


@pytest.fixture(scope="module")
def out(exported, data, tmp_path_factory):
  folder = tmp_path_factory.mktemp("evaluated")
  result = run(exported["full"], data / "heldout", folder, "--grid")
  assert result.returncode == 0, result.stderr
  (folder / "stdout").write_text(result.stdout)
  return folder


@pytest.fixture(scope="module")
def evaluation(out):
  return json.loads((out / "scores.json").read_text())


def test_the_grid_has_every_trained_slice_once(evaluation):
  sizes = [
    (r["task"], r["rank"], r["depth"], r["dim"], r["precision"]) for r in evaluation["scores"]
  ]
  assert len(set(sizes)) == len(sizes) == 2 * 2 * 2 * 2 * 3
  found = [sorted({size[i] for size in sizes}) for i in range(1, 5)]
  assert found == [[8, 24], [1, 3], [16, 48], ["binary", "float32", "int8"]]
  assert [task["type"] for task in evaluation["tasks"]] == ["bitext", "classification"]


@pytest.mark.parametrize(("rank", "depth", "dim"), [(24, 3, 48), (8, 1, 16), (8, 3, 48)])
@pytest.mark.parametrize("precision", ["float32", "int8", "binary"])
def test_a_record_is_the_score_of_that_slice_alone(
  evaluation, exported, data, rank, depth, dim, precision
):
  for task in tasks.load_folder(data / "heldout"):
    (record,) = (
      r
      for r in evaluation["scores"]
      if (r["task"], r["rank"], r["depth"], r["dim"], r["precision"])
      == (task.name, rank, depth, dim, precision)
    )
    alone = Encoder.load(exported["full"]).encode(task.texts, depth=depth, rank=rank, dim=dim)
    size = Size(rank, depth, dim, precision)
    found = grid.slice_score(task, size, task.score(*2 * [unit(rounded(alone, precision))]))
    assert record["score"] == pytest.approx(
      found.score, abs=1e-3 if precision == "float32" else 0.02
    )
    assert record["by_language"].keys() == found.by_language.keys()


def test_queries_at_one_size_are_scored_against_documents_at_another(evaluation, exported, data):
  encoder, pairs = Encoder.load(exported["full"]), evaluation["asymmetric"]
  sizes = ("query_rank", "query_depth", "rank", "depth")
  for task in tasks.load_folder(data / "heldout"):
    own = {tuple(p[s] for s in sizes): p["score"] for p in pairs if p["task"] == task.name}
    assert own.keys() == {(24, 1, 24, 3), (24, 3, 24, 1), (8, 3, 24, 3), (24, 3, 8, 3)}
    for (query_rank, query_depth, rank, depth), score in own.items():
      queries = encoder.encode(task.texts, depth=query_depth, rank=query_rank)
      documents = encoder.encode(task.texts, depth=depth, rank=rank)
      languages = task.score(queries, documents).values()
      expected = np.mean([of_one[task.metric] for of_one in languages])
      assert score == pytest.approx(expected, abs=1e-3)
  assert len({p["score"] for p in pairs}) > 4


def test_costs_grow_with_depth_and_rank(evaluation):
  costs = {(c["rank"], c["depth"]): c for c in evaluation["costs"]["parameters"]}
  for small, large in (((8, 1), (8, 3)), ((8, 1), (24, 1))):
    assert costs[small]["count"] < costs[large]["count"]
    assert costs[small]["flops_per_token"] < costs[large]["flops_per_token"]
  assert [latency["depth"] for latency in evaluation["costs"]["latency_ms"]] == [1, 3]


def test_page_and_table_are_written(out):
  page = (out / "report.html").read_text()
  assert "heldout/bitext.parquet" in page
  printed = (out / "stdout").read_text()
  assert "queries at one depth, documents at another (mean of 2 tasks)" in printed
  assert "Queries at one rank, documents at another (mean of 2 tasks)" in page
  assert "| depth | dim 16 | dim 48 |" in printed and str(out / "report.html") in printed


def test_a_second_run_scores_no_task_again(out, exported, data):
  files = sorted((out / "tasks").iterdir())
  before = [(file, file.stat().st_mtime_ns) for file in files]
  assert len(before) == 2
  assert run(exported["full"], data / "heldout", out, "--grid").returncode == 0
  assert [(file, file.stat().st_mtime_ns) for file in sorted((out / "tasks").iterdir())] == before


def test_one_slice_in_one_precision(exported, data, tmp_path):
  flags = "--depth=1", "--rank=8", "--dim=16", "--precision=int8", "--max_tokens=8"
  flags += ("--language_key=as-written",)
  result = run(exported["full"], data / "heldout", tmp_path, *flags)
  assert result.returncode == 0, result.stderr
  evaluation = json.loads((tmp_path / "scores.json").read_text())
  assert "de" in evaluation["scores"][0]["by_language"]
  cut = {"rank": 8, "depth": 1, "dim": 16, "precision": "int8"}
  assert [record | cut for record in evaluation["scores"]] == evaluation["scores"]
  cut = evaluation["skipped"]["texts_truncated"]
  assert cut > 100 and f"{cut:,} texts were cut to 8 tokens" in result.stdout
  assert "UserWarning" not in result.stderr


def test_rounded_vectors_are_what_the_stored_bytes_mean():
  vectors = np.random.default_rng(0).normal(size=(50, 16)).astype(np.float32)
  low, high = ranges(vectors)
  step = (high - low) / 255
  assert (np.abs(rounded(vectors, "int8") - vectors) <= 0.5001 * step).all()
  bits = np.unpackbits(quantize(vectors, "ubinary"), axis=1).astype(int)
  hamming = (bits[:, None] != bits[None]).sum(axis=2)
  signs = rounded(vectors, "binary")
  np.testing.assert_array_equal(signs @ signs.T, 16 - 2 * hamming)


REFUSALS = [
  (
    ("--depth=2",),
    "--depth: 2 was not trained; the nearest are 1, 3; untrained=True (--untrained)",
  ),
  (("--grid", "--dim=16"), "--dim: --grid scores all trained sizes; give one of the two"),
  (("--tasks=mteb:STS17", "--precision=int8"), "--precision: tasks of MTEB have trained sizes"),
  (("--tasks=",), "--tasks: an empty name"),
]


@pytest.mark.parametrize(("flags", "message"), REFUSALS)
def test_sizes_that_cannot_be_meant_are_refused(exported, data, tmp_path, flags, message):
  result = run(exported["full"], data / "heldout", tmp_path, *flags)
  assert (result.returncode, result.stdout) == (1, "")
  assert result.stderr.startswith(f"error: {message}"), result.stderr


def test_what_is_no_model_or_no_task_is_refused(exported, data, tmp_path):
  for model, folder, message in (
    (data, data / "heldout", "config.json"),
    (exported["full"], f"{data}/heldout,{data}/heldout", "heldout/bitext.parquet comes twice"),
  ):
    result = run(model, folder, tmp_path)
    assert result.returncode == 1 and result.stderr.startswith("error: "), result.stderr
    assert message in result.stderr and "Traceback" not in result.stderr


def test_where_scores_cannot_be_written_is_said_first(exported, data, tmp_path):
  (tmp_path / "file").touch()
  for out, message in (
    (tmp_path / "file", "is not writable: it is a file"),
    (exported["full"] / "scores", "lies in the model's folder"),
  ):
    result = run(exported["full"], data / "heldout", out)
    assert result.returncode == 1 and result.stderr.startswith("error: --out: "), result.stderr
    assert message in result.stderr
  assert not (exported["full"] / "scores").exists()


def test_tasks_that_cannot_be_meant_are_refused_before_the_model_is_loaded(data, tmp_path):
  shutil.copytree(data / "heldout", tmp_path / "t/heldout")
  shutil.copy(data / "manifest.json", tmp_path / "t/manifest.json")
  for wrong, message in (
    ([], "an empty list"),
    ([""], "an empty list or name"),
    (str(data / "heldout"), "is a single name; give a list"),
    (data / "heldout", "is a single name; give a list"),
    ([data / "heldout"] * 2, "heldout/bitext.parquet comes twice"),
    ([data / "heldout", tmp_path / "t/heldout"], "heldout/bitext.parquet comes twice"),
  ):
    with pytest.raises(ConfigError, match=f"^tasks: .*{message}"):
      evaluate_model("no model", wrong, tmp_path / "out")
  with pytest.raises(DataError, match=r"^tasks: .* is no folder"):
    evaluate_model("no model", [tmp_path / "none"], tmp_path / "out")
  assert not (tmp_path / "out").exists()


def test_languages_have_keys_or_their_tags(exported, data, tmp_path):
  folder, heldout, cut = str(exported["full"]), [data / "heldout"], Slice(dim=16)
  with pytest.raises(ConfigError, match=r"^language_key: 'script' is not one of"):
    evaluate_model(folder, heldout, tmp_path, cut, language_key="script")
  keys = evaluate_model(folder, heldout, tmp_path, cut)
  tags = evaluate_model(folder, heldout, tmp_path, cut, language_key="as-written")
  again = evaluate_model(folder, heldout, tmp_path, cut)
  assert list(tags.scores[0].by_language) == ["de", "hi", "ru", "zh"]
  assert list(keys.scores[0].by_language) == ["deu-Latn", "hin-Deva", "rus-Cyrl", "zho-Hans"]
  assert again.scores == keys.scores
  assert [score.score for score in tags.scores] == [score.score for score in keys.scores]


def test_python_names_out_and_cut_in_errors(exported, data, tmp_path):
  (tmp_path / "file").touch()
  for out, cut, message in (
    (exported["full"] / "scores", None, "out: .* lies in the model's folder"),
    (tmp_path / "file", None, "out: .* is not writable: it is a file"),
    (tmp_path / "out", Slice(depth=2), "cut: depth: 2 was not trained"),
  ):
    with pytest.raises(ConfigError, match=f"^{message}"):
      evaluate_model(str(exported["full"]), [data / "heldout"], out, cut)
  assert not (exported["full"] / "scores").exists()


def test_the_command_names_the_flag_of_a_folder_without_tasks(exported, tmp_path):
  result = run(exported["full"], tmp_path, tmp_path / "out")
  assert result.stderr.startswith(f"error: --tasks: neither {tmp_path} nor the folder above")


def test_vectors_that_are_not_finite_name_the_task(exported, data, tmp_path):
  broken = shutil.copytree(exported["full"], tmp_path / "broken")
  weights = safetensors.numpy.load_file(broken / "model.safetensors")
  weights["norm.weight"][:] = 3e38  # times a normed state above 1: infinite
  safetensors.numpy.save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
  write_parquet(tmp_path / "t/a.parquet", {"lang": ["de"], "text": ["eins"], "en": ["one"]})
  listed = {"a.parquet": entry("bitext", 0, "Do.")}
  (tmp_path / "t/manifest.json").write_text(json.dumps(listed))
  result = run(broken, tmp_path / "t", tmp_path / "out")
  assert result.returncode == 1
  assert "error: a.parquet: texts[0] and 1 more have vectors that are not finite" in result.stderr
