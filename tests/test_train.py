"""The command, as real processes: resume after real signals, outputs, and every refusal."""

import collections
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from tensorboardX.proto import event_pb2

from mlembed_jax import evaluate_model, export_model, train_model
from mlembed_jax.config import from_mapping
from mlembed_jax.errors import ConfigError, MlembedError
from mlembed_jax.eval.evaluation import Evaluation
from mlembed_jax.inference import Encoder
from mlembed_jax.matryoshka import Slice
from mlembed_jax.slice_scores import Size
from mlembed_jax.training.metrics import Writer
from mlembed_jax.training.saved import load_newest_params
from mlembed_jax.workdir import Run
from tests.material import FAST_COMPILE, config_dict

ROOT = pathlib.Path(__file__).parent.parent
ENVIRONMENT = os.environ | {
  "JAX_PLATFORMS": "cpu",
  "PYTHONPATH": str(ROOT),
  "XLA_FLAGS": " ".join(f"--{name}={value}".lower() for name, value in FAST_COMPILE.items()),
}


def command(data, workdir, more=(), **overrides):
  flags = {"data.heldout": "()", "data.manifest": ""} | overrides
  return [
    sys.executable,
    *("-m", "mlembed_jax.train", "--config", f"tests/tiny_config.py:{data}"),
    *("--workdir", str(workdir)),
    *(f"--config.{name}={value}" for name, value in flags.items()),
    *more,
  ]


def run(*args, **overrides):
  return subprocess.run(
    command(*args, **overrides), cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True
  )


def start(*args, **overrides):
  pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
  return subprocess.Popen(command(*args, **overrides), cwd=ROOT, env=ENVIRONMENT, **pipes)


def lines(workdir):
  """Returns the lines of metrics.jsonl; one that is being written is not there yet."""
  path = workdir / "metrics.jsonl"
  text = path.read_text() if path.exists() else ""
  return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def wait_for_step(workdir, step, seconds=300):
  end = time.monotonic() + seconds
  while not any(line["step"] >= step for line in lines(workdir)):
    assert time.monotonic() < end, "the run does not get there"
    time.sleep(0.02)


def arrays(workdir, step):
  """Returns every array of a checkpoint: parameters, moments and step."""
  path, checkpointer = workdir / "checkpoints" / str(step) / "default", ocp.PyTreeCheckpointer()
  tree = checkpointer.metadata(path).item_metadata.tree
  # As numpy arrays: the devices of several processes are not those of this one.
  as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
  state = checkpointer.restore(path, restore_args=as_numpy)
  return [np.asarray(leaf) for leaf in jax.tree.leaves(state)]


def assert_same_state(a, b, step):
  for x, y in zip(arrays(a, step), arrays(b, step), strict=True):
    np.testing.assert_array_equal(x, y)


# One kind of batch and one exit compile in a quarter of the time that all of them take.
SMALL = {
  "data.train": "('train/bitext.parquet',)",
  "data.global_batch": 8,
  "data.lengths": "(32,)",
  "model.layers": 2,
  "matryoshka.exits": "(2,)",
  "matryoshka.ranks": "(24,)",
}
TWENTY: dict[pathlib.Path, pathlib.Path] = {}


@pytest.fixture(scope="module")
def twenty(data, tmp_path_factory):
  """The workdir of 20 uninterrupted steps, with checkpoints at 10 and 20."""
  if data not in TWENTY:  # another module has the same fixture
    workdir = tmp_path_factory.mktemp("twenty")
    result = run(data, workdir)
    assert result.returncode == 0, result.stderr
    TWENTY[data] = workdir
  return TWENTY[data]


TIMES = ("tokens_per_second", "tokens_per_second_per_chip", "sequences_per_second")
TIMES += ("model_flops_per_second", "data_wait_share", "goodput")


def test_ten_steps_and_ten_more_equal_twenty_bit_for_bit(data, twenty, tmp_path):
  shutil.copytree(twenty, tmp_path, dirs_exist_ok=True)
  shutil.rmtree(tmp_path / "checkpoints/20")
  # Evaluation on the way changes no update.
  held = {"data.heldout": "('heldout/*',)", "data.manifest": data / "manifest.json"}
  result = run(data, tmp_path, **held, **{"eval.every": 16})
  assert result.returncode == 0, result.stderr
  assert sorted(path.name for path in (tmp_path / "eval").iterdir()) == [
    "step_16.json",
    "step_20.json",
  ]
  assert_same_state(twenty, tmp_path, 20)
  untimed = [
    [{k: v for k, v in line.items() if k not in TIMES} for line in lines(w)]
    for w in (twenty, tmp_path)
  ]
  assert untimed[0] == untimed[1]


LONG = SMALL | {"train.steps": 45, "train.checkpoint_every": 15}


@pytest.fixture(scope="module")
def small(data, tmp_path_factory):
  """The workdir of 20 uninterrupted steps of one kind, with checkpoints at 10 and 20."""
  workdir = tmp_path_factory.mktemp("small")
  assert run(data, workdir, **SMALL).returncode == 0
  return workdir


@pytest.fixture(scope="module")
def long(data, tmp_path_factory):
  workdir = tmp_path_factory.mktemp("long")
  assert run(data, workdir, **LONG).returncode == 0
  return workdir


STOPS = [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, -9)]


@pytest.mark.parametrize(("sent", "status"), STOPS)
def test_a_run_that_was_killed_goes_on_exactly(data, long, tmp_path, sent, status):
  process = start(data, tmp_path, **LONG)
  wait_for_step(tmp_path, 17)
  process.send_signal(sent)
  time.sleep(0.05)
  if sent == signal.SIGTERM:
    process.send_signal(sent)  # while it saves; a Spot machine gets several
  assert process.wait(300) == status
  reached = lines(tmp_path)[-1]["step"]
  assert 17 <= reached < 45
  assert run(data, tmp_path, **LONG).returncode == 0
  assert [line["step"] for line in lines(tmp_path)] == list(range(1, 46))
  assert_same_state(long, tmp_path, 45)


def test_a_signal_before_the_first_step_ends_without_a_traceback(data, tmp_path):
  process = start(data, tmp_path, **LONG, **{"data.micro_batch": 0})
  while not (tmp_path / "plan.png").exists():  # written right before the analysis of memory
    assert process.poll() is None
    time.sleep(0.02)
  time.sleep(0.5)
  process.send_signal(signal.SIGINT)
  output, _ = process.communicate(timeout=300)
  assert process.returncode == 130
  assert output.endswith("stopped by signal 2; no step is lost, the same command goes on\n")


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


def test_a_whole_run_evaluates_and_exports(data, tmp_path):
  flags = {"export.at_end": True, "train.steps": 4, "data.heldout": "('heldout/*',)"}
  flags |= {"data.manifest": data / "manifest.json", "data.workers": 2}
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


def test_scores_of_a_run_that_never_saved_are_not_taken_over(data, tmp_path):
  (tmp_path / "eval").mkdir()
  (tmp_path / "eval/step_0.json").write_text('{"step": 0, "scores": []}')
  short = SMALL | {"train.steps": 1, "optimizer.warmup_steps": 0}
  assert run(data, tmp_path, **short).returncode == 0
  assert not (tmp_path / "eval/step_0.json").exists()  # nothing was held out


def test_a_damaged_checkpoint_is_set_aside_and_its_steps_are_done_again(data, small, tmp_path):
  shutil.copytree(small, tmp_path, dirs_exist_ok=True)
  largest = max((tmp_path / "checkpoints/20").rglob("*"), key=lambda p: p.stat().st_size)
  content = bytearray(largest.read_bytes())
  content[len(content) // 2] ^= 1
  largest.write_bytes(content)
  exported = export("--checkpoint", tmp_path, "--out", tmp_path / "export")
  assert f"WARNING: {tmp_path}/checkpoints/20 is damaged" in exported.stdout
  assert "exported step 10" in exported.stdout and exported.returncode == 0
  assert "checkpoints/20 is damaged" in run(data, tmp_path, ["--strict_restore"], **SMALL).stderr
  result = run(data, tmp_path, **SMALL)
  assert result.returncode == 0, result.stderr
  assert f"WARNING: {tmp_path}/checkpoints/20 is damaged" in result.stdout
  assert_same_state(small, tmp_path, 20)


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


def test_tensorboard_files_are_written(twenty):
  assert [p for p in (twenty / "tensorboard").iterdir() if p.name.startswith("events.out")]


def test_a_cut_line_of_a_killed_run_is_dropped(tmp_path):
  (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
  Writer(tmp_path, 2, 1).close()
  assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n'


def test_a_checkpoint_of_another_run_is_refused_with_the_differences(data, twenty):
  result = run(data, twenty, **{"optimizer.learning_rate": 0.5, "model.ffn": 96})
  assert result.returncode == 1
  assert "model.ffn: 64 in the workdir, 96 now" in result.stderr
  assert "optimizer.learning_rate: 0.001 in the workdir, 0.5 now" in result.stderr
  assert "Traceback" not in result.stderr


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


def export(*flags):
  return subprocess.run(
    [sys.executable, "-m", "mlembed_jax.export", *map(str, flags)],
    cwd=ROOT,
    env=ENVIRONMENT,
    capture_output=True,
    text=True,
  )


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


def test_export_of_what_is_no_workdir_is_refused(tmp_path):
  result = export("--checkpoint", tmp_path, "--out", tmp_path / "out")
  assert result.returncode == 1
  assert "no run.json; this is not a workdir that a training run wrote" in result.stderr


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
  assert len(result.stdout.splitlines()) < 40


def test_training_starts_from_an_exported_folder(data, twenty, tmp_path):
  """The first update has rate 0, so one step leaves the imported parameters as they were."""
  assert export("--checkpoint", twenty, "--out", tmp_path / "folder").returncode == 0
  start = {"train.init_from": tmp_path / "folder", "train.steps": 1, "optimizer.warmup_steps": 0}
  assert run(data, tmp_path / "work", **start).returncode == 0
  model = Run.load(twenty).config.model
  (_, expected), (step, found) = (load_newest_params(w, model) for w in (twenty, tmp_path / "work"))
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
  found = evaluate_model(str(cut), [data / "heldout"], tmp_path / "scores", Slice(dim=16))
  assert {score.size for score in found.scores} == {Size(0, 2, 16, "float32")}
  assert Evaluation.load(tmp_path / "scores" / "scores.json").scores == found.scores


def test_a_run_passes_over_steps_and_lowers_its_rate_and_its_history_says_so(data, small, tmp_path):
  """From step 10 on; a second start with the same rate needs no flag, and gives the same."""
  for workdir in (tmp_path / "at_once", tmp_path / "stopped"):
    shutil.copytree(small, workdir)
    lower = SMALL | {"optimizer.learning_rate": 1e-4}
    changed = ["--from_step=10", "--skip_steps=12-13,15", "--accept_changed_learning_rate"]
    assert "--accept_changed_learning_rate goes on" in run(data, workdir, **lower).stderr
    if workdir.name == "stopped":
      lower |= {"train.checkpoint_every": 4}  # a checkpoint at 12, of a step that is passed over
    result = run(data, workdir, changed, **lower)
    assert result.returncode == 0, result.stderr
    if workdir.name == "stopped":
      for step in (16, 20):
        shutil.rmtree(workdir / f"checkpoints/{step}")
      assert run(data, workdir, **lower).returncode == 0
  assert_same_state(tmp_path / "at_once", tmp_path / "stopped", 20)
  assert lines(tmp_path / "at_once")[10:][1] == {
    "step": 12,
    "nonfinite_steps": 0,
    "goodput": lines(tmp_path / "at_once")[11]["goodput"],
  }
  assert Run.load(tmp_path / "stopped").history == [
    {
      "step": 10,
      "skip_steps": [12, 13, 15],
      "optimizer.learning_rate": [1e-3, 1e-4],
      "from_step": 10,
    }
  ]
  before = arrays(small, 20)
  assert any((a != b).any() for a, b in zip(before, arrays(workdir, 20), strict=True))


def test_a_loss_spike_sends_the_run_back_and_its_steps_are_passed_over(data, long, tmp_path):
  shutil.copytree(long, tmp_path, dirs_exist_ok=True)
  for step in (30, 45):
    shutil.rmtree(tmp_path / f"checkpoints/{step}")
  result = run(data, tmp_path, **LONG, **{"train.spike_factor": 1.02})
  assert result.returncode == 0, result.stderr
  history = Run.load(tmp_path).history
  assert history and result.stdout.count("WARNING: step ") == len(history)
  skipped = Run.load(tmp_path).skipped_steps
  for entry in history:
    assert entry["skip_steps"] == list(range(entry["step"] + 1, entry["skip_steps"][-1] + 1))
    assert "times" in entry["why"] and entry["step"] in (15, 30)
  assert [line["step"] for line in lines(tmp_path)] == list(range(1, 46))
  assert {line["step"] for line in lines(tmp_path) if "loss" not in line} == skipped


def test_a_second_trainer_is_refused_and_changes_nothing(data, tmp_path):
  flags = SMALL | {"train.steps": 5000}  # more than it can do before the other one is there
  process = start(data, tmp_path, **flags)
  wait_for_step(tmp_path, 2)
  other = run(data, tmp_path, **flags, **{"optimizer.learning_rate": 0.5})
  assert other.returncode == 1
  assert f"{tmp_path} is being trained by process {process.pid} on" in other.stderr
  assert Run.load(tmp_path).config.optimizer.learning_rate == 1e-3
  process.send_signal(signal.SIGTERM)
  assert process.wait(300) == 143
  assert not (tmp_path / "lock.json").exists()
