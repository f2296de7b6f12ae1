"""Each fact of a folder, flipped: our vectors against sentence-transformers, or the refusal."""

import json
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import tokenizers
import torch
import transformers
from tokenizers import processors
from transformers import LlamaConfig, LlamaModel, Qwen2Config, Qwen3Config

from mlembed_jax.errors import LoadError
from mlembed_jax.families import FAMILIES
from mlembed_jax.hf import recipe
from mlembed_jax.hf.checks import examine, installed, vectors
from mlembed_jax.hf.checks.finding import ERROR, OK
from mlembed_jax.hf.folder import read_model, read_positions
from mlembed_jax.inference import Encoder
from tests.hf.broken import SERVERS, Edit, change, nested, remove, tensors
from tests.hf.exports import load_st, read

TEXTS = ["A heron stood in the SHALLOW water.", "x", "It did not " * 4, "明日の会議"]
WIDTH, SMALL = 32, 24
BERT, PROMPTS = "sentence_bert_config.json", "config_sentence_transformers.json"
TOKENIZER, POOLING, DENSE = "tokenizer_config.json", "1_Pooling/config.json", "2_Dense"
ST = "sentence_transformers.models."


@pytest.fixture(scope="module")
def folder(data: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  """A folder as others write it: a Llama without defaults, last token, Dense, Normalize."""
  out = tmp_path_factory.mktemp("recipe") / "folder"
  torch.manual_seed(0)
  tokenizer = tokenizers.Tokenizer.from_file(str(data / "tokenizer.json"))
  tokenizer.post_processor = template("$A <|endoftext|>")
  config = LlamaConfig(
    vocab_size=tokenizer.get_vocab_size(),
    hidden_size=WIDTH,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=4,
    max_position_embeddings=256,
    initializer_range=0.5,
    tie_word_embeddings=True,
  )
  LlamaModel(config).save_pretrained(out)
  tokenizer.save(str(out / "tokenizer.json"))
  kinds = ["Transformer", "Pooling", "Dense", "Normalize"]
  listed = [
    {"idx": i, "name": str(i), "path": f"{i}_{kind}" if i else "", "type": ST + kind}
    for i, kind in enumerate(kinds)
  ]
  files: dict[str, Any] = {
    "modules.json": listed,
    POOLING: {"word_embedding_dimension": WIDTH, "pooling_mode": "lasttoken"},
    f"{DENSE}/config.json": {
      "in_features": WIDTH,
      "out_features": SMALL,
      "bias": True,
      "activation_function": "torch.nn.modules.activation.Tanh",
    },
    "3_Normalize/config.json": {},
    PROMPTS: {"prompts": {"query": "Find: ", "document": None}},
    BERT: {"max_seq_length": 200, "do_lower_case": False},
    TOKENIZER: {
      "tokenizer_class": "PreTrainedTokenizerFast",
      "eos_token": "<|endoftext|>",
      "pad_token": "<|endoftext|>",
    },
  }
  for name, content in files.items():
    (out / name).parent.mkdir(exist_ok=True)
    (out / name).write_text(json.dumps(content))
  values = np.random.default_rng(0).normal(size=(SMALL, WIDTH + 1)).astype(np.float32) / 4
  weights = {"linear.weight": values[:, :WIDTH].copy(), "linear.bias": values[:, WIDTH].copy()}
  safetensors.numpy.save_file(weights, out / DENSE / "model.safetensors", {"format": "pt"})
  return out


@pytest.fixture
def copy(folder: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
  return pathlib.Path(shutil.copytree(folder, tmp_path / "copy"))


def template(text: str) -> processors.TemplateProcessing:
  ids = [("<|endoftext|>", 0), ("<|im_start|>", 1), ("<|im_end|>", 2)]
  return processors.TemplateProcessing(single=text, special_tokens=ids)


def tokenizer(edit: Callable[[tokenizers.Tokenizer], Any]) -> Edit:
  def write(folder: pathlib.Path) -> None:
    found = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    edit(found)
    found.save(str(folder / "tokenizer.json"))

  return write


def around(text: str) -> Edit:
  return tokenizer(lambda found: setattr(found, "post_processor", template(text)))


def dense(**values: Any) -> Edit:
  return change(f"{DENSE}/config.json", **values)


def weights(edit: Callable[[dict], dict]) -> Edit:
  return tensors(f"{DENSE}/model.safetensors", edit)


def all_of(*edits: Edit) -> Edit:
  return lambda folder: [edit(folder) for edit in edits]


def modules(*kept: int) -> Edit:
  """Returns an edit that keeps modules of the folder, in this order."""

  def write(folder: pathlib.Path) -> None:
    listed = read(folder / "modules.json")
    chosen = [listed[i] | {"name": str(n)} for n, i in enumerate(kept)]
    (folder / "modules.json").write_text(json.dumps(chosen))

  return write


def saved_again(folder: pathlib.Path) -> None:
  load_st(folder).save(str(folder / "again"))
  for path in (folder / "again").iterdir():
    shutil.rmtree(folder / path.name) if path.is_dir() else None
    path.replace(folder / path.name)


def head_alone(folder: pathlib.Path) -> None:
  edit = lambda found: {  # noqa: E731
    "lm_head.weight" if name == "embed_tokens.weight" else f"model.{name}": t
    for name, t in found.items()
  }
  tensors("model.safetensors", edit)(folder)
  change("config.json", architectures=["LlamaForCausalLM"])(folder)


EYE = {"linear.weight": np.eye(SMALL, WIDTH, dtype=np.float32)}
IDENTITY = {"bias": False, "activation_function": "torch.nn.modules.linear.Identity"}
OBEYED: dict[str, Edit] = {
  "as it is, with a prompt": lambda folder: None,
  "saved again by sentence-transformers": saved_again,
  "a token before every text": around("<|im_start|> $A <|endoftext|>"),
  "two tokens after every text": around("<|im_start|> $A <|im_end|> <|endoftext|>"),
  "mean": change(POOLING, pooling_mode="mean"),
  "mean without an end token": all_of(change(POOLING, pooling_mode="mean"), around("$A")),
  "cls": change(POOLING, pooling_mode="cls"),
  "no pooling_mode is mean": change(POOLING, pooling_mode=...),
  "flags": change(POOLING, pooling_mode=..., pooling_mode_cls_token=True),
  "include_prompt of the last token": change(POOLING, include_prompt=False),
  "no bias": all_of(dense(bias=False), weights(lambda f: {"linear.weight": f["linear.weight"]})),
  "Identity": dense(activation_function="torch.nn.modules.linear.Identity"),
  "GELU": dense(activation_function="torch.nn.modules.activation.GELU"),
  "ReLU": dense(activation_function="torch.nn.ReLU"),
  "SiLU": dense(activation_function="torch.nn.modules.activation.SiLU"),
  "Sigmoid": dense(activation_function="torch.nn.modules.activation.Sigmoid"),
  "no activation is Tanh": dense(activation_function=...),
  "a cut": all_of(dense(**IDENTITY), weights(lambda _: EYE)),
  "a cut that is not normalised": all_of(
    modules(0, 1, 2), dense(**IDENTITY), weights(lambda _: EYE)
  ),
  "not normalised": modules(0, 1, 2),
  "normalised in between": modules(0, 1, 3, 2),
  "no Dense": modules(0, 1, 3),
  "no modules after pooling": modules(0, 1),
  "a default prompt": change(PROMPTS, default_prompt_name="query"),
  "a default prompt that is empty": change(PROMPTS, default_prompt_name="document"),
  "truncate_dim": change(PROMPTS, truncate_dim=7),
  "dot of unit vectors": change(PROMPTS, similarity_fn_name="dot"),
  "lower case": change(BERT, do_lower_case=True),
  "max_seq_length": change(BERT, max_seq_length=9),
  "two lengths": all_of(change(BERT, max_seq_length=9), change(TOKENIZER, model_max_length=7)),
  "more than positions": all_of(
    change(BERT, max_seq_length=9), change("config.json", max_position_embeddings=7)
  ),
  "model_max_length": all_of(remove(BERT), change(TOKENIZER, model_max_length=9)),
  "positions": all_of(remove(BERT), change("config.json", max_position_embeddings=9)),
  "no length": all_of(remove(BERT), change("config.json", max_position_embeddings=...)),
  "truncation of the tokenizer": tokenizer(lambda found: found.enable_truncation(9)),
  "arguments of loaders": change(BERT, model_args={"attn_implementation": "eager"}),
  "add_eos_token of older tokenizers": change(TOKENIZER, add_eos_token=False, add_bos_token=True),
  "heads for keys are all": change("config.json", num_key_value_heads=..., head_dim=...),
  "no theta": change("config.json", rope_parameters=...),
  "null": change("config.json", num_key_value_heads=None, rope_scaling=None),
}


@pytest.mark.filterwarnings("ignore:.*texts are cut")
@pytest.mark.parametrize("fact", OBEYED)
def test_what_a_folder_says_is_obeyed(fact: str, folder: pathlib.Path, copy: pathlib.Path):
  OBEYED[fact](copy)
  theirs, ours = load_st(copy), Encoder.load(copy)
  for prompt in (None, "query") if "prompt" in fact else (None,):
    expected = np.asarray(theirs.encode(TEXTS, prompt_name=prompt))
    found = ours.encode(TEXTS, prompt_name=prompt)
    if fact == "truncate_dim":  # they cut unit vectors, and leave them shorter
      expected = expected / np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(found, expected, atol=2e-5 * max(1, np.abs(expected).max()))
  for method in ("encode_query", "encode_document") if "default" in fact else ():
    expected = np.asarray(getattr(theirs, method)(TEXTS, normalize_embeddings=True))
    found = getattr(ours, method)(TEXTS, normalize=True)
    np.testing.assert_allclose(found, expected, atol=2e-5)


def test_each_flip_is_another_function(folder: pathlib.Path, tmp_path: pathlib.Path):
  """So the comparison above could see it."""
  base = Encoder.load(folder).encode(TEXTS)
  for fact in ("mean", "cls", "Identity", "a default prompt", "lower case", "max_seq_length"):
    copy = pathlib.Path(shutil.copytree(folder, tmp_path / fact))
    OBEYED[fact](copy)
    with pytest.warns(UserWarning) if fact == "max_seq_length" else np.errstate():
      assert np.abs(Encoder.load(copy).encode(TEXTS) - base).max() > 1e-2, fact


REFUSED: dict[str, tuple[Edit, str]] = {
  "max": (change(POOLING, pooling_mode="max"), "pooling_mode is 'max'; only one of lasttoken"),
  "two poolings": (
    change(POOLING, pooling_mode=["mean", "cls"]),
    "is ['mean', 'cls']; only one",
  ),
  "flags that contradict": (
    change(POOLING, pooling_mode_mean_tokens=True),
    "pooling_mode is 'lasttoken', but the flags say ['mean']",
  ),
  "the prompt left out": (
    change(POOLING, pooling_mode="mean", include_prompt=False),
    "include_prompt is False beside mean",
  ),
  "an unknown key": (change(POOLING, temperature=2), "temperature is 2; this key is not known"),
  "no pooling": (remove(POOLING), "1_Pooling/config.json: is not there"),
  "another order": (modules(0, 2, 1, 3), "the order is ['Transformer', 'Dense', 'Pooling'"),
  "another module": (nested("modules.json", 2, "type", to=ST + "LSTM"), f"no {ST}LSTM here"),
  "code as a module": (nested("modules.json", 2, "type", to="own.Dense"), "no own.Dense here"),
  "a model below": (nested("modules.json", 0, "path", to="0_Transformer"), "lies in 0_Transformer"),
  "a path outside": (nested("modules.json", 2, "path", to="../x"), "lies outside"),
  "modules lost": (remove("modules.json"), "is not there, though 1_Pooling/config.json is"),
  "another activation": (
    dense(activation_function="torch.nn.Softmax"),
    "torch.nn.Softmax; only",
  ),
  "of token states": (dense(module_input_name="token_embeddings"), "'token_embeddings'; only"),
  "a residual": (dense(use_residual=True), "use_residual is True; only False"),
  "of another width": (dense(in_features=31), "in_features is 31"),
  "other tensors": (dense(bias=False), "holds {'linear.bias': (24,)"),
  "no weights": (remove(f"{DENSE}/model.safetensors"), "2_Dense/model.safetensors: is not there"),
  "not finite": (weights(lambda f: {k: t * np.nan for k, t in f.items()}), "NaN or infinite"),
  "an unknown default": (change(PROMPTS, default_prompt_name="x"), "default_prompt_name is 'x'"),
  "a prompt of numbers": (nested(PROMPTS, "prompts", "query", to=3), "prompt 'query' is 3"),
  "a similarity": (change(PROMPTS, similarity_fn_name="maxsim"), "'maxsim'; only 'cosine'"),
  "another class": (change(PROMPTS, model_type="SparseEncoder"), "'SparseEncoder'; only"),
  "no dims": (change(PROMPTS, truncate_dim=0), "truncate_dim is 0"),
  "a length for queries": (change(BERT, query_length=8), "query_length is 8; only null"),
  "of a wrong type": (change(BERT, max_seq_length="9"), "'9', which is not of type int"),
  "no room": (change(BERT, max_seq_length=1), "max_seq_length is 1, which leaves no token"),
  "chat messages": (
    change(BERT, modality_config={"message": {}}),
    "modality_config is {'message': {}}; only",
  ),
  "an argument": (change(BERT, config_args={"x": 1}), "config_args.x is 1; this argument"),
  "an older name": (
    lambda f: (f / BERT).rename(f / "sentence_roberta_config.json"),
    "sentence_roberta_config.json: only sentence_bert_config.json is read",
  ),
  "cut at the beginning": (change(TOKENIZER, truncation_side="left"), "'left'; only 'right'"),
  "cut there by the tokenizer": (
    tokenizer(lambda found: found.enable_truncation(9, direction="left")),
    "truncation cuts texts at their beginning",
  ),
  "tokens that it lacks": (
    change(TOKENIZER, added_tokens_decoder={"700": {"content": "<new>"}}),
    "adds '<new>' as 700, which tokenizer.json does not",
  ),
  "code": (change("config.json", auto_map={"AutoModel": "x.Y"}), "auto_map names code"),
  "both directions": (change("config.json", is_causal=False), "is_causal is False; only True"),
  "ids outside": (
    tokenizer(lambda found: found.add_special_tokens(["<new>"])),
    "ids but the table of",
  ),
  "quantized": (
    change("config.json", quantization_config={"quant_method": "fp8"}),
    "the weights are quantized (fp8); take the model in bfloat16",
  ),
  "an adapter": (
    lambda f: (f / "adapter_config.json").write_text('{"base_model_name_or_path": "a/b"}'),
    "is an adapter of a/b: merge the two",
  ),
  "only .bin": (
    lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
    "has pytorch_model.bin and no model.safetensors",
  ),
}


@pytest.mark.parametrize("fact", REFUSED)
def test_what_cannot_be_done_is_refused_by_name(fact: str, copy: pathlib.Path):
  edit, said = REFUSED[fact]
  edit(copy)
  with pytest.raises(LoadError) as raised:
    Encoder.load(copy)
  assert said in str(raised.value) and str(copy) in str(raised.value)
  assert len(str(raised.value).splitlines()) <= 2


def test_one_error_lists_all(copy: pathlib.Path):
  facts = ("max", "a residual", "an unknown default", "both directions", "code", "an argument")
  all_of(*(REFUSED[fact][0] for fact in facts))(copy)
  with pytest.raises(LoadError) as raised:
    Encoder.load(copy)
  assert all(REFUSED[fact][1] in str(raised.value) for fact in facts)
  assert len(str(raised.value).splitlines()) == 1 + len(facts)


def test_a_table_may_be_stored_as_the_head(folder: pathlib.Path, copy: pathlib.Path):
  head_alone(copy)
  model = transformers.AutoModelForCausalLM.from_pretrained(copy)
  np.testing.assert_array_equal(
    model.get_input_embeddings().weight.detach().numpy(),
    safetensors.numpy.load_file(folder / "model.safetensors")["embed_tokens.weight"],
  )
  found = Encoder.load(copy).encode(TEXTS)
  np.testing.assert_array_equal(found, Encoder.load(folder).encode(TEXTS))
  change("config.json", tie_word_embeddings=False)(copy)
  with pytest.raises(LoadError, match="E101 missing tensors: 1 of 20 not found, first embed"):
    Encoder.load(copy)


def test_texts_without_tokens_are_named(copy: pathlib.Path):
  all_of(change(POOLING, pooling_mode="mean"), around("$A"))(copy)
  with pytest.raises(ValueError, match=r"texts\[1\] has no tokens"):
    Encoder.load(copy).encode(["a", ""])


def test_every_depth_can_be_pooled(copy: pathlib.Path):
  change(POOLING, pooling_mode="mean")(copy)
  encoder = Encoder.load(copy)
  ids = encoder.ids(TEXTS, "")
  both = encoder.states(ids, (1, 2))
  np.testing.assert_allclose(both[1], encoder.states(ids, (2,))[0], atol=1e-5)
  cut = encoder.encode(TEXTS, depth=1, untrained=True, normalize=False)
  np.testing.assert_allclose(both[0], cut, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_absent_keys_mean_what_transformers_takes_them_for(family: str, tmp_path: pathlib.Path):
  config = {"qwen3": Qwen3Config, "qwen2": Qwen2Config, "llama": LlamaConfig}[family]
  # Qwen's default of 32 key-value heads has to divide the heads.
  sizes = {"vocab_size": 8, "hidden_size": 4096, "num_hidden_layers": 1, "num_attention_heads": 64}
  stated = {"model_type": family, "intermediate_size": 4, **sizes}
  (tmp_path / "config.json").write_text(json.dumps(stated))
  theirs, ours = config(intermediate_size=4, **sizes), read_model(tmp_path)
  width = getattr(theirs, "head_dim", None) or 64
  expected = (theirs.num_key_value_heads, width, theirs.rms_norm_eps)
  assert (ours.kv_heads, ours.head_dim, ours.norm_eps) == expected
  assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
  assert read_positions(tmp_path) == theirs.max_position_embeddings


def test_scores_are_refused_where_cosines_are_not_meant(copy: pathlib.Path):
  all_of(modules(0, 1, 2), change(PROMPTS, similarity_fn_name="dot"))(copy)
  with pytest.raises(LoadError, match="similarity_fn_name is 'dot'; scores are those of cosines"):
    Encoder.load(copy).check_similarity()
  modules(0, 1, 2)(copy)
  change(PROMPTS, similarity_fn_name="cosine")(copy)
  Encoder.load(copy).check_similarity()


def test_training_says_what_it_would_leave_out(copy: pathlib.Path):
  all_of(
    change(POOLING, pooling_mode="mean"),
    change(BERT, do_lower_case=True),
    around("<|im_start|> $A <|im_start|> <|endoftext|>"),
  )(copy)
  problems = recipe.training_problems(recipe.read(copy))
  assert [problem.split(";")[0] for problem in problems] == [
    "its pooling is mean",
    "it has modules after pooling, such as Dense",
    "its tokenizer puts a token before every text",
    "its tokenizer puts 2 tokens after a text",
    "it makes texts lower case",
  ]
  all_of(modules(0, 1, 3), change(POOLING, pooling_mode="lasttoken"))(copy)
  all_of(change(BERT, do_lower_case=False), around("$A <|endoftext|>"))(copy)
  assert recipe.training_problems(recipe.read(copy)) == []


@pytest.mark.parametrize("fact", ["mean", "a token before every text"])
def test_the_doctor_runs_a_folder_of_others(fact: str, copy: pathlib.Path):
  OBEYED[fact](copy)
  checks = [*examine.CHECKS, examine.VECTORS, *examine.INSTALLED]
  findings = examine.examine(copy, checks)
  found = {v.consumer: v for v in examine.verdicts(copy, findings)}
  for name in (vectors.OURS, installed.ST):
    assert found[name].ran and found[name].level == OK, findings[-3:]
  assert "least cosine" in found[installed.ST].note
  assert not any(found[name].ran for name in SERVERS)


def test_the_end_token_of_a_chat_breaks_no_reader(folder: pathlib.Path, copy: pathlib.Path):
  """As Qwen3-Embedding is laid out: a text ends otherwise than a turn of a chat."""
  modules(0, 1, 3)(copy)
  change(TOKENIZER, eos_token="<|im_end|>")(copy)
  change("config.json", eos_token_id=2, torch_dtype="float32", transformers_version="4.51.0")(copy)
  findings = examine.examine(copy, [*examine.CHECKS, examine.VECTORS, *examine.INSTALLED])
  assert not [f for f in findings if f.level == ERROR and f.check in ("D12", "D13", "D16")]


def test_a_refused_folder_fails_where_it_is_run(copy: pathlib.Path):
  change(POOLING, pooling_mode="max")(copy)
  ours, theirs, *_ = examine.examine(copy, [examine.VECTORS, *examine.INSTALLED])
  assert ours.level == ERROR and "pooling_mode is 'max'" in ours.found
  assert theirs.level == OK and "loads it; no vectors to compare with" in theirs.found
