"""The encoder as a GGUF file, which llama.cpp and what is built on it run.

Written here, as the converter of llama.cpp knows a tokenizer by a hash of ids: any other vocabulary
stops it. It also drops the Dense module, and does not write how Llama models pool.
"""

import contextlib
import dataclasses
import math
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from mlembed_jax.config_fields import ModelConfig
from mlembed_jax.data.tokenizer import Tokenizer
from mlembed_jax.errors import ExportError
from mlembed_jax.families import FAMILIES
from mlembed_jax.files import storage_errors
from mlembed_jax.hf import param_mapping
from mlembed_jax.hf.config_files import GGUF_TYPES, Variant
from mlembed_jax.hf.extras import require

BLOCK = 32  # values that share a scale in q8_0
INTERLEAVED = ("layers/attention/q", "layers/attention/k")
LETTERS, WITH_MARKS = r"\p{L}", r"\p{L}\p{M}"


def _expression(letters: str, before: str, numbers: str = r"\p{N}") -> str:
  """Returns an expression that splits a text into words of `letters`.

  A sign that is not of `before` may begin a word.
  """
  word = letters if letters == LETTERS else f"[{letters}]"
  return (
    rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n{before}\p{{N}}]?{word}+|{numbers}"
    rf"| ?[^\s{letters}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
  )


# Names in llama.cpp. The third is the quickstart's, and splits as the second: a mark before a word
# is a part of it either way.
EXPRESSIONS = {
  _expression(LETTERS, LETTERS): "qwen2",
  _expression(WITH_MARKS, LETTERS): "qwen35",
  _expression(WITH_MARKS, WITH_MARKS): "qwen35",
  _expression(LETTERS, LETTERS, r"\p{N}{1,3}"): "llama-bpe",
}


def write(
  folder: pathlib.Path,
  variant: Variant,
  params: Mapping[str, Any],
  tokenizer: Tokenizer,
  spec: Mapping[str, Any],
  kind: str,
) -> str:
  """Writes a GGUF file into a folder, and returns its name there.

  Vectors keep the width of the model; what a cut of the dimension removes is 0 in them, as
  llama.cpp gives no shorter ones of these architectures.

  Args:
    folder: of the export.
    variant: what the folder holds.
    params: its weights.
    tokenizer: of the run.
    spec: tokenizer.json of the folder.
    kind: f32, f16 or q8_0, of all matrices; those whose rows are no multiple of 32 are f16 instead
      of q8_0.

  Raises:
    ExportError: the package gguf is not installed, or llama.cpp has no such tokenizer.
  """
  gguf = require("gguf", "gguf")
  model, params = _merged(variant.body, params)
  architecture = gguf.MODEL_ARCH[FAMILIES[model.family].gguf]
  file = f"{variant.name}-{kind.upper()}.gguf"
  writer = gguf.GGUFWriter(folder / file, gguf.MODEL_ARCH_NAMES[architecture])
  writer.add_name(variant.name)
  writer.add_file_type(GGUF_TYPES[kind])
  writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
  _add_shape(gguf, writer, model, variant.run.config.export.max_seq_length)
  _add_tokenizer(gguf, writer, spec, model.vocab, tokenizer.pooled_id)
  tensors = param_mapping.tensors(model)
  names = gguf.get_tensor_name_map(architecture, model.layers)
  for t in tensors:
    shape, stored_as = _layout(gguf, t.shape, kind)
    name = names.get_name(f"model.{t.name}", (".weight", ".bias"))
    writer.add_tensor_info(name, shape, np.dtype(np.uint8), math.prod(shape), stored_as)
  with storage_errors(folder / file), contextlib.closing(writer):
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for t in tensors:
      tensor = _tensor(t, params, model, variant.dim)
      _append(writer, gguf.quants.quantize(tensor, _layout(gguf, t.shape, kind)[1]))
  return file


def check(model: ModelConfig, spec: Mapping[str, Any]) -> None:
  """Raises ExportError where llama.cpp could not read the file of a model and its tokenizer."""
  if model.family == "qwen2" and model.heads * model.head_dim != model.width:
    raise ExportError(
      f"gguf: llama.cpp reads {FAMILIES[model.family].title} where heads * head_dim is the width, "
      f"found {model.heads} * {model.head_dim} and {model.width}"
    )
  splitting(spec)


def _merged(model: ModelConfig, params: Mapping[str, Any]) -> tuple[ModelConfig, Mapping[str, Any]]:
  """Returns the model with a whole token table, and its weights."""
  if not model.rank:
    return model, params
  table = np.asarray(params["table"], np.float32) @ np.asarray(params["up"], np.float32)
  return dataclasses.replace(model, rank=0), {**params, "table": table}


def _add_shape(gguf: Any, writer: Any, model: ModelConfig, max_length: int) -> None:
  writer.add_vocab_size(model.vocab)
  writer.add_block_count(model.layers)
  writer.add_context_length(max_length)
  writer.add_embedding_length(model.width)
  writer.add_feed_forward_length(model.ffn)
  writer.add_head_count(model.heads)
  writer.add_head_count_kv(model.kv_heads)
  writer.add_key_length(model.head_dim)
  writer.add_value_length(model.head_dim)
  writer.add_rope_dimension_count(model.head_dim)
  writer.add_rope_freq_base(model.rope_theta)
  writer.add_layer_norm_rms_eps(model.norm_eps)
  writer.add_pooling_type(gguf.PoolingType.LAST)


def _add_tokenizer(
  gguf: Any, writer: Any, spec: Mapping[str, Any], rows: int, pooled_id: int
) -> None:
  writer.add_tokenizer_model("gpt2")
  writer.add_tokenizer_pre(splitting(spec))
  tokens, kinds = _vocabulary(gguf, spec, rows)
  writer.add_token_list(tokens)
  writer.add_token_types(kinds)
  merges = spec["model"]["merges"]
  writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in merges])
  writer.add_eos_token_id(pooled_id)
  writer.add_add_bos_token(False)
  writer.add_add_eos_token(True)
  writer.add_add_space_prefix(False)


def splitting(spec: Mapping[str, Any]) -> str:
  """Returns the name that llama.cpp gives to how a tokenizer splits a text into words.

  Raises:
    ExportError: it is no byte-level BPE, llama.cpp splits in no such way, or texts are changed
      before that by more than composing letters (NFC), which llama.cpp leaves to the user.
  """
  normalizer = (spec.get("normalizer") or {}).get("type", "NFC")
  if normalizer != "NFC":
    raise ExportError(
      f"gguf: normalizer of tokenizer.json is {normalizer}, which llama.cpp does not apply; export "
      "ONNX instead (--variants onnx)"
    )
  whole = spec.get("pre_tokenizer") or {}
  *steps, last = whole.get("pretokenizers") or [whole]
  kinds = [step.get("type") for step in (*steps, last)]
  found = None
  if spec["model"].get("type") == "BPE" and kinds[-1] == "ByteLevel":
    if kinds == ["Split", "ByteLevel"] and not last.get("use_regex", True):
      found = EXPRESSIONS.get((steps[0].get("pattern") or {}).get("Regex", ""))
    elif last.get("use_regex", True) and not last.get("add_prefix_space", True):
      digits = kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits")
      found = "smollm" if digits else "gpt-2" if not steps else None
  if found is None:
    raise ExportError(
      f"gguf: pre_tokenizer of tokenizer.json, {kinds}, splits texts as llama.cpp cannot; export "
      "ONNX instead (--variants onnx)"
    )
  return found


def _vocabulary(gguf: Any, spec: Mapping[str, Any], rows: int) -> tuple[list[str], list[int]]:
  """Returns the tokens of all rows of the table and their kinds; rows without one are unused."""
  kinds = gguf.TokenType
  found = {i: (token, kinds.NORMAL) for token, i in spec["model"]["vocab"].items()}
  for token in spec.get("added_tokens") or ():
    kind = kinds.CONTROL if token["special"] else kinds.USER_DEFINED
    found[token["id"]] = (token["content"], kind)
  listed = [found.get(i, (f"[PAD{i}]", kinds.UNUSED)) for i in range(rows)]
  return [token for token, _ in listed], [int(kind) for _, kind in listed]


def _layout(gguf: Any, shape: tuple[int, ...], kind: str) -> tuple[tuple[int, ...], Any]:
  """Returns the shape in bytes and the type of a tensor; llama.cpp wants float32 vectors."""
  types = gguf.GGMLQuantizationType
  stored_as = types.F32 if len(shape) == 1 else types[kind.upper()]
  if stored_as == types.Q8_0 and shape[-1] % BLOCK:
    stored_as = types.F16
  return gguf.quants.quant_shape_to_byte_shape(shape, stored_as), stored_as


def _tensor(
  t: param_mapping.Tensor, params: Mapping[str, Any], model: ModelConfig, dim: int
) -> np.ndarray:
  """Returns a tensor as llama.cpp expects it, float32."""
  tensor = param_mapping.tensor_of(params, t)
  if t.name == param_mapping.FINAL_NORM[1]:
    tensor = np.where(np.arange(model.width) < dim, tensor, np.float32(0))
  if model.family == "llama" and t.path in INTERLEAVED:
    # llama.cpp turns heads of Llama by pairs that stand side by side, those of Qwen by halves.
    halves = tensor.reshape(-1, 2, model.head_dim // 2, model.width)
    tensor = halves.swapaxes(1, 2).reshape(tensor.shape)
  return np.ascontiguousarray(tensor)


def _append(writer: Any, array: np.ndarray) -> None:
  """Writes a tensor; the method of the writer hides from its error that a disk is full."""
  file = writer.fout[0]
  writer.write_padding(file, file.tell())
  file.write(array.view(np.uint8).data)
  writer.write_padding(file, array.nbytes)
