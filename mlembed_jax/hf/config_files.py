"""The small files of an exported folder: one builder per file, each returning its JSON value.

Order and spelling of the keys matter to consumers; the comments say which of them.
"""

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

from mlembed_jax.config import flatten
from mlembed_jax.config_fields import NO_LORA, REFERENCE, Config, ModelConfig
from mlembed_jax.data.tokenizer import Tokenizer, with_instruction
from mlembed_jax.errors import ExportError
from mlembed_jax.families import FAMILIES, Family
from mlembed_jax.hf import param_mapping
from mlembed_jax.hf.file_names import CONFIG, MODULES
from mlembed_jax.hf.own_file import TrimmedVocabulary
from mlembed_jax.matryoshka import Matryoshka, axes_of
from mlembed_jax.workdir import Run

PAD_TOKEN = "<|endoftext|>"  # where the tokenizer has it; else the pooled token
QWEN_SIZE, QWEN_TOKEN = 151_643, "<|im_start|>"  # together they tell Qwen's vocabulary

# Prompts a user gets for tasks that no training file names; the sentences of the reference.
DEFAULTS = {
  "Retrieval-query": "Given a question, retrieve passages that can help answer the question.",
  "BitextMining": "Retrieve translations of the following text.",
  "Classification": "Classify the topic of the given text.",
  "Clustering": "Classify the topic of the given text.",
  "PairClassification": "Retrieve semantically entailed text.",
  "STS": "Retrieve semantically similar text.",
}
# Task type of a training file -> task types of MTEB. The first file of a type gives its prompt, in
# this order, so that classification comes before clustering for "Classification".
MTEB_TYPES = {
  "retrieval": ("Retrieval-query",),  # "Retrieval" would stand before documents, too
  "bitext": ("BitextMining",),
  "classification": ("Classification",),
  "clustering": ("Clustering", "Classification"),
}

FLOAT32, INT8 = "float32", "int8"
GGUF_TYPES = {"f32": 0, "f16": 1, "q8_0": 7}  # numbers that llama.cpp gives to the files


@dataclasses.dataclass(frozen=True)
class Forms:
  """In which forms a folder holds the weights, beside safetensors for every program."""

  factors: bool = False  # the token table is stored as its two factors
  onnx: str = ""  # precision of the weights in onnx/model.onnx: FLOAT32 or INT8; "": none
  gguf: tuple[str, ...] = ()  # of GGUF_TYPES, a file for each

  @property
  def suffix(self) -> str:
    """Returns what is added to the name of the folder."""
    onnx = {"": "", FLOAT32: "-onnx", INT8: "-onnx-int8"}[self.onnx]
    return ("-uv" if self.factors else "") + onnx


@dataclasses.dataclass(frozen=True)
class Variant:
  """What one folder holds: a step of a run at one size."""

  name: str
  run: Run
  step: int
  depth: int
  dim: int
  rank: int  # 0: the token table was never factorised
  forms: Forms = Forms()
  trimmed: TrimmedVocabulary | None = None  # of the vocabulary; None: all of it

  @property
  def table_form(self) -> str:
    """Returns how the token table is stored.

    full: never factorised. merged: the product of the factors, which every program reads. uv: the
    factors, a smaller file, which only transformers reads, with the code that stands beside it.
    """
    return "uv" if self.forms.factors else "merged" if self.rank else "full"

  @property
  def body(self) -> ModelConfig:
    """Returns the model of the stored tensors, computed in float32."""
    rank = self.rank if self.forms.factors else 0
    model = self.run.config.model
    return dataclasses.replace(model, layers=self.depth, rank=rank, dtype="float32", lora=NO_LORA)

  @property
  def axes(self) -> Matryoshka:
    """Returns the axes that were trained."""
    return axes_of(self.run.config.model, self.run.config.matryoshka)

  @property
  def dims(self) -> list[int]:
    """Returns the trained dimensions up to its own; its own where there are none."""
    return [dim for dim in self.axes.dims if dim <= self.dim] or [self.dim]

  @property
  def depths(self) -> list[int]:
    """Returns the trained depths up to its own; its own where there are none."""
    return [depth for depth in self.axes.exits if depth <= self.depth] or [self.depth]

  @property
  def recipe(self) -> str:
    """Returns the name of the training recipe."""
    return "reference" if switches(self.run.config) == REFERENCE else "default"

  @property
  def untrained(self) -> list[str]:
    """Returns a sentence for each axis whose size was not trained."""
    sizes = (
      ("depth", self.depth, self.axes.exits),
      ("dim", self.dim, self.axes.dims),
      ("rank", self.rank, self.axes.ranks),  # none: the table is full
    )
    return [
      f"{axis} {size} was not trained; trained: {', '.join(map(str, trained)) or 'none'}"
      for axis, size, trained in sizes
      if size not in (trained or (0,))
    ]


def switches(config: Config) -> dict[str, Any]:
  """Returns the values of this run for the fields of `REFERENCE`."""
  flat = flatten(config)
  return {field: flat[field] for field in REFERENCE}


def model_config(variant: Variant, tokenizer: Tokenizer, spec: Mapping[str, Any]) -> dict[str, Any]:
  """Returns config.json."""
  body, export = variant.body, variant.run.config.export
  pad_id = _added_tokens(spec).get(PAD_TOKEN, tokenizer.pooled_id)
  return {
    **_architecture(body),
    **{key: getattr(body, field) for field, key in param_mapping.CONFIG_KEYS.items()},
    "hidden_act": "silu",
    "max_position_embeddings": export.max_positions,
    "max_window_layers": body.layers,
    "initializer_range": 0.02,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "use_sliding_window": False,
    "sliding_window": None,
    # Both spellings: with the second alone transformers 4 silently takes another theta.
    "rope_theta": body.rope_theta,
    "rope_scaling": None,
    "rope_parameters": {"rope_type": "default", "rope_theta": body.rope_theta},
    "tie_word_embeddings": True,
    "use_cache": False,
    "bos_token_id": pad_id,
    "eos_token_id": tokenizer.pooled_id,  # TEI reads one number, not a list
    "pad_token_id": pad_id,
    "torch_dtype": export.dtype,
    "dtype": export.dtype,
    # Without a version up to 4.57.2, transformers 4.57 warns of a wrong tokenizer regex.
    "transformers_version": "4.51.0",
    "is_matryoshka": True,
    "matryoshka_dimensions": variant.dims,
  }


def _architecture(body: ModelConfig) -> dict[str, Any]:
  family = FAMILIES[body.family]
  if not body.rank:
    # Older llama.cpp converters know only this class for Qwen3.
    return {"architectures": [family.architecture], "model_type": family.name}
  prefix = "MLEmbed" + family.title
  return {
    "architectures": [f"{prefix}Model"],
    # Under its own name stock loaders would take the body for whole and invent a random table.
    "model_type": param_mapping.REMOTE + family.name,
    param_mapping.RANK_KEY: body.rank,
    "auto_map": {
      "AutoConfig": f"configuration_mlembed.{prefix}Config",
      "AutoModel": f"modeling_mlembed.{prefix}Model",
    },
  }


def remote_code(family: Family) -> dict[str, str]:
  """Returns the code by file name that a folder of factors needs, for its architecture."""
  found = {}
  for path in sorted((pathlib.Path(__file__).parent / "remote").glob("*_mlembed.py")):
    code = path.read_text(encoding="utf-8")
    found[path.name] = code.replace("Qwen3", family.title).replace("qwen3", family.name)
  return found


def modules(variant: Variant) -> dict[str, dict[str, Any] | list[dict[str, Any]]]:
  """Returns modules.json and the config.json of each module after the first, by path."""
  width = variant.body.width
  cut = variant.dim < width
  configs = {"Pooling": _pooling(width)}
  if cut:
    configs["Dense"] = {
      "in_features": width,
      "out_features": variant.dim,
      "bias": False,
      "activation_function": "torch.nn.modules.linear.Identity",
    }
  configs["Normalize"] = {
    "module_input_name": "sentence_embedding",
    "module_output_name": "sentence_embedding",
  }
  classes = ["Transformer", *configs]
  listed = [
    {
      "idx": i,
      "name": str(i),
      "path": f"{i}_{name}" if i else "",
      "type": f"sentence_transformers.models.{name}",
    }
    for i, name in enumerate(classes)
  ]
  files = {f"{i}_{name}/{CONFIG}": value for i, (name, value) in enumerate(configs.items(), 1)}
  return {MODULES: listed, **files}


def _pooling(width: int) -> dict[str, Any]:
  """Returns 1_Pooling/config.json; older vLLM takes the first true key, so order matters."""
  return {
    "word_embedding_dimension": width,
    "pooling_mode_cls_token": False,
    "pooling_mode_mean_tokens": False,
    "pooling_mode_max_tokens": False,
    "pooling_mode_mean_sqrt_len_tokens": False,
    "pooling_mode_weightedmean_tokens": False,
    "pooling_mode_lasttoken": True,
    "pooling_mode": "lasttoken",
    "include_prompt": True,
  }


def sentence_transformers_config(prompts: Mapping[str, str]) -> dict[str, Any]:
  """Returns config_sentence_transformers.json; a low version keeps every reader quiet."""
  return {
    "__version__": {"sentence_transformers": "5.1.0", "transformers": "4.57.1", "pytorch": "2.8.0"},
    "model_type": "SentenceTransformer",
    "prompts": dict(prompts),
    "default_prompt_name": None,
    "similarity_fn_name": "cosine",
  }


def sentence_bert_config(variant: Variant) -> dict[str, Any]:
  """Returns sentence_bert_config.json; vLLM ignores it unless both keys are there."""
  return {"max_seq_length": variant.run.config.export.max_seq_length, "do_lower_case": False}


def prompts_of(run: Run) -> dict[str, str]:
  """Returns the prompts of a run's exports.

  A copy of an embedder, which learnt from a teacher alone, has those of the embedder. Others have
  their own, beside those of the embedder that they started from.
  """
  own = run.prompts or {}
  return {"query": "", "document": "", **own} if is_copy(run) else {**own, **prompts(run.datasets)}


def is_copy(run: Run) -> bool:
  """Returns whether a run only made a copy of an embedder, whose users keep its prompts."""
  return run.prompts is not None and not run.config.losses.contrastive


def prompts(datasets: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
  """Returns the prompts by name: query, document, MTEB task types, and training files.

  A file has a prompt of its own only where an earlier file of its task type took the name with
  another instruction. All prompts are strings: TEI reads no null.
  """
  found: dict[str, str] = {}
  for task_type, keys in MTEB_TYPES.items():
    for file, entry in datasets.items():
      if entry["task_type"] == task_type:
        prompt = with_instruction(entry["instruction"], "")
        for key in keys:
          found.setdefault(key, prompt)
        if found[keys[0]] != prompt:
          found[pathlib.PurePath(file).stem] = prompt
  defaults = {key: with_instruction(text, "") for key, text in DEFAULTS.items()}
  query = found.get("Retrieval-query", found.get("BitextMining", defaults["Retrieval-query"]))
  return {"query": query, "document": "", **defaults, **found}


def tokenizer_spec(tokenizer: Tokenizer, model: ModelConfig) -> dict[str, Any]:
  """Returns tokenizer.json: the run's file, which now appends the pooled token by itself.

  Raises:
    ExportError: the file has more tokens than the table has rows, or does not list the pooled
      token as an added token.
  """
  if tokenizer.size > model.vocab:
    raise ExportError(
      f"tokenizer: {tokenizer.path} needs {tokenizer.size} rows but the table has {model.vocab}"
    )
  spec = json.loads(tokenizer.path.read_text(encoding="utf-8"))
  if not tokenizer.pooled_is_added:
    # Consumers would add it as one, and then split texts that hold its name in another way.
    token = tokenizer.pooled_token
    raise ExportError(f"tokenizer: {tokenizer.path} has {token!r} outside of added_tokens")
  return {**spec, "truncation": None, "padding": None, "post_processor": _appending(tokenizer)}


def _appending(tokenizer: Tokenizer) -> dict[str, Any]:
  """Returns the post-processor that ends every text, truncated or not, with the pooled token."""
  token = tokenizer.pooled_token
  a, b = ({"Sequence": {"id": letter, "type_id": 0}} for letter in "AB")
  end = {"SpecialToken": {"id": token, "type_id": 0}}
  template = {
    "type": "TemplateProcessing",
    "single": [a, end],
    "pair": [a, end, b, end],
    "special_tokens": {token: {"id": token, "ids": [tokenizer.pooled_id], "tokens": [token]}},
  }
  byte_level = {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": False,
    "use_regex": False,
  }
  return {"type": "Sequence", "processors": [byte_level, template]}


def tokenizer_config(
  variant: Variant, tokenizer: Tokenizer, spec: Mapping[str, Any]
) -> dict[str, Any]:
  """Returns tokenizer_config.json, with a class that transformers 4 and 5 both know."""
  added = _added_tokens(spec)
  qwen = tokenizer.size >= QWEN_SIZE and QWEN_TOKEN in added
  return {
    "tokenizer_class": "Qwen2Tokenizer" if qwen else "PreTrainedTokenizerFast",
    "model_max_length": variant.run.config.export.max_seq_length,
    "padding_side": "left",
    "eos_token": tokenizer.pooled_token,
    "pad_token": PAD_TOKEN if PAD_TOKEN in added else tokenizer.pooled_token,
    "bos_token": None,
    "unk_token": None,
    "add_bos_token": False,
    "add_eos_token": True,  # False would remove the template in transformers 5
    "add_prefix_space": False,
    "clean_up_tokenization_spaces": False,
    "split_special_tokens": False,
    "errors": "replace",
  }


def _added_tokens(spec: Mapping[str, Any]) -> dict[str, int]:
  return {token["content"]: token["id"] for token in spec.get("added_tokens") or ()}
