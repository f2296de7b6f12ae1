"""Whatever a file of a stranger holds, a parser reads it, or says in its own words what is wrong.

The short form makes the same few files each time; `--faults=long` makes 100 times as many.
"""

import json
import pathlib
import re
import shutil
import struct
import subprocess
import sys

import hypothesis
import pyarrow as pa
import pytest
from hypothesis import strategies as st

from mlembed_jax.data import catalog, manifest
from mlembed_jax.data.parquet_files import Columns
from mlembed_jax.data.tables import read_tables
from mlembed_jax.errors import MlembedError
from mlembed_jax.eval.evaluation import Evaluation
from mlembed_jax.eval.scoring import TaskScores
from mlembed_jax.files import write_json
from mlembed_jax.hf import own_file, stored_ranges
from mlembed_jax.hf.folder import open_file, open_model_folder, read_model, read_positions
from mlembed_jax.inference import Encoder
from mlembed_jax.slice_scores import SliceScore
from mlembed_jax.training import metrics
from mlembed_jax.workdir import Run, StepScores
from tests.faults.mutants import changed, damaged, json_files
from tests.material import pairs

ROOT = pathlib.Path(__file__).parents[2]
SHORT, LONG = 40, 4000  # files of each kind


@pytest.fixture(scope="session")
def examples(request):
  """Runs a function on files that a strategy draws; what it raises must be ours, and name one."""
  long = request.config.getoption("--faults") == "long"

  def run(strategy, path, parse, share=1.0):
    counts = {"read": 0, "refused": 0}

    @hypothesis.settings(
      max_examples=max(1, int((LONG if long else SHORT) * share)),
      derandomize=not long,
      deadline=None,
      database=None,
      suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(strategy)
    def one(content):
      path.write_bytes(content)
      try:
        parse()
        counts["read"] += 1
      except MlembedError as error:
        named = (path.name, *map(str, path.parents[:2]))
        assert any(name in str(error) for name in named), error
        assert len(str(error)) < 10_000
        counts["refused"] += 1

    one()
    print(f"{path.name}: {counts['read']:,} read, {counts['refused']:,} refused, 0 crashed")
    return counts

  return run


@pytest.fixture
def folder(exported, tmp_path):
  return pathlib.Path(shutil.copytree(exported["cut"], tmp_path / "folder"))


def value_of(path):
  return json.loads(path.read_text(encoding="utf-8"))


def opened(folder):
  """Opens a folder as Encoder.load and training do."""
  open_model_folder(folder, read_model(folder))
  read_positions(folder)


def test_config_json(folder, examples):
  path = folder / "config.json"
  examples(json_files(value_of(path)), path, lambda: opened(folder))


@pytest.mark.parametrize(
  "name",
  [
    "config_sentence_transformers.json",
    "sentence_bert_config.json",
    "modules.json",
    "1_Pooling/config.json",
    "2_Dense/config.json",
    "tokenizer_config.json",
    "mlembed.json",
  ],
)
def test_small_files_of_a_folder(name, folder, examples):
  path = folder / name
  examples(json_files(value_of(path)), path, lambda: Encoder.load(folder), 0.5)


def test_tokenizer_json(folder, examples):
  path = folder / "tokenizer.json"
  model = value_of(path)
  rest = {name: field for name, field in model.items() if name != "model"}
  some = changed(rest).map(lambda made: json.dumps({"model": model["model"]} | made).encode())
  examples(st.one_of(some, json_files(model)), path, lambda: Encoder.load(folder), 0.5)


def test_mlembed_json(folder, examples):
  path = folder / "mlembed.json"
  counts = examples(json_files(value_of(path)), path, lambda: own_file.read(folder))
  assert counts["refused"]


def read_all(folder):
  for _, tensor in open_model_folder(folder, read_model(folder)).tensors:
    tensor.read()


def with_header(header, data):
  return struct.pack("<Q", len(header)) + header + data


def test_safetensors(folder, examples):
  path = folder / "model.safetensors"
  content = path.read_bytes()
  size = struct.unpack("<Q", content[:8])[0]
  header, data = content[8 : 8 + size], content[8 + size :]
  some = json_files(json.loads(header)).map(lambda made: with_header(made, data))
  counts = examples(st.one_of(some, damaged(content)), path, lambda: read_all(folder))
  assert counts["refused"]


def test_stored_ranges(folder, examples):
  path = folder / stored_ranges.FILE
  content = path.read_bytes()
  examples(damaged(content), path, lambda: stored_ranges.read(folder))


def test_index_of_safetensors(folder, examples):
  whole = open_file(folder / "model.safetensors")
  (folder / "model.safetensors").rename(folder / "model-1.safetensors")
  path = folder / "model.safetensors.index.json"
  value = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(whole, "model-1.safetensors")}
  write_json(path, value)
  opened(folder)
  examples(json_files(value), path, lambda: opened(folder))


@pytest.fixture
def workdir(tmp_path, tiny):
  Run(tiny, {"a": {"task_type": "bitext"}}, {"dataset": "d", "units": {"a en": [1, 2]}}).save(
    tmp_path
  )
  StepScores(3, {"a": "1"}, [SCORE]).save(tmp_path)
  return tmp_path


SCORE = SliceScore("a", "f1", 0, 2, 16, "int8", 0.5, {"en": 0.5}, {"accuracy": 0.25})


def test_run_json(workdir, examples):
  path = workdir / "run.json"
  value = {name: field for name, field in value_of(path).items() if name != "sha256"}
  examples(json_files(value), path, lambda: Run.load(workdir).fingerprint)


def test_scores_of_a_step(workdir, examples):
  path = workdir / "eval/step_3.json"
  value = {name: field for name, field in value_of(path).items() if name != "sha256"}
  examples(json_files(value), path, lambda: StepScores.load(workdir, 3))


def test_scores_json(tmp_path, examples):
  score = {"task": "a", "metric": "f1", "rank": 0, "depth": 2, "dim": 16, "precision": "int8"}
  score |= {"score": 0.5, "by_language": {"en": 0.5}, "others": {}}
  cost = {"rank": 0, "depth": 2, "count": 10, "flops_per_token": 2.5}
  value = {
    "model": "m",
    "precisions": ["int8"],
    "tasks": [{"name": "a", "type": "bitext", "metric": "f1", "texts": 5, "languages": 1}],
    "scores": [score],
    "costs": {
      "parameters": [cost],
      "latency_ms": [{"depth": 2, "ms": 1.5, "tokens": 32}],
      "device": "cpu",
    },
    "skipped": {"texts_truncated": 0},
  }
  path = tmp_path / "scores.json"
  write_json(path, value)
  assert Evaluation.load(path).scores[0].dim == 16
  examples(json_files(value), path, lambda: Evaluation.load(path))
  value = {"scores": [score], "truncated": 0}
  examples(json_files(value), path, lambda: TaskScores.load(path))


def test_metrics(tmp_path, examples):
  path = tmp_path / "metrics.jsonl"
  lines = [{"step": n, "loss": 0.5, "task": {"a": 1}} for n in (1, 2, 3)]
  some = st.tuples(*(json_files(line) for line in lines)).map(b"\n".join)
  examples(some, path, lambda: metrics._keep_lines_to(path, 2))


def test_manifest(data, tmp_path, examples):
  path = tmp_path / "manifest.json"
  value = value_of(data / "manifest.json")
  examples(json_files(value), path, lambda: manifest.select(str(path), ["*"], "data.train"))


@pytest.mark.parametrize("new", [pa.ipc.new_stream, pa.ipc.new_file])
def test_arrow_files(tmp_path, examples, new):
  columns = pa.table(pairs(20, 1))
  columns = columns.set_column(3, "lang", columns["lang"].dictionary_encode())
  sink = pa.BufferOutputStream()
  with new(sink, columns.schema) as writer:
    writer.write_table(columns, max_chunksize=7)
  path = tmp_path / "a.arrow"
  wanted = Columns(["query", "passage"], ["lang"])
  content = damaged(sink.getvalue().to_pybytes())
  counts = examples(content, path, lambda: list(read_tables(str(path), wanted, 8)))
  assert counts["refused"]


def test_catalog(data, tmp_path, examples):
  for file in (data / "dataset").iterdir():
    (tmp_path / file.name).symlink_to(file)
  path = tmp_path / "catalog.json"
  later = ("files", "cut_texts", "sha256")  # fields that 0.1.0 did not write: no digest protects it
  value = {name: field for name, field in value_of(path).items() if name not in later}
  path.unlink()
  write_json(path, value)
  assert catalog.load_catalog(tmp_path).fingerprint == value["fingerprint"]
  examples(json_files(value), path, lambda: catalog.load_catalog(tmp_path))


def test_tensors_of_torch(request, tmp_path):
  """In a process of its own, which gets no more than 300 MB beside what it has."""
  count = LONG if request.config.getoption("--faults") == "long" else 3 * SHORT
  command = [sys.executable, "-m", "tests.faults.fuzz_torch_file", str(count), str(tmp_path)]
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr[-3000:]
  print(done.stdout)
  assert re.search(r"[1-9][\d,]* read, [1-9][\d,]* refused, 0 crashed", done.stdout)
