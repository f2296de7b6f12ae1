"""The train command, as real processes: outputs, the export of a run, and every refusal."""

import collections
import json
import re
import shutil
import subprocess
import sys
import types

import jax
import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from mlembed_jax import evaluate_model, export_model, train_model
from mlembed_jax.config import from_mapping
from mlembed_jax.errors import ConfigError, DataError, MlembedError
from mlembed_jax.eval import tasks
from mlembed_jax.eval.evaluation import Evaluation
from mlembed_jax.inference import Encoder
from mlembed_jax.matryoshka import Slice
from mlembed_jax.slice_scores import Size
from mlembed_jax.training import loop
from mlembed_jax.training.saved import load_newest_params
from tests import runs
from tests.material import config_dict, pairs, sentences
from tests.runs import (
  ENVIRONMENT,
  ROOT,
  TIMES,
  assert_same_state,
  export,
  lines,
  run,
)

twenty = runs.twenty


def test_metrics_lines_are_complete(twenty):
  assert [line["step"] for line in lines(twenty)] == list(range(1, 21))
  for line in lines(twenty):
    inbatch = {"inbatch_loss"} if "train/bitext.parquet" in line["loss_by_dataset"] else set()
    assert set(line) == inbatch | {
      *("step", "loss", "hard_loss", "loss_by_dataset", "learning_rate", "temperature"),
      *(
        "gradient_norm",
        "rank",
        "negatives",
        "empty_rows",
        "padding_share",
        "nonfinite_steps",
        *TIMES,
      ),
    }
    assert line["loss"] > 0 and line["tokens_per_second"] > 0 and 0 <= line["padding_share"] < 1
    assert line["rank"] in (8, 16, 24) and 0 <= line["data_wait_share"] <= 1
  datasets = {name for line in lines(twenty) for name in line["loss_by_dataset"]}
  assert datasets == {f"train/{name}.parquet" for name in ("bitext", "topics", "colours")}


def scalars(folder):
  """Returns {tag: steps} of all files; a record is length, checksum, data, checksum."""
  found = collections.defaultdict(list)
  for path in sorted(folder.glob("events.*")):
    data = path.read_bytes()
    while data:
      size = int.from_bytes(data[:8], "little")
      event = event_pb2.Event.FromString(data[12 : 12 + size])
      for value in event.summary.value:
        found[value.tag].append(event.step)
      data = data[size + 16 :]
  return found


def test_a_whole_run_evaluates_and_exports(data, tmp_path, capsys):
  flags = {"export.at_end": True, "train.steps": 4, "data.heldout": "('heldout/*',)"}
  flags |= {"data.manifest": data / "manifest.json", "data.workers": 2}
  flags |= {"train.trackers": "('tensorboard',)"}
  result = run(data, tmp_path / "work", **flags)
  assert result.returncode == 0, result.stderr
  assert (tmp_path / "work/export/tiny/model.safetensors").is_file()
  assert (tmp_path / "work/export/tiny/mlembed/ranges.safetensors").is_file()
  for part in ("heldout/bitext.parquet, f1", "heldout/colours.parquet, accuracy", "| rank |"):
    assert part in result.stdout
  assert f'SentenceTransformer("{tmp_path}/work/export/tiny")' in result.stdout
  for step in (0, 4):
    scores = json.loads((tmp_path / f"work/eval/step_{step}.json").read_text())["scores"]
    assert len(scores) == 2 * 3 * 3 * 3
  assert "loss" in scalars(tmp_path / "work/tensorboard")
  board = scalars(tmp_path / "work/tensorboard/eval")
  for cut in ("full", "depth_1", "dim_8", "rank_8"):
    assert board[f"heldout/bitext.parquet/f1/{cut}"] == [0, 4]
  again = run(data, tmp_path / "work", **flags)
  assert again.returncode == 0
  assert result.stdout.count("scoring every slice") == 2
  assert "scoring every slice" not in again.stdout
  start = again.stdout.index("\nheldout/bitext.parquet, f1")
  tables, goodput = again.stdout[start:].rsplit("\n", 2)[:2]
  assert tables in result.stdout
  assert goodput.startswith("2 starts, ") and "training" in goodput
  first = tmp_path / "work/eval/step_0.json"
  value = json.loads(first.read_text())
  del value["sha256"]
  value["tasks"]["heldout/bitext.parquet"] = "0" * 64  # as if the file had been changed since
  first.write_text(json.dumps(value))
  inputs = types.SimpleNamespace(tasks=tasks.load_folder(data / "heldout"))
  loop._report_scores(types.SimpleNamespace(workdir=tmp_path / "work", inputs=inputs), 4)
  bitext, colours = capsys.readouterr().out.split("\nheldout/colours.parquet")
  assert "f1 in percent, after training; it was another file before" in bitext
  assert "| – → " in bitext and "–" not in colours and "before → after training" in colours


def test_steps_that_are_not_finite_are_named_and_too_many_end_the_run(data, tmp_path):
  kinds = ("bitext", "clustering", "classification")
  for_all = {
    f"losses.{kind}.{name}": 1e-39
    for kind in kinds
    for name in ("temperature", "final_temperature")
  }
  result = run(data, tmp_path, **for_all)
  assert result.returncode == 1 and "error: step " in result.stderr
  assert "Traceback" not in result.stderr
  assert not [p for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()]
  found = [json.loads(line) for line in (tmp_path / "nonfinite.jsonl").read_text().splitlines()]
  assert [line["step"] for line in found] == [1, 2, 3, 4, 5]  # train.max_nonfinite_steps
  for line in found:
    assert f"({line['dataset']}, rows {line['rows'][0]}, {line['rows'][1]}, " in result.stderr
    assert len(set(line["rows"])) == 16
  assert "5 in a row" in result.stderr and "--skip_steps" in result.stderr
  assert "There is no checkpoint yet, which --skip_steps needs" in result.stderr


@pytest.mark.parametrize(
  ("overrides", "message"),
  [
    (
      {"data.manifest": "/absent.json", "data.heldout": ("heldout/*",)},
      "/absent.json does not exist",
    ),
    ({"data.dataset": "/absent"}, "data.dataset: /absent is no prepared dataset; write"),
    ({"data.train": ("nothing/*",)}, "data.train: 'nothing/*' matches no file"),
    ({"data.pooled_token": "<|x|>"}, "tokenizer.json has no token '<|x|>'"),
    (
      {"data.global_batch": 128},
      "an epoch has fewer of its rows than data.global_batch = 128; low",
    ),
    ({"data.max_rows": 8}, "an epoch has fewer of its rows than data.global_batch = 16; lower"),
    ({"model.vocab": 500}, "model.vocab: 500 rows are fewer than the"),
    ({"mesh.fsdp": 3}, "mesh: data 1 x fsdp 3"),
    ({"train.profile_steps": (19, 21)}, "train.profile_steps: (19, 21) ends after the run, which"),
    ({"model.heads": 3}, "model.heads: 3 is not a multiple of model.kv_heads = 2"),
    ({"optimizer.warmup_steps": 21}, "optimizer.warmup_steps: 21 is longer than the run"),
    ({"train.init_from": "/absent"}, "/absent"),
  ],
  ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_input_is_refused_before_any_work(data, tmp_path, overrides, message):
  overrides = {"data.heldout": (), "data.manifest": ""} | overrides
  with pytest.raises(MlembedError, match=re.escape(message)):
    train_model(from_mapping(config_dict(data, **overrides)), tmp_path / "work")
  assert not list(tmp_path.glob("work/checkpoints/*"))


@pytest.mark.parametrize(
  ("overrides", "message"),
  [
    ({"data.dataset": "/absent"}, "error: data.dataset: /absent is no prepared dataset; write"),
    ({"model.heads": 3}, "error: model.heads: 3 is not a multiple of model.kv_heads = 2"),
    ({"model.widht": 3}, "error: --config: unknown field 'widht'"),
    ({"model.qk_norm": False}, "unknown field 'qk_norm'; did you mean family?"),
    ({"model.width": "wide"}, "model.width"),
  ],
  ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_the_command_ends_with_one_sentence(data, tmp_path, overrides, message):
  result = run(data, tmp_path / "work", **overrides)
  assert result.returncode != 0
  assert message in result.stderr
  assert "Traceback" not in result.stderr
  assert not list(tmp_path.glob("work/checkpoints/*"))


def test_export_cuts_the_newest_checkpoint(twenty, tmp_path):
  cut = ("--depth", 2, "--rank", 16, "--dim", 8)
  result = export("--checkpoint", twenty, "--out", tmp_path / "cut", *cut)
  assert result.returncode == 0, result.stderr
  ours = json.loads((tmp_path / "cut/mlembed.json").read_text())
  assert ours["name"] == "tiny-d8-l2-r16" and ours["training"]["step"] == 20
  assert ours["exits"]["exported"] == 2 and ours["table"]["rank_exported"] == 16


def test_export_writes_variants_beside_the_folder(twenty, tmp_path):
  variants = ("--variants", "d8-l2,r16-uv", "--name", "mine")
  result = export("--checkpoint", twenty, "--out", tmp_path / "m", *variants)
  assert result.returncode == 0, result.stderr
  found = {p.name: json.loads((p / "mlembed.json").read_text()) for p in tmp_path.iterdir()}
  assert {name: ours["name"] for name, ours in found.items()} == {
    "m": "mine",
    "m-d8-l2": "mine-d8-l2",
    "m-r16-uv": "mine-r16-uv",
  }
  assert [found[name]["table"]["form"] for name in sorted(found)] == ["merged", "merged", "uv"]


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    (("--depth", 4), "error: depth 4"),
    (("--dim", 9), "error: dim 9"),
    (("--rank", 5), "error: rank 5"),
    (("--variants", "d8,l4"), "depth 4 was not trained"),
    (("--variants", "d8,8l"), "'8l' is no variant"),
  ],
)
def test_untrained_cuts_are_refused(twenty, tmp_path, flags, message):
  result = export("--checkpoint", twenty, "--out", tmp_path / "cut", *flags)
  assert result.returncode == 1 and message in result.stderr
  assert "Traceback" not in result.stderr and not list(tmp_path.iterdir())


@pytest.mark.parametrize("folder", ["model", "dataset", "files"])
def test_a_folder_of_something_else_is_no_workdir(data, exported, tmp_path, folder):
  found = {"model": exported["full"], "dataset": data / "dataset", "files": data}[folder]
  copied = shutil.copytree(found, tmp_path / folder)
  before = {path: path.stat().st_mtime_ns for path in copied.rglob("*")}
  result = run(data, copied)
  assert result.returncode == 1 and "Traceback" not in result.stderr
  said = {"model": "a model (config", "dataset": "a prepared dataset (cat", "files": "files to pre"}
  assert f"error: --workdir: {copied} holds {said[folder]}" in result.stderr
  assert before == {path: path.stat().st_mtime_ns for path in copied.rglob("*")}


def test_export_of_what_is_no_workdir_is_refused(tmp_path):
  result = export("--checkpoint", tmp_path, "--out", tmp_path / "out")
  assert result.returncode == 1
  assert "has no run.json; this is not a workdir that a training run wrote" in result.stderr


@pytest.mark.parametrize(
  ("flag", "message"),
  [
    ("configs/none.py", "error: --config: "),
    (
      "configs/8b.py:refrence",
      "error: --config: configs/8b.py:refrence: unknown variant 'refrence'; known: reference",
    ),
  ],
)
def test_a_configuration_that_cannot_be_read_is_refused(tmp_path, flag, message):
  result = subprocess.run(
    [sys.executable, "-m", "mlembed_jax.train", "--config", flag, "--workdir", str(tmp_path / "w")],
    cwd=ROOT,
    env=ENVIRONMENT,
    capture_output=True,
    text=True,
  )
  assert result.returncode != 0 and message in result.stderr
  assert "Traceback" not in result.stderr


def test_an_unwritable_workdir_is_refused(data, tmp_path):
  (tmp_path / "file").touch()
  result = run(data, tmp_path / "file" / "work")
  assert result.returncode == 1
  assert f"error: --workdir: {tmp_path}/file/work is not writable" in result.stderr


def test_a_workdir_that_is_a_url_is_refused(data):
  result = run(data, "gs://bucket/run")
  assert result.returncode == 1 and not (ROOT / "gs:").exists()
  assert "error: --workdir: gs://bucket/run is not a path" in result.stderr


def test_help_is_short_and_complete():
  result = subprocess.run(
    [sys.executable, "-m", "mlembed_jax.train", "--help"],
    cwd=ROOT,
    env=ENVIRONMENT,
    capture_output=True,
    text=True,
  )
  assert "--config" in result.stdout and "--workdir" in result.stdout
  assert len(result.stdout.splitlines()) < 45


def test_training_starts_from_an_exported_folder(data, twenty, tmp_path):
  """The first update has rate 0, so one step leaves the imported parameters as they were."""
  assert export("--checkpoint", twenty, "--out", tmp_path / "folder").returncode == 0
  start = {"train.init_from": tmp_path / "folder", "train.steps": 1, "optimizer.warmup_steps": 0}
  assert run(data, tmp_path / "work", **start).returncode == 0
  (_, expected), (step, found) = (load_newest_params(w) for w in (twenty, tmp_path / "work"))
  assert step == 1
  jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_what_is_refused_leaves_the_workdir_as_it_was(data, tmp_path):
  scores = tmp_path / "eval" / "step_0.json"
  scores.parent.mkdir()
  scores.touch()
  config = from_mapping(config_dict(data, **{"optimizer.warmup_steps": 21, "train.steps": 20}))
  with pytest.raises(ConfigError, match=r"optimizer.warmup_steps: 21 is longer than the run"):
    train_model(config, tmp_path)
  assert scores.exists() and not (tmp_path / "tokenizer.json").exists()


def check_kept_tokens(workdir, out):
  """Exports of a run on `pairs` keep the tokens of its rows in some languages, or of a file."""
  texts = out.with_suffix(".txt")
  texts.write_text("\n".join(sentences("de")))
  with pytest.raises(ConfigError, match="keep_texts, keep_tokens: no variant has v"):
    export_model(workdir, out, keep_tokens=300)
  with pytest.raises(DataError, match=r"^variants with v, .* no swa-Latn; they have .*deu-Latn"):
    export_model(workdir, out, variants="v-de-sw")
  with pytest.raises(DataError, match=r"keep_texts: /none.txt does not exist"):
    export_model(workdir, out, variants="v", keep_texts="/none.txt")
  (empty := out.with_suffix(".jsonl")).touch()
  with pytest.raises(DataError, match=r"keep_texts: .*.jsonl has no texts"):
    export_model(workdir, out, variants="v", keep_texts=empty)
  with pytest.raises(DataError, match=r"variants with v, keep_texts, keep_tokens: 9 tokens are"):
    export_model(workdir, out, variants="v", keep_tokens=9)
  assert not out.exists()
  whole, german, all_, cut = export_model(workdir, out, variants=("v-de", "v", "v-zh-d48-l2"))
  other = out.with_name("other")
  _, of_file = export_model(workdir, other, variants="v", keep_texts=texts)
  before, columns = Encoder.load(whole), pairs(160, 4)
  rows = {tag: [i for i in range(160) if columns["lang"][i] == tag] for tag in ("de", "zh")}
  of = {tag: [columns["query"][i] for i in rows[tag]] for tag in rows}
  for folder, kept, size in (
    (german, of["de"], {}),
    (all_, of["de"] + of["zh"], {}),
    (cut, of["zh"], {"depth": 2, "dim": 48}),
    (of_file, sentences("de"), {}),
  ):
    small = Encoder.load(folder)
    assert small.config().vocab <= before.config().vocab
    np.testing.assert_allclose(small.encode(kept), before.encode(kept, **size), atol=1e-5)
  assert not np.allclose(Encoder.load(german).encode(of["zh"]), before.encode(of["zh"]), atol=0.01)


def test_python_calls_it_twice_in_one_process(data, tmp_path, fast_compile):
  overrides = {
    "data.train": ("train/bitext.parquet",),
    "data.heldout": (),
    "data.manifest": "",
    "train.steps": 2,
    "optimizer.warmup_steps": 1,
  }
  config = from_mapping(config_dict(data, **overrides))
  for name in ("a", "b"):
    train_model(config, tmp_path / name)
  assert_same_state(tmp_path / "a", tmp_path / "b", 2)
  train_model(config, tmp_path / "a")  # a finished run has nothing left to do
  assert len(lines(tmp_path / "a")) == 2
  whole, cut = export_model(tmp_path / "a", tmp_path / "model", variants=("d48-l2",))
  assert (whole.name, cut.name) == ("model", "model-d48-l2")
  assert (whole / "mlembed/ranges.safetensors").is_file()
  assert Encoder.load(cut).ranges(2, 48).shape == (2, 48)
  check_kept_tokens(tmp_path / "a", tmp_path / "small")
  found = evaluate_model(str(cut), [data / "heldout"], tmp_path / "scores", Slice(dim=16))
  assert {score.size for score in found.scores} == {Size(0, 2, 16, "float32")}
  assert Evaluation.load(tmp_path / "scores" / "scores.json").scores == found.scores
