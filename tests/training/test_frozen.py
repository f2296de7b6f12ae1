"""What a run does not train: no gradient, no moments, no copy; and adapters (LoRA)."""

import json
import shutil

import flax.traverse_util
import jax
import numpy as np
import peft
import pytest
import safetensors.numpy
import torch
import transformers
from sentence_transformers import SentenceTransformer

from mlembed_jax import export_model
from mlembed_jax.config import from_mapping
from mlembed_jax.errors import ConfigError
from mlembed_jax.eval import grid, tasks
from mlembed_jax.hf.checks.finding import ERROR, OK
from mlembed_jax.inference import Encoder
from mlembed_jax.parallel.sharding import make_mesh
from mlembed_jax.slice_scores import Size
from mlembed_jax.training import frozen
from mlembed_jax.training.examine import examine
from mlembed_jax.training.export import export_adapter, say_rounding
from mlembed_jax.training.train_state import Head
from mlembed_jax.training.train_step import BatchLoss
from mlembed_jax.workdir import Run
from tests.material import FAST_COMPILE, config_dict, kind_of, random_params, sentences
from tests.runs import SMALL, arrays, assert_same_state, export, lines, run
from tests.training.test_train_step import batch_on, on_mesh

LORA = {"model.lora.rank": 4, "model.lora.alpha": 8.0, "train.init_from": "a/folder"}
REST = ("table", "up", "final_norm/*")


@pytest.mark.parametrize(
  ("trainable", "kept", "message"),
  [
    (("layers/*",), ("table", "up"), "neither names final_norm/scale; the two must name every"),
    (("layers/*", "*norm/scale"), ("layers/mlp*", *REST), "both name final_norm/scale"),
    (
      ("layers/*", "layer/*"),
      REST,
      "train.trainable: 'layer/\\*' names no parameter of final_norm",
    ),
    (("layers/*", "final_norm/scale", "up"), ("table",), "table and up are the two factors of one"),
  ],
)
def test_patterns_name_every_parameter_once(trainable, kept, message):
  fields = {"train.trainable": trainable, "train.frozen": kept, "train.init_from": "a/folder"}
  config = from_mapping(config_dict(**fields))
  with pytest.raises(ConfigError, match=message):
    frozen.trained_paths(config)


def test_an_adapter_is_trained_alone():
  config = from_mapping(config_dict(**LORA, **{"model.lora.targets": ("q_proj", "down_proj")}))
  assert frozen.trained_paths(config) == {
    f"layers/{name}_lora_{factor}" for name in ("attention/q", "mlp/down") for factor in ("a", "b")
  }


def grads_of(config, params, fixed):
  mesh = make_mesh(config, jax.devices()[:1])
  with on_mesh(mesh):

    def gradients(params, fixed, batch):
      loss = BatchLoss(config, kind_of("retrieval"))
      result, (found, _) = loss.value_and_grad(
        params, Head({}), batch, np.int32(16), 0.0, frozen_params=fixed
      )
      return result.loss, found

    found = jax.jit(gradients, compiler_options=FAST_COMPILE)(params, fixed, batch_on(mesh))
  return jax.device_get(found)


def test_gradients_are_those_of_the_weights_in_the_subspace():
  """Of W + s A B: dA = s dW B^T, dB = s A^T dW."""
  config = from_mapping(config_dict(**LORA))
  whole = random_params(config.model)
  params = flax.traverse_util.flatten_dict(whole, sep="/")
  loss, found = grads_of(config, *frozen.split(config, whole))
  plain = from_mapping(config_dict())
  expected_loss, full = grads_of(plain, frozen.merged(config.model, whole), None)
  assert loss == pytest.approx(expected_loss, rel=1e-5)
  found, full = (flax.traverse_util.flatten_dict(tree, sep="/") for tree in (found, full))
  assert found.keys() == frozen.trained_paths(config) and len(found) == 14
  for path in [p.removesuffix("_lora_a") for p in found if p.endswith("_lora_a")]:
    a, b = (np.asarray(params[f"{path}_lora_{factor}"], np.float64) for factor in "ab")
    d_w = full[path].reshape(len(a), np.prod(a.shape[1:-1]), -1)
    a, b = a.reshape(len(a), -1, 4), b.reshape(len(b), 4, -1)
    for factor, expected in (("a", 2 * d_w @ b.mT), ("b", 2 * a.mT @ d_w)):
      got = found[f"{path}_lora_{factor}"].reshape(expected.shape)
      np.testing.assert_allclose(got, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


def started(exported, **fields):
  same = {"train.init_from": exported["full"], "model.layers": 3, "matryoshka.exits": "(3,)"}
  return SMALL | same | {"train.steps": 20, "train.checkpoint_every": 10} | fields


def test_adapters_are_all_that_a_run_keeps_and_goes_on_with(data, exported, tmp_path):
  fields = started(exported, **{"model.lora.rank": 4})
  fields |= {
    "data.heldout": "('heldout/colours.parquet',)",
    "eval.every": 20,
    "data.lengths": "(64,)",
  }
  fields |= {"data.manifest": data / "manifest.json"}
  done = run(data, tmp_path / "w", **fields)
  assert done.returncode == 0, done.stderr
  assert "are trained" in done.stdout and "of frozen weights" in done.stdout
  sizes = [array.size for array in arrays(tmp_path / "w", 20)]
  factors = 3 * 4 * (112 + 80 + 80 + 112 + 3 * 112)  # layers, rank, both sides of each product
  assert 0 < sum(sizes) - 3 * factors < 8  # both moments, and counts of steps
  shutil.copytree(tmp_path / "w", tmp_path / "again")
  shutil.rmtree(tmp_path / "again/checkpoints/20")
  done = run(data, tmp_path / "again", **fields)
  assert done.returncode == 0, done.stderr
  assert_same_state(tmp_path / "w", tmp_path / "again", 20)
  assert lines(tmp_path / "w")[-1]["loss"] < lines(tmp_path / "w")[0]["loss"]
  export_model(tmp_path / "w", tmp_path / "out")
  before, after = (
    safetensors.numpy.load_file(f"{folder}/model.safetensors")
    for folder in (exported["full"], tmp_path / "out")
  )
  assert before.keys() == after.keys()
  changed = {name for name, x in before.items() if np.abs(x - after[name]).max() > 0.01}
  assert changed and all("_proj" in name for name in changed)
  texts = sentences("en")[:20]
  one, other = (
    Encoder.load(folder).encode(texts) for folder in (exported["full"], tmp_path / "out")
  )
  assert np.min(np.sum(one * other, axis=1)) < 0.999
  assert scored_in_training(tmp_path / "w", 20) == pytest.approx(
    scored(tmp_path / "out", data), abs=0.01
  )


def scored_in_training(workdir, step):
  scores = json.loads((workdir / f"eval/step_{step}.json").read_text())["scores"]
  (whole,) = (s["score"] for s in scores if (s["rank"], s["depth"], s["dim"]) == (24, 3, 48))
  return whole


def scored(folder, data):
  (task,) = (t for t in tasks.load_folder(data / "heldout") if "colours" in t.name)
  vectors = Encoder.load(folder).encode(task.texts)
  return grid.slice_score(task, Size(24, 3, 48, "float32"), task.score(vectors, vectors)).score


def test_a_workdir_keeps_what_is_frozen(data, exported, tmp_path):
  """Factors by SVD and weights are those of the start, whatever becomes of the folder."""
  base = shutil.copytree(exported["full"], tmp_path / "base")
  fields = started({"full": base}, **{"model.lora.rank": 4, "train.steps": 10})
  done = run(data, tmp_path / "w", **fields)
  assert done.returncode == 0, done.stderr
  shutil.copytree(tmp_path / "w", tmp_path / "same")
  longer = {"more": ["--accept_changed_length"], **fields, "train.steps": 12}
  assert run(data, tmp_path / "same", **longer).returncode == 0
  path = base / "model.safetensors"
  tensors = safetensors.numpy.load_file(path)
  safetensors.numpy.save_file({name: x + 1 for name, x in tensors.items()}, path)
  (base / "mlembed/uv.safetensors").unlink()
  done = run(data, tmp_path / "w", **longer)
  assert done.returncode == 0, done.stderr
  assert_same_state(tmp_path / "w", tmp_path / "same", 12)
  shutil.rmtree(base)
  for folder in ("w", "same"):
    export_model(tmp_path / folder, tmp_path / f"{folder}-out")
  for name in ("model.safetensors", "mlembed/uv.safetensors"):
    one, other = ((tmp_path / f"{w}-out" / name).read_bytes() for w in ("w", "same"))
    assert one == other
  assert [f.level for f in examine(tmp_path / "w") if f.check == "W07"] == [OK]


def test_a_start_that_was_killed_leaves_no_frozen_parameters_to_the_next(data, exported, tmp_path):
  fields = started(exported, **{"model.lora.rank": 4, "train.steps": 10})
  store = tmp_path / "w/frozen/checkpoints/0"
  store.mkdir(parents=True)
  (store / "other").write_text("of another start")
  done = run(data, tmp_path / "w", **fields)
  assert done.returncode == 0 and not (store / "other").exists(), done.stderr
  export_model(tmp_path / "w", tmp_path / "out")


def test_absent_or_damaged_frozen_parameters_are_refused(data, exported, tmp_path):
  fields = started(exported, **{"model.lora.rank": 4, "train.steps": 10})
  assert run(data, tmp_path / "w", **fields).returncode == 0
  folder = tmp_path / "w/frozen/checkpoints/0"
  path = max(folder.rglob("*"), key=lambda file: file.is_file() * file.stat().st_size)
  content = bytearray(path.read_bytes())
  content[-1] ^= 1
  path.write_bytes(content)
  with pytest.raises(ConfigError, match=r"It holds the frozen parameters; restore it from a copy"):
    export_model(tmp_path / "w", tmp_path / "out")
  assert [f.level for f in examine(tmp_path / "w") if f.check == "W07"] == [ERROR]
  (folder / "default/digests.json").unlink()
  for done in (
    run(data, tmp_path / "w", **fields | {"train.steps": 12}, more=["--accept_changed_length"]),
    export("--checkpoint", tmp_path / "w", "--out", tmp_path / "out"),
  ):
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert f"error: {folder}, the frozen parameters: no digests.json; copy the" in done.stderr


def test_frozen_parameters_are_served_as_they_were(data, exported, tmp_path):
  kept = {"train.trainable": "('layers/*',)", "train.frozen": "('table','up','final_norm/*')"}
  fields = started(exported, **kept)
  done = run(data, tmp_path / "w", **fields)
  assert done.returncode == 0, done.stderr
  export_model(tmp_path / "w", tmp_path / "out")
  before, after = (
    safetensors.numpy.load_file(f"{folder}/model.safetensors")
    for folder in (exported["full"], tmp_path / "out")
  )
  for name, array in before.items():
    same = np.array_equal(array, after[name])
    assert same == (not name.startswith("layers."))
  with pytest.raises(ConfigError, match=r"adapter: .* trains other parameters than an adapter"):
    export_adapter(tmp_path / "w", tmp_path / "adapter")


def test_what_is_frozen_needs_a_folder():
  with pytest.raises(ConfigError, match=r"train.init_from: frozen parameters stay as this folder"):
    from_mapping(config_dict(**LORA | {"train.init_from": ""}))
  with pytest.raises(ConfigError, match=r"train.trainable, train.frozen: together they name every"):
    from_mapping(config_dict(**{"train.trainable": ("*",)}))
  with pytest.raises(ConfigError, match=r"model.lora.targets: 'q' is not one of 'q_proj'"):
    from_mapping(config_dict(**LORA | {"model.lora.targets": ("q",)}))


def test_an_adapter_that_cannot_be_is_refused():
  with pytest.raises(ConfigError, match=r"model.lora: its rank is 0, so there is no adapter; give"):
    from_mapping(config_dict(**{"model.lora.alpha": 8.0}))
  with pytest.raises(
    ConfigError, match=r"model.lora.rank: 33 is above 32, the smaller side of k_pr"
  ):
    from_mapping(config_dict(**LORA | {"model.lora.rank": 33}))
  names = {"train.trainable": ("table", "up", "final_norm/*"), "train.frozen": ("layers/*",)}
  with pytest.raises(ConfigError, match=r"names layers/attention/k_lora_a, a factor of an adapter"):
    frozen.trained_paths(from_mapping(config_dict(**LORA | names)))


def test_peft_loads_an_adapter_that_gives_the_merged_vectors(data, exported, tmp_path):
  fields = started(exported, **{"model.lora.rank": 4, "model.rank": 0, "matryoshka.ranks": "()"})
  fields |= {"train.steps": 10}
  assert run(data, tmp_path / "w", **fields).returncode == 0
  export_model(tmp_path / "w", tmp_path / "out")
  done = export(*("--checkpoint", tmp_path / "w", "--out", tmp_path / "adapter", "--adapter"))
  assert done.returncode == 0, done.stderr
  base = transformers.AutoModel.from_pretrained(exported["full"], dtype="float32")
  model = peft.PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
  merged = transformers.AutoModel.from_pretrained(tmp_path / "out", dtype="float32")
  tokens = torch.arange(3, 23)[None]
  with torch.no_grad():
    found, expected = (m(tokens).last_hidden_state[0] for m in (model, merged))
    with model.disable_adapter():
      plain = model(tokens).last_hidden_state[0]
  cosines = torch.nn.functional.cosine_similarity
  assert cosines(found, expected, dim=-1).min() > 0.99999
  assert cosines(plain, expected, dim=-1).min() < 0.999
  texts = sentences("en")[:20]
  one, other = (
    SentenceTransformer(str(tmp_path / folder)).encode(texts, prompt_name="query")
    for folder in ("adapter", "out")
  )
  assert np.min(np.sum(one * other, axis=1)) > 0.99999
  again = export(*("--checkpoint", tmp_path / "w", "--out", tmp_path / "adapter", "--adapter"))
  assert again.returncode == 1 and "is there and not empty; choose another" in again.stderr


def test_an_adapter_is_written_of_a_run_that_trains_it_alone(data, exported, tmp_path):
  fields = started(exported, **{"model.lora.rank": 4, "train.steps": 10})
  assert run(data, tmp_path / "w", **fields).returncode == 0
  with pytest.raises(ConfigError, match=r"adapter: the run has a token table of rank 24 in place"):
    export_adapter(tmp_path / "w", tmp_path / "out")


def test_what_rounding_loses_of_an_adapter_is_said(capsys):
  config = from_mapping(config_dict(**LORA | {"export.dtype": "bfloat16"}))
  model, params = config.model, random_params(config.model)
  small = jax.tree_util.tree_map_with_path(
    lambda path, x: x * 1e-3 if "lora_b" in jax.tree_util.keystr(path) else x, params
  )
  assert frozen.lost_by_rounding(model, params, "float32") < 1e-6
  # bfloat16 has 8 bits: a weight is rounded by up to 2^-9 of it.
  assert frozen.lost_by_rounding(model, params, "bfloat16") < 0.01
  assert frozen.lost_by_rounding(model, small, "bfloat16") > 0.3
  say_rounding(Run(config, {}, {}), small)
  assert "WARNING: rounded to bfloat16, the weights differ by " in capsys.readouterr().out


def test_weights_without_an_adapter_are_not_copied():
  model = from_mapping(config_dict()).model
  params = jax.device_get(random_params(model))
  found = frozen.merged(model, params)
  for one, other in zip(jax.tree.leaves(params), jax.tree.leaves(found), strict=True):
    assert np.shares_memory(one, other)


def test_a_run_with_an_adapter_can_be_a_teacher(data, exported, tmp_path):
  """A student that starts from its export has nothing to learn; one of the first folder has."""
  fields = started(exported, **{"model.lora.rank": 4, "train.steps": 10})
  assert run(data, tmp_path / "w", **fields).returncode == 0
  student = SMALL | {"model.layers": 3, "matryoshka.exits": "(3,)", "train.steps": 1}
  student |= {"kd.teacher": tmp_path / "w", "kd.space": "unit", "losses.contrastive": 0.0}
  student["optimizer.warmup_steps"] = 0
  losses = []
  export_model(tmp_path / "w", tmp_path / "out")
  for start in (exported["full"], tmp_path / "out"):
    workdir = tmp_path / f"student{len(losses)}"
    done = run(data, workdir, **student | {"train.init_from": start})
    assert done.returncode == 0, done.stderr
    losses.append(lines(workdir)[0]["loss"])
  assert losses[1] < 1e-4 < losses[0]
