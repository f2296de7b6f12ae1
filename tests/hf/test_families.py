"""Checkpoints of each architecture that transformers saves give the vectors that it computes."""

import dataclasses
import json
from typing import Any

import jax
import numpy as np
import pytest
import torch
import transformers

from mlembed_jax.config import from_mapping, load_module
from mlembed_jax.data.tokenizer import Tokenizer
from mlembed_jax.errors import LoadError
from mlembed_jax.families import FAMILIES
from mlembed_jax.hf import own_file, param_mapping
from mlembed_jax.hf.folder import read_model, resolve
from mlembed_jax.hf.load import load_params
from mlembed_jax.models.encoder import abstract_params, parameter_shapes
from mlembed_jax.parallel.sharding import make_mesh, shardings
from tests import material
from tests.hf.exports import Trained, read, run_of

SIZES = {
  "vocab_size": 640,
  "hidden_size": 48,
  "intermediate_size": 80,
  "num_hidden_layers": 3,
  "num_attention_heads": 6,
  "num_key_value_heads": 2,
  "rms_norm_eps": 1e-5,
  "tie_word_embeddings": True,
  "rope_parameters": {"rope_type": "default", "rope_theta": 5e4},
}
MODELS = {
  "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM, {"head_dim": 16}),
  "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM, {}),
  "llama": (
    transformers.LlamaConfig,
    transformers.LlamaForCausalLM,
    {"tie_word_embeddings": False},
  ),
}


def theirs(family: str, dtype: torch.dtype) -> Any:
  """Returns a model with random biases and norms, so that a forgotten one shows."""
  config, model, more = MODELS[family]
  torch.manual_seed(0)
  made = model(config(**(SIZES | more))).eval()
  with torch.no_grad():
    for name, parameter in made.named_parameters():
      parameter += (0.3 if "norm" in name or "bias" in name else 0.05) * torch.randn_like(parameter)
  return made.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shards", [1, 5])
@pytest.mark.parametrize("family", MODELS)
def test_every_exit_equals_that_of_transformers(family, shards, dtype, tmp_path):
  made = theirs(family, dtype)
  size = sum(p.numel() * p.element_size() for p in made.parameters())
  made.save_pretrained(tmp_path, max_shard_size=f"{size // shards // 1000 + 2 * (shards == 1)}KB")
  assert (len(list(tmp_path.glob("*.safetensors"))) > 3) == (shards == 5)
  model = read_model(tmp_path)
  assert model.family == family
  tokens, sizes = material.random_batch(model.vocab, 5, 40)
  params = load_params(tmp_path, model)
  ours = np.asarray(jax.jit(material.padded(model))({"params": params}, tokens, sizes))
  with torch.no_grad():
    # Read again: .to(dtype) has rounded the rotary frequencies, too.
    body = transformers.AutoModel.from_pretrained(tmp_path, dtype=torch.float32).eval()
    found = body(input_ids=torch.tensor(tokens), output_hidden_states=True)
    states = [*map(body.norm, found.hidden_states[1:-1]), found.last_hidden_state]
  for exit_, expected in zip(ours, states, strict=True):
    expected = expected.numpy()[np.arange(5), sizes - 1]
    np.testing.assert_allclose(exit_, expected, atol=1e-4 * np.abs(expected).max())


def test_a_folder_of_another_family_is_refused(tmp_path):
  theirs("qwen2", torch.float32).save_pretrained(tmp_path)
  model = dataclasses.replace(read_model(tmp_path), family="qwen3")
  with pytest.raises(LoadError, match=r"model_type is 'qwen2', which needs model\.family = qwen2"):
    load_params(tmp_path, model)
  config = json.loads((tmp_path / "config.json").read_text())
  (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "gemma3"}))
  with pytest.raises(LoadError, match="'gemma3'; only 'qwen3', 'qwen2', 'llama' can be imported"):
    read_model(tmp_path)


WRONG_TYPES = {  # of config.json: value, and the type that the error asks for
  "hidden_size": ("64", "int"),
  "num_hidden_layers": (2.0, "int"),
  "vocab_size": (True, "int"),
  "rms_norm_eps": ("1e-6", "float"),
  "rope_theta": ("1e6", "float"),
  "rope_parameters": ([], "dict"),
  "max_position_embeddings": ("2048", "int"),
}


def test_values_of_a_wrong_type_are_refused_in_one_error(tmp_path):
  theirs("qwen2", torch.float32).save_pretrained(tmp_path)
  model, config = read_model(tmp_path), json.loads((tmp_path / "config.json").read_text())
  wrong = {key: value for key, (value, _) in WRONG_TYPES.items()}
  (tmp_path / "config.json").write_text(json.dumps(config | wrong))
  for load in (read_model, lambda path: load_params(path, model)):
    with pytest.raises(LoadError) as caught:
      load(tmp_path)
    for key, (value, of) in WRONG_TYPES.items():
      assert f"{key} is {value!r}, which is not of type {of}." in str(caught.value)


def test_whole_numbers_are_floats_too_and_null_is_absent(tmp_path):
  theirs("qwen2", torch.float32).save_pretrained(tmp_path)
  model, config = read_model(tmp_path), json.loads((tmp_path / "config.json").read_text())
  spelled = {"head_dim": None, "rope_parameters": None, "rope_theta": int(model.rope_theta)}
  (tmp_path / "config.json").write_text(json.dumps(config | spelled))
  assert read_model(tmp_path) == model


@pytest.mark.parametrize("mesh", [{"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_shards_are_those_of_a_whole_tree(mesh, tmp_path):
  """Read straight into the arrays of eight devices, with rows of the table added."""
  theirs("qwen2", torch.bfloat16).save_pretrained(tmp_path)
  sizes = {"data": 1, "fsdp": 1, "tensor": 1} | mesh
  model = dataclasses.replace(read_model(tmp_path), vocab=704)
  config = material.config_dict(**{f"mesh.{axis}": n for axis, n in sizes.items()})
  layout = shardings(abstract_params(model), make_mesh(from_mapping(config)))
  like = jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, np.float32, sharding=s),
    parameter_shapes(model),
    layout,
  )
  split = load_params(tmp_path, model, like)
  whole = load_params(tmp_path, model)
  for (path, a), b, target in zip(
    jax.tree_util.tree_leaves_with_path(split),
    jax.tree.leaves(whole),
    jax.tree.leaves(like),
    strict=True,
  ):
    assert a.sharding == target.sharding and a.dtype == np.float32, path
    np.testing.assert_array_equal(a, b)
  assert not np.any(split["table"][640:]) and np.any(split["table"][639])


def test_a_configuration_is_read_from_a_folder(tmp_path):
  theirs("llama", torch.float32).save_pretrained(tmp_path)
  made = load_module(material.CONFIGS / "from_hf.py").get_config(str(tmp_path))
  made.data.dataset = "none"
  config = from_mapping(made)
  expected = dataclasses.replace(
    read_model(tmp_path), rank=config.model.rank, dtype="bfloat16", remat="full"
  )
  assert config.model == expected and config.train.init_from == str(tmp_path)
  stated = json.loads((tmp_path / "config.json").read_text())["max_position_embeddings"]
  assert config.export.max_positions == config.export.max_seq_length == stated < 8192


def test_every_family_is_here():
  assert [made.__name__ for _, made, _ in MODELS.values()] == [
    family.architecture for family in FAMILIES.values()
  ]


@pytest.mark.parametrize("family", MODELS)
def test_a_folder_in_and_out_states_the_same(family, data, tmp_path):
  source = tmp_path / "source"
  theirs(family, torch.float32).save_pretrained(source)
  model, tokenizer = read_model(source), Tokenizer(data / "tokenizer.json", "<|endoftext|>")
  fields = {f"model.{field}": value for field, value in dataclasses.asdict(model).items()}
  run = run_of(from_mapping(material.config_dict(data, **fields, **{"matryoshka.ranks": ()})))
  params = load_params(source, model)
  out = Trained(run, params, tokenizer).export(tmp_path / "out")
  stated, written = read(source / "config.json"), read(out / "config.json")
  facts = {"model_type", "architectures", *param_mapping.CONFIG_KEYS.values()}
  assert facts - stated.keys() <= {"head_dim"}
  assert [(key, written[key]) for key in facts & stated.keys()] == [
    (key, stated[key]) for key in facts & stated.keys()
  ]
  assert read_model(out) == model and own_file.read(out).body.family == family
  assert FAMILIES[family].paper in (out / "README.md").read_text()
  jax.tree.map(np.testing.assert_array_equal, load_params(out, model), params)


@pytest.mark.parametrize(
  ("source", "message"),
  [
    ("/absent", "/absent is no folder; a model of the Hub is hf:ORG/NAME"),
    ("hf:a/b", "hf:a/b cannot"),
  ],
)
def test_sources_that_are_not_there_are_refused(source, message, monkeypatch):
  monkeypatch.setenv("HF_HUB_OFFLINE", "1")
  with pytest.raises(LoadError, match=message):
    resolve(source)
