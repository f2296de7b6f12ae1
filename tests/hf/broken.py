"""Edits that break an exported folder, and what mlembed_jax.doctor must say of each."""

import base64
import json
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import numpy as np
import safetensors.numpy

from mlembed_jax.hf import parity
from mlembed_jax.hf.checks.finding import ERROR, WARNING
from tests.hf.exports import read

Edit = Callable[[pathlib.Path], Any]


def change(file: str, **values: Any) -> Edit:
  """Returns an edit that sets keys of a JSON object; ... removes a key."""

  def edit(folder: pathlib.Path) -> None:
    content = read(folder / file) | values
    content = {key: value for key, value in content.items() if value is not ...}
    (folder / file).write_text(json.dumps(content), encoding="utf-8")

  return edit


def nested(file: str, *keys: Any, to: Any) -> Edit:
  """Returns an edit that sets one value below `keys`."""

  def edit(folder: pathlib.Path) -> None:
    content = read(folder / file)
    at = content
    for key in keys[:-1]:
      at = at[key]
    at[keys[-1]] = to
    (folder / file).write_text(json.dumps(content), encoding="utf-8")

  return edit


def tensors(file: str, edit: Callable[[dict], dict], metadata: Any = None) -> Edit:
  def write(folder: pathlib.Path) -> None:
    found = edit(safetensors.numpy.load_file(folder / file))
    stated = {"format": "pt"} if metadata is None else metadata
    safetensors.numpy.save_file(found, folder / file, metadata=stated)

  return write


def without(name: str) -> Callable[[dict], dict]:
  return lambda found: {key: t for key, t in found.items() if key != name}


def times(name: str, factor: float) -> Callable[[dict], dict]:
  return lambda found: found | {name: np.asarray(found[name] * factor, found[name].dtype)}


def text(file: str, old: str, new: str) -> Edit:
  def edit(folder: pathlib.Path) -> None:
    content = (folder / file).read_text(encoding="utf-8")
    assert old in content
    (folder / file).write_text(content.replace(old, new), encoding="utf-8")

  return edit


def remove(file: str) -> Edit:
  return lambda folder: (folder / file).unlink()


def stray(file: str) -> Edit:
  return lambda folder: shutil.copy(folder / "model.safetensors", folder / file)


def swap_vectors(folder: pathlib.Path) -> None:
  stated = read(folder / parity.FILE)
  first, second = stated["items"][:2]
  first["embedding"], second["embedding"] = second["embedding"], first["embedding"]
  (folder / parity.FILE).write_text(json.dumps(stated), encoding="utf-8")


def shorter_vectors(folder: pathlib.Path) -> None:
  stated = read(folder / parity.FILE)
  for item in stated["items"]:
    item["embedding"] = base64.b64encode(parity.embedding(item)[:4].tobytes()).decode()
  (folder / parity.FILE).write_text(json.dumps(stated), encoding="utf-8")


def unended(folder: pathlib.Path) -> None:
  change("tokenizer.json", post_processor=None)(folder)
  change(TOKENIZER, add_eos_token=...)(folder)


def pooling(**values: Any) -> Edit:
  return change("1_Pooling/config.json", **values)


def modules(index: int, key: str, value: Any) -> Edit:
  return nested("modules.json", index, key, to=value)


CONFIG, TOKENIZER, BERT = "config.json", "tokenizer_config.json", "sentence_bert_config.json"
PROMPTS, OWN, WEIGHTS = "config_sentence_transformers.json", "mlembed.json", "model.safetensors"
DENSE, UV = "2_Dense/model.safetensors", "mlembed/uv.safetensors"
PREFIX = "sentence_transformers.models."
NORM, EYE = "norm.weight", "linear.weight"
OURS, ST, TRANSFORMERS = "ours", "sentence-transformers", "transformers"
TEI, VLLM, LLAMA, ONNX = "TEI", "vLLM", "llama.cpp", "ONNX Runtime"
CONSUMERS = (OURS, ST, TRANSFORMERS, TEI, VLLM, LLAMA)
SERVERS = (TEI, VLLM, LLAMA)
OTHERS = tuple(name for name in CONSUMERS if name != OURS)
EMBEDDERS = tuple(name for name in CONSUMERS if name != TRANSFORMERS)
# (check, level, what it must say, edit, programs that it concerns)
BROKEN: list[tuple[str, str, str, Edit, tuple[str, ...]]] = [
  ("D01", ERROR, "is not there", remove(TOKENIZER), (ST, TRANSFORMERS, VLLM, LLAMA)),
  ("D01", ERROR, "nothing to compare", remove(parity.FILE), (OURS,)),
  ("D01", ERROR, "no weights", remove(WEIGHTS), CONSUMERS),
  ("D01", ERROR, "vLLM takes", stray("uv.safetensors"), (VLLM,)),
  ("D01", WARNING, "may take it", stray("pytorch_model.bin"), CONSUMERS),
  ("D01", WARNING, "asks the Hub", remove("README.md"), (ST,)),
  ("D02", ERROR, "no JSON", lambda folder: (folder / BERT).write_text("{"), CONSUMERS),
  ("D02", ERROR, "is None, expected int or float", change(CONFIG, rms_norm_eps=...), CONSUMERS),
  ("D02", ERROR, "hidden_act is None", change(CONFIG, hidden_act=...), (TEI, VLLM)),
  ("D02", ERROR, "'document' is None", nested(PROMPTS, "prompts", "document", to=None), (TEI,)),
  ("D03", ERROR, "E101 missing", tensors(WEIGHTS, without(NORM)), CONSUMERS),
  ("D03", ERROR, "E103 shape", change(CONFIG, intermediate_size=63), CONSUMERS),
  ("D03", ERROR, "E107 not finite", tensors(WEIGHTS, times(NORM, np.nan)), CONSUMERS),
  ("D03", ERROR, "format None", tensors(WEIGHTS, dict, {}), (ST, TRANSFORMERS)),
  ("D03", WARNING, "says bfloat16", change(CONFIG, torch_dtype="bfloat16"), CONSUMERS),
  ("D03", ERROR, "body.parameters is 1,", nested(OWN, "body", "parameters", to=1), (OURS,)),
  ("D04", ERROR, "is 4, the weights have 3", change(CONFIG, num_hidden_layers=4), CONSUMERS),
  (
    *("D04", ERROR, "layer_types has 1 entries"),
    change(CONFIG, layer_types=["full_attention"]),
    (ST, TRANSFORMERS, VLLM),
  ),
  ("D04", ERROR, "exits.exported is 2", nested(OWN, "exits", "exported", to=2), (OURS,)),
  ("D04", WARNING, "not trained", nested(OWN, "exits", "trained", to=[1, 2]), CONSUMERS),
  ("D05", ERROR, "rope_theta is None", change(CONFIG, rope_theta=...), OTHERS),
  ("D05", ERROR, "rope_theta is 1", change(CONFIG, rope_theta=1.0), CONSUMERS),
  ("D05", WARNING, "None", change(CONFIG, rope_parameters=None), (ST, TRANSFORMERS)),
  ("D06", ERROR, "eos_token_id is [0]", change(CONFIG, eos_token_id=[0]), (TEI,)),
  ("D06", ERROR, "classifier", change(CONFIG, id2label={}), (TEI,)),
  ("D06", ERROR, "'gemma'", change(CONFIG, model_type="gemma"), (OURS,)),
  ("D06", ERROR, "auto_map", change(CONFIG, auto_map={"AutoModel": "x.Y"}), (ST, TRANSFORMERS)),
  ("D06", WARNING, "4.58", change(CONFIG, transformers_version="4.58.0"), (ST, TRANSFORMERS)),
  ("D06", WARNING, "not run here", lambda f: (f / "x.py").write_text("1"), (ST, TRANSFORMERS)),
  ("D07", ERROR, "re-saved", modules(1, "type", "st.pooling.Pooling"), (ST, TEI, VLLM)),
  ("D07", ERROR, "not read by TEI", modules(2, "type", PREFIX + "LSTM"), EMBEDDERS),
  ("D07", ERROR, "the order", modules(2, "type", PREFIX + "Normalize"), EMBEDDERS),
  ("D07", ERROR, "count from 0", modules(3, "idx", 4), EMBEDDERS),
  ("D07", ERROR, "no 9_No/config.json", modules(3, "path", "9_No"), EMBEDDERS),
  ("D08", ERROR, "true keys", pooling(pooling_mode_mean_tokens=True), EMBEDDERS),
  ("D08", ERROR, "pooling_mode is 'mean'", pooling(pooling_mode="mean"), EMBEDDERS),
  ("D08", ERROR, "look it up", pooling(pooling_mode_cls_token=...), (TEI, LLAMA)),
  ("D08", ERROR, "5.1 fails", pooling(embedding_dimension=48), (ST,)),
  ("D08", ERROR, "is 8, hidden_size 48", pooling(word_embedding_dimension=8), (ST, TEI)),
  ("D09", ERROR, "identity", tensors(DENSE, times(EYE, 2)), (OURS, ST, TEI, VLLM)),
  ("D09", ERROR, "holds nothing", tensors(DENSE, without(EYE)), (OURS, ST, TEI, VLLM)),
  ("D09", ERROR, "E104", remove(DENSE), (OURS, ST, TEI, VLLM)),
  (
    *("D09", WARNING, "is F16"),
    tensors(DENSE, lambda found: {EYE: found[EYE].astype(np.float16)}),
    (OURS, ST, TEI, VLLM),
  ),
  ("D09", ERROR, "bias is True", change("2_Dense/config.json", bias=True), (OURS, ST, TEI, VLLM)),
  (
    *("D09", ERROR, "do not know it"),
    change("2_Dense/config.json", activation_function="torch.nn.Identity"),
    (TEI, VLLM),
  ),
  ("D09", ERROR, "vLLM refuses", change(CONFIG, matryoshka_dimensions=[8, 16]), (VLLM,)),
  ("D09", WARNING, "vLLM refuses", change(CONFIG, matryoshka_dimensions=...), (VLLM,)),
  ("D09", ERROR, "says 16", nested(OWN, "dims", "exported", to=16), (OURS, ST, TEI, VLLM)),
  ("D10", ERROR, "no prompt 'query'", change(PROMPTS, prompts={"document": ""}), (OURS, ST)),
  ("D10", WARNING, "'search: '", nested(PROMPTS, "prompts", "query", to="search: "), (OURS, ST)),
  ("D11", ERROR, "vLLM ignores", change(BERT, do_lower_case=...), (VLLM,)),
  ("D11", ERROR, "not a number", change(BERT, max_seq_length=None), (TEI,)),
  ("D11", ERROR, "more than", change(BERT, max_seq_length=1025), (OURS, ST, TEI, VLLM)),
  (
    *("D11", WARNING, "16 times the trained 8"),
    nested(OWN, "pooling", "trained_length", to=8),
    (OURS, ST, TEI, VLLM),
  ),
  ("D12", ERROR, "'hello' becomes", change("tokenizer.json", post_processor=None), EMBEDDERS),
  ("D12", ERROR, "not a tokenizer", change("tokenizer.json", model={}), CONSUMERS),
  ("D12", WARNING, "eos_token is", change(TOKENIZER, eos_token="<|im_end|>"), (LLAMA,)),
  ("D12", WARNING, "eos_token_id is 1", change(CONFIG, eos_token_id=1), (LLAMA,)),
  ("D12", ERROR, "pooling.token", nested(OWN, "pooling", "token", to="<|im_end|>"), (OURS,)),
  (
    *("D12", ERROR, "appends no token"),
    change(TOKENIZER, add_eos_token=False),
    (ST, TRANSFORMERS, VLLM),
  ),
  (
    *("D12", ERROR, "4 does not know it"),
    change(TOKENIZER, tokenizer_class="TokenizersBackend"),
    (ST, TRANSFORMERS, VLLM),
  ),
  ("D12", ERROR, "the table has 100 rows", change(CONFIG, vocab_size=100), CONSUMERS),
  ("D13", WARNING, "older converters", change(CONFIG, architectures=["Qwen3Model"]), (LLAMA,)),
  ("D13", ERROR, "is appended", unended, (LLAMA,)),
  (
    *("D13", ERROR, "first other.weight"),
    tensors(WEIGHTS, lambda found: found | {"other.weight": found[NORM]}),
    (LLAMA,),
  ),
  ("D14", ERROR, "U @ V is not", tensors(UV, times("U", 1.5)), (OURS,)),
  ("D14", ERROR, "holds V", tensors(UV, without("U")), (OURS,)),
  ("D14", ERROR, "E104", remove(UV), (OURS,)),
  ("D15", WARNING, "no heading 'Data'", text("README.md", "## Data", "## Texts"), ()),
  ("D15", WARNING, "no line library_name", text("README.md", "library_name", "library"), ()),
  ("D15", WARNING, "the card says 3", nested(OWN, "exits", "exported", to=2), ()),
  ("D16", ERROR, "0.9", tensors(WEIGHTS, times("layers.0.mlp.up_proj.weight", 1.1)), (OURS,)),
  ("D16", ERROR, "least cosine", swap_vectors, (OURS,)),
  ("D16", ERROR, "gives 8 coordinates, parity.json 4", shorter_vectors, (OURS,)),
  (
    *("D16", ERROR, "other ids to 1 of 17 texts, first 'query'"),
    nested(PROMPTS, "prompts", "query", to="Instruct: Do.\nQuery: "),
    (OURS,),
  ),
  ("D16", ERROR, "refuses the folder", remove(WEIGHTS), (OURS,)),
]
