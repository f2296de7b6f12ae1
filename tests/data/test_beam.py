"""The pipeline writes what the processes of one machine write, to the last byte."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from tests.material import entry, pairs, prepare_dataset, train_tokenizer, write_parquet

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
  folder = tmp_path_factory.mktemp("corpus")
  write_parquet(folder / "train/a.parquet", pairs(150, 4))
  (folder / "train/b.jsonl").write_text(
    "".join(
      json.dumps({"query": f"question {i}", "passage": f"answer {i}", "lang": "en"}) + "\n"
      for i in range(120)
    )
    + "no JSON\n"
  )
  manifest = {
    "train/a.parquet": entry("bitext", 4, "Translate."),
    "train/b.jsonl": entry("retrieval", 0, "Answer."),
  }
  (folder / "manifest.json").write_text(json.dumps(manifest))
  train_tokenizer(600).save(str(folder / "tokenizer.json"))
  return folder


def run(folder, out, *flags):
  command = [
    *(sys.executable, "-m", "mlembed_jax.prepare", "--beam_options", "--runner=DirectRunner"),
    *("--manifest", folder / "manifest.json", "--tokenizer", folder / "tokenizer.json"),
    *("--out", out, *flags),
  ]
  return subprocess.run(
    list(map(str, command)),
    cwd=ROOT,
    env=os.environ | {"JAX_PLATFORMS": "cpu"},
    capture_output=True,
    text=True,
  )


def contents(folder):
  return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_the_pipeline_writes_the_same_bytes(corpus, tmp_path, scheme):
  result = run(corpus, f"{scheme}{tmp_path / 'out'}")
  assert result.returncode == 0, result.stderr
  expected = prepare_dataset(corpus)
  assert contents(tmp_path / "out") == contents(expected)


def test_unusable_rows_stop_the_pipeline_before_texts_are_written(corpus, tmp_path):
  result = run(corpus, tmp_path / "out", "--max_dropped_share", "0.001")
  assert result.returncode == 1
  assert "train/b.jsonl: 1 of 121 rows cannot be used" in result.stderr
  assert [path.name for path in (tmp_path / "out").iterdir()] == ["prepare_report.json"]


def test_a_folder_with_files_is_refused(corpus, tmp_path):
  (tmp_path / "file").touch()
  result = run(corpus, tmp_path)
  assert result.returncode == 1 and f"--out: {tmp_path} is not empty" in result.stderr
