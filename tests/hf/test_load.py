import dataclasses
import json
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers

from mlembed_jax.config_fields import Config, ModelConfig
from mlembed_jax.data.tokenizer import Tokenizer
from mlembed_jax.errors import LoadError
from mlembed_jax.hf import param_mapping
from mlembed_jax.hf.export import TrainedModel, export_folder
from mlembed_jax.hf.load import load_params
from mlembed_jax.matryoshka import Slice, slice_params
from mlembed_jax.workdir import Run
from tests import material

Q = "layers.1.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def theirs(tiny: Config) -> transformers.Qwen3ForCausalLM:
  """A model of transformers with random norms, so that a forgotten norm shows."""
  sizes = {key: getattr(tiny.model, field) for field, key in param_mapping.CONFIG_KEYS.items()}
  config = transformers.Qwen3Config(
    **sizes,
    rope_parameters={"rope_type": "default", "rope_theta": tiny.model.rope_theta},
    tie_word_embeddings=True,
  )
  torch.manual_seed(0)
  model = transformers.Qwen3ForCausalLM(config).eval()
  with torch.no_grad():
    for name, parameter in model.named_parameters():
      parameter += (0.3 if "norm" in name else 0.05) * torch.randn_like(parameter)
  return model


@pytest.fixture(scope="module")
def saved(
  theirs: transformers.Qwen3ForCausalLM, tmp_path_factory: pytest.TempPathFactory
) -> pathlib.Path:
  """That model as transformers saves it: prefix `model.`, in several files."""
  folder = tmp_path_factory.mktemp("saved")
  theirs.save_pretrained(folder, max_shard_size="100KB")
  assert len(list(folder.glob("model-*.safetensors"))) > 2
  return folder


@pytest.fixture(scope="module")
def flat(saved: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  """The same weights in one file without prefix."""
  folder = tmp_path_factory.mktemp("flat")
  tensors = {}
  for file in saved.glob("*.safetensors"):
    tensors |= safetensors.numpy.load_file(file)
  tensors = {name.removeprefix("model."): t for name, t in tensors.items()}
  safetensors.numpy.save_file(tensors, folder / "model.safetensors")
  shutil.copy(saved / "config.json", folder)
  return folder


def dense(model: ModelConfig) -> ModelConfig:
  return dataclasses.replace(model, rank=0)


def load_folder(path: pathlib.Path, model: ModelConfig) -> Any:
  """Returns the arrays of a folder with its whole token table."""
  return jax.tree.map(np.asarray, load_params(path, dense(model)))


def assert_same(a: Any, b: Any) -> None:
  for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
    np.testing.assert_array_equal(x, y, err_msg=jax.tree_util.keystr(path))


def test_a_transformers_folder_gives_the_same_vectors(
  tiny: Config, theirs: transformers.Qwen3ForCausalLM, saved: pathlib.Path
):
  model = dense(tiny.model)
  params = load_params(saved, model)
  tokens, sizes = material.random_batch(model.vocab, 5, 544)
  ours = np.asarray(jax.jit(material.padded(model))({"params": params}, tokens, sizes))[-1]
  with torch.no_grad():
    states = theirs.model(input_ids=torch.tensor(tokens)).last_hidden_state.numpy()
  expected = states[np.arange(5), sizes - 1]
  difference = np.abs(ours - expected).max() / np.abs(expected).max()
  print(f"imported: {difference:.2e}")
  assert difference <= 1e-5


def test_one_file_without_prefix_is_the_same(tiny: Config, saved: pathlib.Path, flat: pathlib.Path):
  assert_same(load_folder(flat, tiny.model), load_folder(saved, tiny.model))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_read_exactly(
  dtype: str, tiny: Config, flat: pathlib.Path, tmp_path: pathlib.Path
):
  edit_tensors(flat, tmp_path, lambda ts: {k: t.astype(dtype) for k, t in ts.items()})
  exact = load_folder(flat, tiny.model)
  rounded = jax.tree.map(lambda x: x.astype(dtype).astype(np.float32), exact)
  assert_same(load_folder(tmp_path, tiny.model), rounded)


def test_head_and_old_buffers_are_left_out(
  tiny: Config, flat: pathlib.Path, tmp_path: pathlib.Path
):
  extra = {
    "lm_head.weight": np.ones((640, 48), np.float32),
    "layers.0.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32),
  }
  edit_tensors(flat, tmp_path, lambda tensors: tensors | extra)
  assert_same(load_folder(tmp_path, tiny.model), load_folder(flat, tiny.model))


def test_missing_rows_of_the_table_are_zero(tiny: Config, saved: pathlib.Path):
  larger = dataclasses.replace(tiny.model, vocab=700)
  table = load_folder(saved, larger)["table"]
  np.testing.assert_array_equal(table[:640], load_folder(saved, tiny.model)["table"])
  assert table.shape == (700, 48) and not table[640:].any()
  assert load_params(saved, larger)["table"].shape == (700, 24)


def test_a_table_without_trained_factors_is_factorised(tiny: Config, saved: pathlib.Path):
  whole = load_folder(saved, tiny.model)["table"]
  params = load_params(saved, tiny.model)
  best = np.linalg.svd(whole.astype(np.float64))[1][24:]
  error = np.linalg.norm(whole - params["table"] @ params["up"])
  assert error == pytest.approx(np.linalg.norm(best), rel=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_export_import_export_is_bitwise_equal(
  dtype: str, data: pathlib.Path, tiny: Config, params: Any, tmp_path: pathlib.Path
):
  stored = dataclasses.replace(tiny.export, dtype=dtype)
  run = Run(dataclasses.replace(tiny, export=stored), {}, "f" * 64)
  tokenizer = Tokenizer(data / "tokenizer.json", tiny.data.pooled_token)
  trained = TrainedModel(run, 1, params, tokenizer)
  first = export_folder(tmp_path / "first", trained, Slice())
  loaded = load_params(first, tiny.model)
  again = dataclasses.replace(trained, params=loaded)
  second = export_folder(tmp_path / "second", again, Slice())
  for file in ("model.safetensors", "mlembed/uv.safetensors", "parity.json"):
    assert (first / file).read_bytes() == (second / file).read_bytes(), file
  if dtype == "float32":
    assert_same(loaded, params)
  smaller = load_params(first, dataclasses.replace(tiny.model, rank=8))
  cut = slice_params(params, Slice(rank=8))
  assert_same((smaller["table"], smaller["up"]), (cut["table"], cut["up"]))


def test_stale_factors_are_refused(
  data: pathlib.Path, tiny: Config, params: Any, tmp_path: pathlib.Path
):
  run = Run(tiny, {}, "f" * 64)
  tokenizer = Tokenizer(data / "tokenizer.json", tiny.data.pooled_token)
  folder = export_folder(tmp_path / "out", TrainedModel(run, 1, params, tokenizer), Slice())
  edit_tensors(
    folder, folder, lambda ts: ts | {"embed_tokens.weight": ts["embed_tokens.weight"] * 1.02}
  )
  with pytest.raises(LoadError, match=r"E108 factors: U @ V of .*uv.safetensors is not the table"):
    load_params(folder, tiny.model)
  load_params(folder, dense(tiny.model))


def edit_tensors(
  source: pathlib.Path, target: pathlib.Path, change: Callable[[dict], dict]
) -> None:
  tensors = safetensors.numpy.load_file(source / "model.safetensors")
  if source != target:
    shutil.copytree(source, target, dirs_exist_ok=True)
  tensors = {k: np.ascontiguousarray(t) for k, t in change(tensors).items()}
  safetensors.numpy.save_file(tensors, target / "model.safetensors")


def without(*dropped: str) -> Callable[[dict], dict]:
  return lambda tensors: {k: t for k, t in tensors.items() if k not in dropped}


def replaced(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[dict], dict]:
  return lambda tensors: tensors | {name: change(tensors[name])}


def with_nan(array: np.ndarray) -> np.ndarray:
  return np.where(np.arange(array.size).reshape(array.shape) < 4, np.nan, array)


TENSOR_FAULTS = {
  "missing": (
    without(Q),
    rf"E101 missing tensors: 1 of 35 not found, first {Q}. config.json says 3",
  ),
  "missing layer": (
    lambda ts: {k: t for k, t in ts.items() if not k.startswith("layers.2.")},
    r"11 of 35 not found, first layers.2.input_layernorm.weight, .* and 8 more. "
    r"config.json says 3 layers, the weights hold 2.",
  ),
  "extra": (
    lambda ts: ts | {"layers.0.self_attn.q_proj.bias": np.ones(64, np.float32)},
    r"E102 unexpected tensors: 1, first layers.0.self_attn.q_proj.bias",
  ),
  "other prefix": (
    lambda ts: {f"language_model.{k}": t for k, t in ts.items()},
    r"E102 .*: tensors begin with 'language_model.', expected 'model.' or nothing",
  ),
  "transposed": (
    replaced(Q, np.transpose),
    rf"E103 shape: {Q} is \[48, 64\], expected \[64, 48\] = num_attention_heads 4 x head_dim 16, "
    "hidden_size 48",
  ),
  "misshaped": (
    replaced("norm.weight", lambda t: t[:47]),
    r"E103 shape: norm.weight is \[47\], expected \[48\] = hidden_size 48",
  ),
  "short table": (
    replaced("embed_tokens.weight", lambda t: t[:600]),
    r"E103 shape: embed_tokens.weight is \[600, 48\], expected \[640, 48\] = vocab_size 640",
  ),
  "integers": (
    replaced(Q, lambda t: t.astype(np.int8)),
    rf"E105 dtype: 1 tensors are I8, first {Q}, expected BF16, F16, F32",
  ),
  "not finite": (
    replaced(Q, with_nan),
    rf"E107 not finite: {Q} has 4 NaN or infinite values",
  ),
}


@pytest.mark.parametrize("fault", TENSOR_FAULTS)
def test_faulty_tensors_are_named(
  fault: str, tiny: Config, flat: pathlib.Path, tmp_path: pathlib.Path
):
  change, message = TENSOR_FAULTS[fault]
  edit_tensors(flat, tmp_path, change)
  with pytest.raises(LoadError, match=message):
    load_folder(tmp_path, tiny.model)


def test_all_faulty_tensors_stand_in_one_error(
  tiny: Config, flat: pathlib.Path, tmp_path: pathlib.Path
):
  def change(tensors: dict) -> dict:
    tensors = without("norm.weight")(tensors) | {"extra": np.ones(1, np.float32)}
    return replaced(Q, np.transpose)(tensors)

  edit_tensors(flat, tmp_path, change)
  with pytest.raises(LoadError, match=r"(?s)E101.*norm.weight.*E102.*extra.*E103.*q_proj"):
    load_folder(tmp_path, tiny.model)


CONFIG_FAULTS = {
  "model_type": ("gemma", "model_type is 'gemma'; only 'qwen3'"),
  "hidden_size": (64, r"hidden_size is 64, expected 48 \(model.width\)"),
  "num_hidden_layers": (4, r"num_hidden_layers is 4, expected 3 \(model.layers\)"),
  "intermediate_size": (1, r"intermediate_size is 1, expected 64 \(model.ffn\)"),
  "num_attention_heads": (3, r"num_attention_heads is 3, expected 4 \(model.heads\)"),
  "num_key_value_heads": (1, r"num_key_value_heads is 1, expected 2 \(model.kv_heads\)"),
  "head_dim": (None, r"head_dim is 12, expected 16 \(model.head_dim\)"),
  "rms_norm_eps": (1e-5, r"rms_norm_eps is 1e-05, expected 1e-06 \(model.norm_eps\)"),
  "vocab_size": (641, r"vocab_size is 641, expected 640 \(model.vocab\)"),
  "rope_theta": (1e6, r"rope_theta is 1000000.0, expected 5000.0 \(model.rope_theta\)"),
  "rope_parameters": (
    {"rope_type": "yarn", "rope_theta": 1e4},
    r"(?s)rope_parameters.rope_theta is 10000.0, expected 5000.0.*of type 'yarn'",
  ),
  "rope_scaling": ({"type": "linear", "factor": 2}, "rope_scaling is of type 'linear'"),
  "hidden_act": ("gelu", "hidden_act is 'gelu'; only 'silu'"),
  "attention_bias": (True, "attention_bias is True; only False"),
  "use_sliding_window": (True, "use_sliding_window is True; only False"),
  "layer_types": (["sliding_attention"], r"layer_types has \['sliding_attention'\]"),
}


def edit_config(source: pathlib.Path, target: pathlib.Path, changes: dict[str, Any]) -> None:
  shutil.copytree(source, target, dirs_exist_ok=True)
  config = json.loads((source / "config.json").read_text())
  (target / "config.json").write_text(json.dumps(config | changes))


@pytest.mark.parametrize("key", CONFIG_FAULTS)
def test_a_config_of_another_model_is_refused(
  key: str, tiny: Config, flat: pathlib.Path, tmp_path: pathlib.Path
):
  value, message = CONFIG_FAULTS[key]
  edit_config(flat, tmp_path, {key: value})
  with pytest.raises(LoadError, match=message):
    load_folder(tmp_path, tiny.model)


def test_all_faulty_settings_stand_in_one_error(
  tiny: Config, flat: pathlib.Path, tmp_path: pathlib.Path
):
  edit_config(flat, tmp_path, {key: value for key, (value, _) in CONFIG_FAULTS.items()})
  with pytest.raises(LoadError) as error:
    load_folder(tmp_path, tiny.model)
  assert all(f"config.json: {key}" in str(error.value) for key in CONFIG_FAULTS)


@pytest.mark.parametrize(
  "changes", [{"rope_theta": 5e3, "rope_parameters": None}, {"rope_theta": 5e3}]
)
def test_either_spelling_of_theta_will_do(
  changes: dict[str, Any], tiny: Config, flat: pathlib.Path, tmp_path: pathlib.Path
):
  edit_config(flat, tmp_path, changes)
  load_folder(tmp_path, tiny.model)


def test_a_folder_without_theta_is_refused(
  tiny: Config, flat: pathlib.Path, tmp_path: pathlib.Path
):
  edit_config(flat, tmp_path, {"rope_parameters": None})
  with pytest.raises(LoadError, match=r"rope_theta is missing, expected 5000.0"):
    load_folder(tmp_path, tiny.model)


def test_faults_of_the_index_are_named(tiny: Config, saved: pathlib.Path, tmp_path: pathlib.Path):
  shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
  path = tmp_path / "model.safetensors.index.json"
  index = json.loads(path.read_text())
  placed = index["weight_map"]
  shards = sorted(set(placed.values()))
  name = next(n for n, file in placed.items() if file == shards[1])

  path.write_text(json.dumps(index | {"weight_map": placed | {name: shards[0]}}))
  with pytest.raises(LoadError) as error:
    load_folder(tmp_path, tiny.model)
  assert f"{name} is not in {shards[0]}, where the index places it" in str(error.value)
  assert f"{name} stands in {shards[1]}, but the index says {shards[0]}" in str(error.value)

  path.write_text(json.dumps(index | {"weight_map": without(name)(placed)}))
  with pytest.raises(LoadError, match=f"{name} stands in {shards[1]}, but the index says nothing"):
    load_folder(tmp_path, tiny.model)

  path.write_text(json.dumps(index))
  (tmp_path / shards[1]).unlink()
  with pytest.raises(LoadError, match=f"E104 index: {shards[1]} is named in the index but not"):
    load_folder(tmp_path, tiny.model)


def test_absent_and_damaged_files_are_named(
  tiny: Config, flat: pathlib.Path, tmp_path: pathlib.Path
):
  with pytest.raises(LoadError, match=r"E104 file: .*config.json cannot be read"):
    load_folder(tmp_path, tiny.model)
  shutil.copy(flat / "config.json", tmp_path)
  with pytest.raises(LoadError, match=r"E104 file: .* has neither model.safetensors nor"):
    load_folder(tmp_path, tiny.model)
  whole = (flat / "model.safetensors").read_bytes()
  (tmp_path / "model.safetensors").write_bytes(whole[:-100])
  with pytest.raises(LoadError, match=r"E104 file: .*model.safetensors is not a whole"):
    load_folder(tmp_path, tiny.model)
