"""How the texts of a folder become vectors: all that its small files say of it, read in one place.

What they say is obeyed as sentence-transformers 6.2 obeys it, is known to change no vector (the
tables below give the reason), or is refused. One error lists all that is refused.

Letters: N texts, D coordinates of a state, M of a vector.
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from mlembed_jax.data.tokenizer import TemplateTokenizer
from mlembed_jax.errors import LoadError
from mlembed_jax.hf import own_file, param_mapping
from mlembed_jax.hf.file_names import (
  BERT,
  CONFIG,
  MODULES,
  PROMPTS,
  TOKENIZER,
  TOKENIZER_CONFIG,
  WEIGHTS,
)
from mlembed_jax.hf.folder import (
  DTYPES,
  POSITIONS,
  Stored,
  body_problems,
  open_file,
  raise_all,
  read_config,
  read_json,
  read_positions,
)
from mlembed_jax.hf.own_file import OwnFile
from mlembed_jax.models.pooling import POOLINGS
from mlembed_jax.quantize import unit

LAST = "lasttoken"
MODULE_KINDS = ("Transformer", "Pooling", "Dense", "Normalize", "Dropout")
TORCH = "torch.nn."  # begins the names of activations that any reader may import
ACTIVATIONS: dict[str, Callable[..., Any]] = {
  "Identity": lambda x: x,
  "Tanh": np.tanh,
  "ReLU": jax.nn.relu,
  "Sigmoid": jax.nn.sigmoid,
  "SiLU": jax.nn.silu,
  "GELU": functools.partial(jax.nn.gelu, approximate=False),
}
SIMILARITIES = ("cosine", "dot", "euclidean", "manhattan")
PREFIXED = ("Qwen2Tokenizer", "Qwen2TokenizerFast", "GPT2Tokenizer", "GPT2TokenizerFast")


class Only(tuple):
  """The values of a key that can be done, beside null."""


# Key -> types of a value that is read here, or the only values, or why no value changes a vector.
Rules = Mapping[str, tuple[type, ...] | Only | str]
SENTENCE = Only(["sentence_embedding"])
BERT_RULES: Rules = {
  "max_seq_length": (int,),
  "do_lower_case": (bool,),
  "transformer_task": Only(["feature-extraction"]),
  "modality_config": Only(
    [{"text": {"method": "forward", "method_output_name": "last_hidden_state"}}]
  ),
  "module_output_name": Only(["token_embeddings"]),
  "processing_kwargs": Only([{}]),
  "unpad_inputs": "how a batch is laid out",
  "query_length": Only(),
  "document_length": Only(),
  "query_expansion": Only(),
  "tokenizer_name_or_path": Only(),
  **dict.fromkeys(
    [f"{of}_{end}" for of in ("model", "config") for end in ("args", "kwargs")]
    + ["tokenizer_args", "processor_kwargs"],
    (dict,),
  ),
}
# Arguments of the loaders of transformers that sentence_bert_config.json may hand on.
HARMLESS_ARGUMENTS = {
  **dict.fromkeys(("dtype", "torch_dtype"), "the dtype here is an argument of Encoder.load"),
  "attn_implementation": "all compute the same attention",
  "trust_remote_code": "sentence-transformers removes it; code is refused by itself",
  "device_map": "where the weights lie",
  "low_cpu_mem_usage": "how the weights are read",
}
PROMPTS_RULES: Rules = {
  "prompts": (dict,),
  "default_prompt_name": (str,),
  "similarity_fn_name": Only(SIMILARITIES),
  "truncate_dim": (int,),
  "model_type": Only(["SentenceTransformer"]),
  "__version__": "who wrote the folder",
  "requirements": "versions of packages that do not run here",
}
FLAGS = {  # of older versions -> pooling_mode
  "pooling_mode_cls_token": "cls",
  "pooling_mode_max_tokens": "max",
  "pooling_mode_mean_tokens": "mean",
  "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
  "pooling_mode_weightedmean_tokens": "weightedmean",
  "pooling_mode_lasttoken": LAST,
}
WIDTH = "only reported; the states have the width of config.json"
POOLING_RULES: Rules = {
  "pooling_mode": (str, list),
  **dict.fromkeys(FLAGS, (bool,)),
  "include_prompt": (bool,),
  **dict.fromkeys(("word_embedding_dimension", "embedding_dimension"), WIDTH),
}
DENSE_RULES: Rules = {
  "in_features": (int,),
  "out_features": (int,),
  "bias": (bool,),
  "activation_function": (str,),
  "module_input_name": SENTENCE,
  "module_output_name": SENTENCE,
  "use_residual": Only([False]),
}
NORMALIZE_RULES: Rules = {"module_input_name": SENTENCE, "module_output_name": SENTENCE}
DROPOUT_RULES: Rules = {"dropout": "nothing is dropped once a model is trained"}
ENTRY_RULES: Rules = {  # of modules.json
  "type": (str,),
  "path": (str,),
  "idx": "the order is that of the list",
  "name": "its key in a dictionary",
  "kwargs": "names of arguments that a caller may hand to the module",
}
# Of many keys, most of which concern chats, padding or decoding.
TOKENIZER_RULES: Rules = {
  "model_max_length": (int, float),
  "truncation_side": Only(["right"]),
  "split_special_tokens": Only([False]),
  "auto_map": Only(),
  "added_tokens_decoder": (dict,),
  "add_prefix_space": (bool,),
  "tokenizer_class": (str,),
}


@dataclasses.dataclass(frozen=True)
class Dense:
  """A trained module after pooling."""

  weight_MD: np.ndarray
  bias_M: np.ndarray | None
  activation: str  # a key of ACTIVATIONS

  def __call__(self, x_ND: Float[np.ndarray, "N D"]) -> Float[np.ndarray, "N M"]:
    """Returns the activation of the product, in float32."""
    out_NM = x_ND @ self.weight_MD.T
    if self.bias_M is not None:
      out_NM = out_NM + self.bias_M
    return np.asarray(ACTIVATIONS[self.activation](out_NM), np.float32)

  @property
  def is_cut(self) -> bool:
    """Returns whether it only keeps the first coordinates."""
    plain = self.bias_M is None and self.activation == "Identity"
    return plain and np.array_equal(self.weight_MD, np.eye(*self.weight_MD.shape))


Module = Callable[[np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Recipe:
  """How the texts of a folder become vectors."""

  tokenizer: TemplateTokenizer  # puts the template around every text
  max_seq_length: int | None  # in tokens; None where no file states one
  pooling: str  # one of POOLINGS
  modules: tuple[Module, ...]  # after pooling, in their order, without a last Normalize
  dim: int  # leading coordinates of what they give
  normalized: bool  # vectors have unit length
  prompts: Mapping[str, str]
  default_prompt: str  # before every text that is given no other
  similarity: str  # one of SIMILARITIES, which compares two vectors
  lower_case: bool  # texts are made lower case

  @property
  def compares_by_cosine(self) -> bool:
    """Returns whether the similarity orders vectors as their cosines do."""
    of_unit_vectors = self.normalized and self.similarity in ("dot", "euclidean")
    return self.similarity == "cosine" or of_unit_vectors

  def finish(self, states_ND: Float[np.ndarray, "N D"]) -> Float[np.ndarray, "N M"]:
    """Returns what the modules after pooling make of states, before the cut and the last norm."""
    for module in self.modules:
      states_ND = module(states_ND)
    return states_ND


@dataclasses.dataclass(frozen=True)
class _Reading:
  """A folder that is being read, and what is wrong with it so far."""

  path: pathlib.Path
  problems: list[str]

  def refuse(self, file: str, problem: str) -> None:
    self.problems.append(f"E109 recipe: {file}: {problem}.")

  def object(self, file: str, rules: Rules, every_key: bool = True) -> dict[str, Any]:
    """Returns what a file says that is read here; an absent file says nothing."""
    if not (self.path / file).is_file():
      return {}
    return self.checked(file, read_json(self.path / file), rules, every_key)

  def checked(
    self, file: str, content: Mapping[str, Any], rules: Rules, every_key: bool = True
  ) -> dict[str, Any]:
    """Returns the keys whose values have a type of the rules; all others are refused."""
    found = {}
    for key, value in content.items():
      rule = rules.get(key, "" if not every_key else None)
      if problem := _problem(rule, key, value):
        self.refuse(file, problem)
      elif value is not None and not isinstance(rule, str):
        found[key] = value
    return found


def _problem(rule: tuple[type, ...] | Only | str | None, key: str, value: Any) -> str:
  """Returns why the value of a key cannot be done, "" where it can."""
  if rule is None:
    return f"{key} is {value!r}; this key is not known here"
  if value is None or isinstance(rule, str):
    return ""
  if isinstance(rule, Only):
    known = ", ".join(map(repr, rule)) or "null"
    return "" if value in rule else f"{key} is {value!r}; only {known} can be done"
  names = " or ".join(kind.__name__ for kind in rule)
  return "" if type(value) in rule else f"{key} is {value!r}, which is not of type {names}"


def _below(path: str, file: str) -> str:
  """Returns the path of a file in the folder of a module, which may be that of the model."""
  return str(pathlib.PurePosixPath(path) / file)


def is_embedder(path: pathlib.Path) -> bool:
  """Returns whether a folder says how its states become vectors; a language model does not."""
  return (path / MODULES).is_file()


def read(path: pathlib.Path, pooled_token: str | None = None) -> Recipe:
  """Returns the recipe of a folder.

  A folder without modules.json says nothing of pooling: the state of the last token becomes the
  vector, at unit length.

  Args:
    path: the folder.
    pooled_token: ends every text in place of what tokenizer.json puts there.

  Raises:
    LoadError: the folder says what cannot be done here; the message lists all of it.
    DataError: its tokenizer cannot be read.
  """
  config, own, reading = read_config(path), own_file.read(path), _Reading(path, [])
  bert, stated = _bert(reading), reading.object(PROMPTS, PROMPTS_RULES)
  of_tokenizer = reading.object(TOKENIZER_CONFIG, TOKENIZER_RULES, every_key=False)
  tokenizer = _tokenizer(reading, of_tokenizer, own, pooled_token)
  width = config.get("hidden_size") or 0
  pooling, modules = _modules(reading, width)
  rest, dim = _without_cut(modules, width)
  if own and not is_embedder(path):
    dim = own.dims.exported
  found = Recipe(
    tokenizer=tokenizer,
    max_seq_length=_max_seq_length(reading, tokenizer, bert, of_tokenizer),
    pooling=pooling,
    modules=tuple(rest),
    dim=min(dim, _at_least_one(reading, stated.get("truncate_dim"), dim)),
    normalized=not is_embedder(path) or _ends_with_normalize(modules),
    prompts=_prompts(reading, stated),
    default_prompt=_default_prompt(reading, stated),
    similarity=stated.get("similarity_fn_name", SIMILARITIES[0]),
    lower_case=bool(bert.get("do_lower_case")),
  )
  if found.lower_case:
    tokenizer.lower_case()
  _check_code(reading, config)
  _check_own(reading, own, found)
  raise_all(path, [*body_problems(config), *reading.problems])
  return found


def stated_prompts(path: pathlib.Path) -> dict[str, str] | None:
  """Returns the prompts of an embedder's folder, None of a folder that is no embedder.

  Raises:
    LoadError: the file of the prompts says what cannot be done here.
  """
  if not is_embedder(path):
    return None
  reading = _Reading(path, [])
  found = _prompts(reading, reading.object(PROMPTS, PROMPTS_RULES))
  raise_all(path, reading.problems)
  return found


def is_mrl(path: pathlib.Path) -> bool:
  """Returns whether a folder says that leading coordinates are embeddings by themselves.

  Exports say so in mlembed.json, other models in config.json, by the keys that vLLM reads.
  """
  if own := own_file.read(path):
    return len(own.dims.trained) > 1
  config = read_config(path)
  width = config.get("hidden_size") or 0
  if (dims := _stated_dims(config)) is None:
    return config.get("is_matryoshka") is True
  return any(dim < width for dim in dims)


def dims_of_others(path: pathlib.Path, most: int) -> tuple[int, ...]:
  """Returns the sizes of vectors that a folder without mlembed.json was trained at, ascending.

  They are those of config.json up to `most`, and `most`.
  """
  stated = _stated_dims(read_config(path)) or []
  return tuple(sorted({*(dim for dim in stated if 0 < dim < most), most}))


def _stated_dims(config: Mapping[str, Any]) -> list[int] | None:
  """Returns the whole numbers of matryoshka_dimensions, None where it is no list."""
  dims = config.get("matryoshka_dimensions")
  return [dim for dim in dims if type(dim) is int] if isinstance(dims, list) else None


def training_problems(found: Recipe) -> list[str]:
  """Returns what a folder does to texts or states that training would leave out."""
  problems = []
  if found.pooling != LAST:
    problems.append(f"its pooling is {found.pooling}; training pools the last token")
  if found.modules:
    problems.append("it has modules after pooling, such as Dense; training has none")
  if found.tokenizer.before:
    problems.append("its tokenizer puts a token before every text; training puts none")
  if (count := len(found.tokenizer.after)) > 1:
    problems.append(f"its tokenizer puts {count} tokens after a text; training puts one")
  if found.lower_case:
    problems.append("it makes texts lower case; training leaves them as they are")
  return problems


def _tokenizer(
  reading: _Reading, stated: Mapping[str, Any], own: OwnFile | None, pooled_token: str | None
) -> TemplateTokenizer:
  file = reading.path / TOKENIZER
  found = TemplateTokenizer(file, pooled_token)
  if own and not found.after:
    found = TemplateTokenizer(file, own.pooling.token)
  if found.cut_side == "left":
    reading.refuse(
      TOKENIZER, "truncation cuts texts at their beginning; only their ends can be cut"
    )
  if own and pooled_token is None and found.end != own.pooling.token:
    problem = f"ends texts with {found.end!r}, {own_file.NAME} says {own.pooling.token!r}"
    reading.refuse(TOKENIZER, f"{problem}; export the folder again")
  if stated.get("add_prefix_space") and stated.get("tokenizer_class") in PREFIXED:
    reading.refuse(TOKENIZER_CONFIG, "add_prefix_space is True; only False can be done")
  vocabulary = found.vocabulary
  for number, entry in stated.get("added_tokens_decoder", {}).items():
    token = entry.get("content") if isinstance(entry, dict) else entry
    if str(vocabulary.get(str(token))) != number:
      reading.refuse(TOKENIZER_CONFIG, f"adds {token!r} as {number}, which {TOKENIZER} does not")
      break  # a line for each of hundreds of tokens says no more
  return found


def _bert(reading: _Reading) -> dict[str, Any]:
  found = reading.object(BERT, BERT_RULES)
  for group in (key for key, rule in BERT_RULES.items() if rule == (dict,)):
    for argument, value in found.get(group, {}).items():
      if argument not in HARMLESS_ARGUMENTS:
        reading.refuse(BERT, f"{group}.{argument} is {value!r}; this argument is not known here")
  others = [file.name for file in sorted(reading.path.glob("sentence_*_config.json"))]
  if others and BERT not in others:
    reading.refuse(others[0], f"only {BERT} is read; rename it")
  return found


def _max_seq_length(
  reading: _Reading,
  tokenizer: TemplateTokenizer,
  bert: Mapping[str, Any],
  of_tokenizer: Mapping[str, Any],
) -> int | None:
  """Returns the length of sentence_bert_config.json, else the smaller one of those that are stated.

  So does sentence-transformers. The max_length under `truncation` of tokenizer.json is none of
  them: transformers does not read it.
  """
  stated = {
    f"{BERT}: max_seq_length": bert.get("max_seq_length"),
    f"{TOKENIZER_CONFIG}: model_max_length": of_tokenizer.get("model_max_length"),
    f"{CONFIG}: {POSITIONS}": read_positions(reading.path),
  }
  around = len(tokenizer.before) + len(tokenizer.after)
  for where, length in stated.items():
    if length is not None and not length > around:
      file, key = where.split(": ")
      reading.refuse(file, f"{key} is {length}, which leaves no token of a text")
  first, *others = (int(n) if n is not None and n < 2**63 else None for n in stated.values())
  return first or min((n for n in others if n is not None), default=None)


def _prompts(reading: _Reading, stated: Mapping[str, Any]) -> dict[str, str]:
  prompts = stated.get("prompts", {})
  for name, text in prompts.items():
    if not isinstance(text, str | None):
      reading.refuse(PROMPTS, f"the prompt {name!r} is {text!r}, which is not of type str")
  return {name: text or "" for name, text in prompts.items()}


def _default_prompt(reading: _Reading, stated: Mapping[str, Any]) -> str:
  name, prompts = stated.get("default_prompt_name"), stated.get("prompts", {})
  if name is not None and name not in {"query", "document", *prompts}:
    known = ", ".join(prompts) or "none"
    reading.refuse(PROMPTS, f"default_prompt_name is {name!r}; there are the prompts: {known}")
  return prompts.get(name) or ""


def _modules(reading: _Reading, width: Any) -> tuple[str, list[Module]]:
  """Returns how states are pooled, and the modules after that."""
  if not is_embedder(reading.path):
    if found := sorted(reading.path.glob(f"*_Pooling/{CONFIG}")):
      name = found[0].relative_to(reading.path)
      reading.refuse(MODULES, f"is not there, though {name} is; copy the folder again")
    return LAST, []
  entries = _entries(reading)
  kinds = [str(entry.get("type")).rpartition(".")[2] for entry in entries]
  unknown = [
    entry.get("type")
    for entry, kind in zip(entries, kinds, strict=True)
    if kind not in MODULE_KINDS or not str(entry.get("type")).startswith("sentence_transformers.")
  ]
  if unknown:
    reading.refuse(MODULES, f"there is no {unknown[0]} here; known are {', '.join(MODULE_KINDS)}")
    return LAST, []
  if kinds[:2] != ["Transformer", "Pooling"] or {"Transformer", "Pooling"} & set(kinds[2:]):
    reading.refuse(MODULES, f"the order is {kinds}; expected Transformer, Pooling, and others then")
    return LAST, []
  if path := entries[0].get("path"):
    reading.refuse(MODULES, f"the model lies in {path}; only a model beside {MODULES} can be read")
  pooling = _pooling(reading, entries[1]["path"])
  return pooling, _after_pooling(reading, entries[2:], kinds[2:], width)


def _entries(reading: _Reading) -> list[dict[str, Any]]:
  """Returns modules.json; every entry that is left has a type, and a path within the folder."""
  try:
    listed = json.loads((reading.path / MODULES).read_text(encoding="utf-8"))
  except (OSError, ValueError, RecursionError) as error:
    raise LoadError(f"E104 file: {reading.path / MODULES} cannot be read: {error}") from error
  if not isinstance(listed, list) or not all(isinstance(entry, dict) for entry in listed):
    raise LoadError(f"E104 file: {reading.path / MODULES} is no list of modules")
  found = [reading.checked(MODULES, entry, ENTRY_RULES) for entry in listed]
  for entry in found:
    path = pathlib.PurePosixPath(entry.setdefault("path", ""))
    if path.is_absolute() or ".." in path.parts:
      raise LoadError(f"E104 file: {reading.path / MODULES}: {path} lies outside of the folder")
  return found


def _pooling(reading: _Reading, path: str) -> str:
  file = _below(path, CONFIG)
  if not (reading.path / file).is_file():
    reading.refuse(file, "is not there; copy the folder again")
    return LAST
  stated = reading.object(file, POOLING_RULES)
  flagged = [mode for key, mode in FLAGS.items() if stated.get(key)]
  mode = stated.get("pooling_mode", flagged or ["mean"])
  modes = [mode] if isinstance(mode, str) else mode
  if flagged and sorted(map(str, modes)) != sorted(flagged):
    reading.refuse(file, f"pooling_mode is {mode!r}, but the flags say {flagged}; let them agree")
  if len(modes) != 1 or modes[0] not in POOLINGS:
    known = ", ".join(POOLINGS)
    reading.refuse(file, f"pooling_mode is {mode!r}; only one of {known} can be done")
    return LAST
  if stated.get("include_prompt") is False and modes[0] != LAST:
    reading.refuse(file, f"include_prompt is False beside {modes[0]}; only True can be done")
  return modes[0]


def _after_pooling(
  reading: _Reading, entries: Sequence[Mapping[str, Any]], kinds: Sequence[str], width: Any
) -> list[Module]:
  found: list[Module] = []
  for entry, kind in zip(entries, kinds, strict=True):
    file = _below(entry["path"], CONFIG)
    if kind == "Dense":
      module = _dense(reading, entry["path"], width)
      width = len(module.weight_MD) if module else None
      found += [module] if module else []
    elif kind == "Normalize":
      reading.object(file, NORMALIZE_RULES)
      found.append(unit)
    else:
      reading.object(file, DROPOUT_RULES)
  return found


def _dense(reading: _Reading, path: str, width: Any) -> Dense | None:
  """Returns a module Dense; None where it is refused."""
  file, weights, before = _below(path, CONFIG), _below(path, WEIGHTS), len(reading.problems)
  stated = reading.object(file, DENSE_RULES)
  out, into = stated.get("out_features"), stated.get("in_features")
  if out is None or into is None or width not in (into, None):
    reading.refuse(file, f"in_features is {into}, out_features {out}; {width} coordinates come in")
  if not (reading.path / weights).is_file():
    reading.refuse(weights, "is not there, and no other file is read for it")
  if len(reading.problems) > before:
    return None
  wanted = {"linear.weight": (out, into)}
  wanted |= {"linear.bias": (out,)} if stated.get("bias", True) else {}
  tensors = _tensors(reading, weights, wanted)
  activation = _activation(reading, file, stated.get("activation_function", f"{TORCH}Tanh"))
  if tensors is None or activation is None:
    return None
  return Dense(tensors["linear.weight"], tensors.get("linear.bias"), activation)


def _tensors(
  reading: _Reading, file: str, wanted: Mapping[str, tuple[Any, ...]]
) -> dict[str, np.ndarray] | None:
  """Returns the tensors of a file in float32, None where they are others than `wanted`."""
  stored: dict[str, Stored] = open_file(reading.path / file)
  shapes = {name: tensor.shape for name, tensor in stored.items()}
  if shapes != wanted:
    reading.refuse(file, f"holds {shapes}, expected {dict(wanted)}")
    return None
  if others := {tensor.dtype for tensor in stored.values()} - set(DTYPES):
    reading.refuse(file, f"has tensors of {sorted(others)}, expected {', '.join(DTYPES)}")
    return None
  found = {name: tensor.read().astype(np.float32) for name, tensor in stored.items()}
  if not all(np.isfinite(tensor).all() for tensor in found.values()):
    reading.refuse(file, "has NaN or infinite values; the file is damaged")
    return None
  return found


def _activation(reading: _Reading, file: str, name: str) -> str | None:
  kind = name.rpartition(".")[2]
  if name.startswith(TORCH) and kind in ACTIVATIONS:
    return kind
  known = ", ".join(ACTIVATIONS)
  reading.refuse(file, f"activation_function is {name}; only {known} of {TORCH} can be done")
  return None


def _ends_with_normalize(modules: Sequence[Module]) -> bool:
  return bool(modules) and modules[-1] is unit


def _without_cut(modules: Sequence[Module], width: int) -> tuple[list[Module], int]:
  """Returns the modules without a last Normalize and a cut before it, and the dimension."""
  rest = list(modules[:-1] if _ends_with_normalize(modules) else modules)
  widths = [len(module.weight_MD) for module in rest if isinstance(module, Dense)]
  if rest and isinstance(rest[-1], Dense) and rest[-1].is_cut:
    rest.pop()
  return rest, [width, *widths][-1]


def _at_least_one(reading: _Reading, stated: int | None, absent: int) -> int:
  if stated is not None and stated < 1:
    reading.refuse(PROMPTS, f"truncate_dim is {stated}; at least 1 is needed")
  return absent if stated is None else stated


def _check_code(reading: _Reading, config: Mapping[str, Any]) -> None:
  """Refuses code of the folder, but for that of a folder of factors, which is read without it."""
  named = config.get("auto_map")
  if named and not str(config.get("model_type")).startswith(param_mapping.REMOTE):
    reading.refuse(
      CONFIG,
      f"auto_map names code ({named}), which is not run; remove the key where the code computes "
      "what transformers does",
    )


def _check_own(reading: _Reading, own: OwnFile | None, found: Recipe) -> None:
  """Refuses an export whose other files were changed to another recipe."""
  if not own:
    return
  if found.pooling != LAST or found.modules or found.dim != own.dims.exported:
    reading.refuse(
      own_file.NAME,
      f"an export has the last token's state and {own.dims.exported} coordinates, but the modules "
      "say otherwise; export the folder again",
    )
