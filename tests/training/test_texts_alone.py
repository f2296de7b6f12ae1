"""Training on texts alone, of which only a teacher says something: from files to an update."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest

from mlembed_jax import train_model
from mlembed_jax.config import from_mapping, load_config
from mlembed_jax.data import catalog, token_use
from mlembed_jax.data.tokenizer import Vocabulary
from mlembed_jax.errors import ConfigError, DataError
from mlembed_jax.hf import recipe, trim
from mlembed_jax.hf.checks import examine
from mlembed_jax.hf.checks.finding import ERROR, WARNING
from mlembed_jax.workdir import Run
from tests.material import (
  batches_of,
  config_dict,
  entry,
  pairs,
  prepare_dataset,
  sentences,
  train_tokenizer,
  write_files,
)
from tests.runs import ENVIRONMENT, ROOT, assert_same_state, lines

ALONE = entry("text", 0, "")
TEXTS = [text for lang in ("de", "zh") for text in sentences(lang)[:120]]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
  """A prepared folder with texts of three forms and pairs."""
  folder = tmp_path_factory.mktemp("alone")
  write_files(folder, {"train/pairs.parquet": (pairs(96, 2), entry("bitext", 2, "Translate."))})
  (folder / "train/lines.txt").write_text("\n\n".join(TEXTS), encoding="utf-8")  # blank lines, too
  rows = [json.dumps({"text": text, "lang": "de"}) for text in TEXTS[:60]]
  (folder / "train/rows.jsonl").write_text("\n".join(rows), encoding="utf-8")
  manifest = json.loads((folder / "manifest.json").read_text())
  manifest |= {"train/lines.txt": ALONE | {"lang": "mul"}, "train/rows.jsonl": ALONE}
  (folder / "manifest.json").write_text(json.dumps(manifest))
  train_tokenizer(600).save(str(folder / "tokenizer.json"))
  prepare_dataset(folder)
  return folder


def test_a_row_is_one_text(alone):
  opened = catalog.load_catalog(alone / "dataset")
  assert sum(shard.written.records for shard in opened.shards["train"]) > 350
  batches = batches_of(alone / "dataset", ["train/lines.txt", "train/rows.jsonl"], steps=4)
  for step in range(4):
    batch = batches[step]
    assert batch.kind.texts == 1 and batch.kind.is_text
    assert batch.hashes.shape == (len(batch.rows), 1, 2)
  assert {language for s in range(4) for language in batches[s].languages} <= {"mul", "de"}


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"negatives": 1}, "negatives: must be 0 for text, and positives left out"),
    ({"positives": 2}, "negatives: must be 0 for text, and positives left out"),
    ({"symmetric": True}, "symmetric: text has no documents; leave it out"),
    (
      {"teacher_vectors": {"query": "a.npy", "passage": "b.npy"}},
      "teacher_vectors: 'passage' is unknown; known: query",
    ),
  ],
)
def test_what_texts_alone_cannot_have_is_refused(tmp_path, change, message):
  write_files(tmp_path, {"train/a.parquet": ({"text": TEXTS}, ALONE | change)})
  train_tokenizer(600).save(str(tmp_path / "tokenizer.json"))
  with pytest.raises(DataError, match=message):
    prepare_dataset(tmp_path)


SMALL = {
  "data.lengths": "(32,)",
  "data.global_batch": 8,
  "data.workers": 0,
  "model.dtype": "float32",
  "train.epochs": 0.0,
  "train.log_every": 1,
  "train.trackers": "()",
  "optimizer.warmup_steps": 1,
  "export.at_end": True,
}


def elastic(alone, teacher, workdir, **fields):
  """Trains an elastic copy by the configuration file, and returns the lines of its metrics."""
  flags = SMALL | {"data.dataset": alone / "dataset"} | fields
  command = [sys.executable, "-m", "mlembed_jax.train", "--config", f"configs/elastic.py:{teacher}"]
  command += ["--workdir", workdir, *(f"--config.{name}={value}" for name, value in flags.items())]
  done = subprocess.run(
    list(map(str, command)), cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr
  return lines(workdir)


@pytest.fixture(scope="module")
def embedder(exported, tmp_path_factory):
  """An embedder of someone else, with prompts of its own."""
  folder = shutil.copytree(exported["full"], tmp_path_factory.mktemp("embedder") / "theirs")
  (folder / "mlembed.json").unlink()
  path = folder / "config_sentence_transformers.json"
  path.write_text(json.dumps(json.loads(path.read_text()) | {"prompts": {"query": "find: "}}))
  return folder


def test_an_encoder_learns_to_be_its_teacher_at_every_exit(alone, embedder, tmp_path):
  teacher = embedder
  exits = {"matryoshka.exits": "(1,3)", "train.steps": 6}
  found = elastic(alone, teacher, tmp_path / "w", **exits)
  assert len(found) == 6
  for line in found:
    terms = {name for name in line if name.endswith("_loss")}
    assert terms == {"distillation_loss", "prefix_loss", "similarity_loss"}
    assert np.isfinite(line["loss"])
  files = {name for line in found for name in line["loss_by_dataset"]}
  assert len(files) > 1 and files <= {"train/lines.txt", "train/rows.jsonl", "train/pairs.parquet"}
  # What stood before texts of the teacher stands before those of the copy.
  (copy,) = (tmp_path / "w/export").iterdir()
  assert copy.name == "theirs-elastic"
  prompts = {"query": "find: ", "document": ""}
  assert recipe.stated_prompts(copy) == prompts
  assert not [f for f in examine.examine(copy) if f.level in (ERROR, WARNING)]
  assert "| kd.similarity | 1.0 |" in (copy / "README.md").read_text()
  assert found[0]["loss"] > 0.1


def test_a_copy_with_fewer_tokens_begins_as_its_teacher_and_goes_on_exactly(
  alone, embedder, tmp_path
):
  """In full there is nothing to learn."""
  use = token_use.of_texts(Vocabulary(embedder / "tokenizer.json"), TEXTS)
  small, ids = trim.write_tokenizer(
    tmp_path / "small.json", Vocabulary(embedder / "tokenizer.json"), use, (), None
  )
  assert len(ids) < 384
  prepare_dataset(alone, "train/lines.txt", small, out="few")
  whole = {"matryoshka.exits": "(3,)", "matryoshka.dims": "(48,)", "model.vocab": 384}
  whole |= {"data.dataset": alone / "few", "train.steps": 10, "train.checkpoint_every": 5}
  found = elastic(alone, embedder, tmp_path / "w", **whole)
  assert len(found) == 10 and all(line["loss"] < 1e-4 for line in found[:2])
  shutil.copytree(tmp_path / "w", tmp_path / "again")
  shutil.rmtree(tmp_path / "again/checkpoints/10")
  elastic(alone, embedder, tmp_path / "again", **whole)
  assert_same_state(tmp_path / "w", tmp_path / "again", 10)
  assert Run.load(tmp_path / "again").prompts == {"query": "find: "}


def test_blank_lines_are_no_texts(tmp_path, capsys):
  write_files(tmp_path, {"train/a.parquet": ({"text": TEXTS}, ALONE)})
  entries = json.loads((tmp_path / "manifest.json").read_text()) | {"train/b.txt": ALONE}
  (tmp_path / "manifest.json").write_text(json.dumps(entries))
  (tmp_path / "train/b.txt").write_text("\n \n\n")
  train_tokenizer(600).save(str(tmp_path / "tokenizer.json"))
  with pytest.raises(DataError, match=r"train/b.txt has only blank lines; leave it out of the man"):
    prepare_dataset(tmp_path)
  (tmp_path / "train/b.txt").write_text("\n \n" + "\n".join(TEXTS))
  prepare_dataset(tmp_path, out="again")
  assert f"train/b.txt: {len(TEXTS)} rows, and 2 blank lines" in capsys.readouterr().out


def test_a_configuration_of_no_source_is_refused():
  with pytest.raises(ConfigError, match=r"elastic.py:: no SOURCE after the colon"):
    load_config("configs/elastic.py:")


def test_a_folder_that_ends_texts_with_nothing_has_no_elastic_copy(exported, tmp_path):
  folder = tmp_path / "folder"
  shutil.copytree(exported["full"], folder)
  (folder / "mlembed.json").unlink()
  spec = json.loads((folder / "tokenizer.json").read_text())
  (folder / "tokenizer.json").write_text(json.dumps(spec | {"post_processor": None}))
  with pytest.raises(ConfigError, match="puts no token after a text"):
    load_config(f"configs/elastic.py:{folder}")


def test_texts_alone_need_a_teacher(alone, tmp_path):
  config = from_mapping(config_dict(alone, **{"data.heldout": (), "data.manifest": ""}))
  with pytest.raises(ConfigError, match=r"data.train: train/lines.txt has texts alone, of which"):
    train_model(config, tmp_path / "w")
