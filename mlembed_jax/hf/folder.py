"""A folder in Hugging Face layout, opened: its shape, its tensors, and all that is wrong with it.

Only headers are read; no weight is read before `Stored.read`. One error lists all that does not
fit.
"""

import dataclasses
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, get_type_hints

import ml_dtypes  # noqa: F401  (gives numpy the name bfloat16, which safetensors looks up)
import numpy as np
import safetensors
from jaxtyping import Int

from mlembed_jax import files
from mlembed_jax.config_fields import NO_LORA, ModelConfig
from mlembed_jax.data.tokenizer import Vocabulary
from mlembed_jax.errors import LoadError
from mlembed_jax.families import FAMILIES
from mlembed_jax.hf import own_file, param_mapping
from mlembed_jax.hf.file_names import (
  ADAPTER,
  BERT,
  CONFIG,
  INDEX,
  MODULES,
  PROMPTS,
  TOKENIZER,
  TOKENIZER_CONFIG,
  WEIGHTS,
)
from mlembed_jax.workdir import RUN

DTYPES = ("BF16", "F16", "F32")
PREFIXES = ("", "model.")
POSITIONS = "max_position_embeddings"
HEAD = "lm_head.weight"  # of a language model
# What our encoder does and cannot be told otherwise; a key that is absent has this default.
FIXED = {
  "hidden_act": "silu",
  "attention_bias": False,
  "mlp_bias": False,
  "use_sliding_window": False,
  "is_causal": True,
  "use_bidirectional_attention": False,
  "partial_rotary_factor": 1.0,
}
# Types of keys beside the sizes, whose types are those of ModelConfig.
OTHER_TYPES = {
  "rope_theta": float,
  "rope_parameters": dict,
  "rope_parameters.rope_theta": float,
  "rope_scaling": dict,
  POSITIONS: int,
  param_mapping.RANK_KEY: int,
  "layer_types": list,
}
ALLOWED = {int: (int,), float: (float, int), dict: (dict,), list: (list,)}  # True is no int here
# Whole numbers are sizes. Layers: a folder of a wrong one has its tensors listed.
RANGES: dict[str, tuple[float, float]] = {
  key: (1, 10_000 if field == "layers" else 2**31 - 1)
  for field, key in (*param_mapping.CONFIG_KEYS.items(), ("rank", param_mapping.RANK_KEY))
}
RANGES |= {"rms_norm_eps": (0, 1), POSITIONS: (1, 2**31 - 1)}
RANGES |= dict.fromkeys(("rope_theta", "rope_parameters.rope_theta"), (1, 1e30))
NAMES_SHOWN = 3  # each kind of problem lists so many names

HUB = "hf:"  # begins the name of a model of the Hugging Face Hub
# Modules have folders of their own: their config.json and weights match the first patterns, too.
FILES = ("*.safetensors", INDEX, CONFIG, f"*/{CONFIG}", TOKENIZER, TOKENIZER_CONFIG)
FILES += ("mlembed/*", own_file.NAME, "U.pth", "V.pth", MODULES, PROMPTS, BERT, ADAPTER)


@dataclasses.dataclass(frozen=True)
class Stored:
  """A tensor of an open file; nothing is read before `read`."""

  file: Any  # an open safetensors file
  name: str

  @property
  def shape(self) -> tuple[int, ...]:
    """Returns the shape that the header states."""
    return tuple(self.file.get_slice(self.name).get_shape())

  @property
  def dtype(self) -> str:
    """Returns the dtype that the header states, in the spelling of safetensors."""
    return self.file.get_slice(self.name).get_dtype()

  def read(self) -> np.ndarray:
    """Returns the tensor in the dtype of the file."""
    return self.file.get_tensor(self.name)


@dataclasses.dataclass(frozen=True)
class Folder:
  """A folder that holds exactly the tensors of a model."""

  path: pathlib.Path
  rows: int  # of the token table, as it is taken
  rank: int  # of the stored factors of the table; 0: it is stored whole
  tensors: list[tuple[param_mapping.Tensor, Stored]]
  ids: Int[np.ndarray, "K"] | None = None  # the rows of the table that are taken; None: all

  def taken(self, table: np.ndarray) -> np.ndarray:
    """Returns the rows of the stored table, or of its first factor, that are taken."""
    return table if self.ids is None else table[self.ids]


def resolve(source: str, patterns: Sequence[str] = FILES) -> pathlib.Path:
  """Returns the folder of `train.init_from`: a path, or hf:ORG/NAME, which is downloaded.

  Args:
    source: the path or name.
    patterns: of the files that are downloaded.

  Raises:
    LoadError: there is no such folder, or the Hub does not give the model.
  """
  path = pathlib.Path(source.removeprefix(HUB))
  if (path / RUN).is_file():
    raise LoadError(
      f"E104 file: {source} is the workdir of a training run, not a model; write one with "
      f"python -m mlembed_jax.export --checkpoint {source} --out DIR"
    )
  if path.is_dir():
    return path
  if not source.startswith(HUB):
    raise LoadError(f"E104 file: {source} is no folder; a model of the Hub is {HUB}ORG/NAME")
  try:
    import huggingface_hub
  except ImportError as error:
    raise LoadError(f'{source}: pip install "mlembed_jax[hub]", or download the folder') from error
  try:
    found = huggingface_hub.snapshot_download(str(path), allow_patterns=list(patterns))
  except Exception as error:  # its own, of requests, of the file system
    raise LoadError(f"{source} cannot be downloaded: {error}") from error
  return pathlib.Path(found)


def open_model_folder(
  path: pathlib.Path, model: ModelConfig, ids: Int[np.ndarray, "K"] | None = None
) -> Folder:
  """Returns the opened folder of `model`; its table may be whole or factors of any rank.

  `ids` are the rows of the table that are taken; None: all.

  Raises:
    LoadError: config.json is not that of `model`; a tensor is missing, unexpected or of another
      shape or dtype; a file is absent or unreadable.
  """
  config = read_config(path)
  whole = model if ids is None else dataclasses.replace(model, vocab=config.get("vocab_size") or 0)
  raise_all(path, _config_problems(config, whole))
  if ids is not None and ids.max() >= whole.vocab:
    raise LoadError(
      f"E106 tokenizer: id {ids.max()} of {path / TOKENIZER} but the table has {whole.vocab} rows. "
      f"Take the {TOKENIZER} that the weights were trained with."
    )
  stored = _without_prefix(path, _open(path), config.get("tie_word_embeddings") is True)
  rows, rank = config["vocab_size"], _family_and_rank(config)[1]
  expected = param_mapping.tensors(dataclasses.replace(model, vocab=rows, rank=rank))
  raise_all(path, _tensor_problems(expected, stored))
  taken = rows if ids is None else len(ids)
  return Folder(path, taken, rank, [(t, stored[t.name]) for t in expected], ids)


def ids_of_tokens(path: pathlib.Path, vocabulary: Vocabulary) -> Int[np.ndarray, "K"] | None:
  """Returns the row of a folder's token table for each id of a vocabulary, by the tokens' names.

  None where every token that both have has the same id in both, or the folder has no tokenizer.json
  to compare with.

  Raises:
    LoadError: the vocabulary has a token that the folder lacks, beside tokens with other ids or in
      the place of another token; or it has an id without a token.
  """
  file = path / TOKENIZER
  if not file.is_file() or file.samefile(vocabulary.path):
    return None
  own, theirs = vocabulary.vocabulary, Vocabulary(file).vocabulary
  added, taken = [token for token in own if token not in theirs], {*theirs.values()}
  moved = any(theirs.get(token, number) != number for token, number in own.items())
  if not moved and not any(own[token] in taken for token in added):
    return None
  if added:
    raise LoadError(
      f"E106 tokenizer: {vocabulary.path} has other tokens than {file}, such as {added[0]!r}. Take "
      "that file, or one that python -m mlembed_jax.vocabulary made of it; a token that you "
      "renamed is to be renamed in both."
    )
  ids = np.full(vocabulary.size, -1)
  for token, number in own.items():
    ids[number] = theirs[token]
  if (ids < 0).any():
    raise LoadError(f"E106 tokenizer: {vocabulary.path} has no token for id {int(np.argmin(ids))}.")
  return ids


def check_folder(
  path: pathlib.Path, model: ModelConfig, vocabulary: Vocabulary
) -> Int[np.ndarray, "K"] | None:
  """Returns the rows of the folder's table that are those of `model`, None for all.

  They are `ids_of_tokens`, or the first ones where `model` has fewer rows. Reads no weights.

  Raises:
    LoadError: as `open_model_folder` and `ids_of_tokens`, or the table lacks rows.
  """
  ids, tokens = ids_of_tokens(path, vocabulary), vocabulary.size
  stated = read_config(path).get("vocab_size")
  if ids is None and isinstance(stated, int) and tokens <= model.vocab < stated:
    ids = np.arange(tokens)
  if (rows := open_model_folder(path, model, ids).rows) < tokens:
    raise LoadError(
      f"E106 tokenizer: {tokens} ids but the table of {path} has {rows} rows. Take the "
      f"{TOKENIZER} that its weights were trained with, or resize the table in transformers."
    )
  return ids


def raise_all(path: pathlib.Path, problems: Sequence[str]) -> None:
  """Raises LoadError with all problems, if there are any."""
  if problems:
    raise LoadError(f"{path}: this folder cannot be imported\n" + "\n".join(problems))


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """Returns the object that a JSON file holds; LoadError where it cannot be read."""
  found = files.read_json(path, f"E104 file: {path}", LoadError)
  if not isinstance(found, dict):
    raise LoadError(f"E104 file: {path} holds no JSON object")
  return found


def read_config(path: pathlib.Path) -> dict[str, Any]:
  """Returns config.json, in which all that is stated has its type.

  Raises:
    LoadError: it cannot be read, has values of other types, or is not beside weights that are read.
  """
  _check_form(path)
  config = read_json(path / CONFIG)
  raise_all(path, _type_problems(config) or _range_problems(config))
  return config


def _check_form(path: pathlib.Path) -> None:
  """Raises LoadError where the weights have a form that is not read."""
  if (path / ADAPTER).is_file():
    base = read_json(path / ADAPTER).get("base_model_name_or_path")
    raise LoadError(
      f"E104 file: {path} is an adapter of {base}: merge the two, by merge_and_unload() of peft, "
      f"and save the whole model (without {ADAPTER})"
    )
  if not any(path.glob("*.safetensors*")) and (found := sorted(path.glob("*.bin"))):
    raise LoadError(
      f"E104 file: {path} has {found[0].name} and no {WEIGHTS}; only the latter is read. "
      "Load it in transformers, and save it again by save_pretrained"
    )


def read_model(path: pathlib.Path) -> ModelConfig:
  """Returns the shape that config.json states, in float32.

  Raises:
    LoadError: the file is absent, lacks a field, or is of an architecture that is not known.
  """
  config = read_config(path)
  raise_all(path, _family_problems(config))
  family, rank = _family_and_rank(config)
  shape = {field: _stated(config, field) for field in param_mapping.CONFIG_KEYS}
  shape["rope_theta"] = next(filter(None, _thetas(config).values()), FAMILIES[family].rope_theta)
  if absent := [field for field, value in shape.items() if value is None]:
    key = param_mapping.CONFIG_KEYS.get(absent[0], absent[0])
    raise LoadError(f"E105 config: {path / CONFIG} has no {key}")
  if shape["heads"] % shape["kv_heads"] or shape["head_dim"] % 2:
    raise LoadError(
      f"E105 config: {path / CONFIG} has {shape['heads']} heads of {shape['head_dim']} "
      f"coordinates and {shape['kv_heads']} key-value heads; the first must be a multiple of the "
      "last, and coordinates come in pairs"
    )
  numerics: dict[str, Any] = {"dtype": "float32", "attention": "auto", "remat": "none"}
  return ModelConfig(**(shape | numerics), family=family, rank=rank, lora=NO_LORA)


def read_positions(path: pathlib.Path) -> int | None:
  """Returns how many positions config.json allows, in tokens, or its family where it says nothing.

  None is for an architecture that is not known.

  Raises:
    LoadError: the file cannot be read, or states something of a wrong type.
  """
  config = read_config(path)
  family = FAMILIES.get(_family_and_rank(config)[0])
  return config.get(POSITIONS) or getattr(family, POSITIONS, None)


def _stated(config: Mapping[str, Any], field: str) -> Any:
  """Returns what config.json says of a field of the model, or means by leaving it out."""
  key = param_mapping.CONFIG_KEYS[field]
  found = config.get(key)
  if key not in config:
    found = getattr(FAMILIES.get(_family_and_rank(config)[0]), key, None)
  width, heads = config.get("hidden_size"), config.get("num_attention_heads")
  if field == "head_dim" and found is None and width and heads:
    return width // heads
  return heads if field == "kv_heads" and found is None else found


def _family_and_rank(config: Mapping[str, Any]) -> tuple[str, int]:
  """Returns the name of the architecture, and the rank of the stored factors or 0."""
  model_type, rank = str(config.get("model_type")), config.get(param_mapping.RANK_KEY)
  if model_type.startswith(param_mapping.REMOTE) and isinstance(rank, int):
    return model_type.removeprefix(param_mapping.REMOTE), rank
  return model_type, 0


def _family_problems(config: Mapping[str, Any]) -> list[str]:
  if _family_and_rank(config)[0] in FAMILIES:
    return []
  model_type, known = config.get("model_type"), ", ".join(map(repr, FAMILIES))
  return [f"E105 config: config.json: model_type is {model_type!r}; only {known} can be imported."]


def _type_problems(config: Mapping[str, Any]) -> list[str]:
  """Returns what is of another type than the model needs; null is as good as absent."""
  hints = get_type_hints(ModelConfig)
  types = {key: hints[field] for field, key in param_mapping.CONFIG_KEYS.items()} | OTHER_TYPES
  stated = {**config, **_thetas(config)}
  return [
    f"E105 config: config.json: {key} is {_shown(stated[key])}, which is not of type "
    f"{wanted.__name__}."
    for key, wanted in types.items()
    if stated.get(key) is not None and type(stated[key]) not in ALLOWED[wanted]
  ]


def _range_problems(config: Mapping[str, Any]) -> list[str]:
  """Returns what no model has; types are right. A size decides what is listed and allocated."""
  stated = {**config, **_thetas(config)}
  lines = [
    f"{key} is {_shown(stated[key])}, which is out of range"
    for key, (least, most) in RANGES.items()
    if stated.get(key) is not None and not least <= stated[key] <= most
  ]
  return [f"E105 config: config.json: {line}." for line in lines]


def _config_problems(config: Mapping[str, Any], model: ModelConfig) -> list[str]:
  lines, family = [], _family_and_rank(config)[0]
  if family in FAMILIES and family != model.family:
    lines.append(f"model_type is {config['model_type']!r}, which needs model.family = {family}")
  for field, key in param_mapping.CONFIG_KEYS.items():
    found, wanted = _stated(config, field), getattr(model, field)
    if field == "vocab" and isinstance(found, int) and found < wanted:
      continue  # the missing rows belong to no token and become zeros
    if found != wanted:
      lines.append(f"{key} is {found!r}, expected {wanted} (model.{field})")
  lines += _theta_problems(config, model)
  lines = [f"E105 config: {CONFIG}: {line}." for line in lines]
  if lines:
    lines[-1] += " --config configs/from_hf.py:FOLDER takes family and shape from the folder."
  return [*_family_problems(config), *lines, *body_problems(config)]


def body_problems(config: Mapping[str, Any]) -> list[str]:
  """Returns what config.json says that the encoder cannot do, whatever its sizes are."""
  lines = [
    f"{key} is {config[key]!r}; only {wanted!r} can be imported"
    for key, wanted in FIXED.items()
    if config.get(key) not in (None, wanted)
  ]
  if others := {str(kind) for kind in config.get("layer_types") or ()} - {"full_attention"}:
    lines.append(f"layer_types has {sorted(others)}; only 'full_attention' can be imported")
  if quantized := config.get("quantization_config"):
    method = quantized.get("quant_method") if isinstance(quantized, dict) else quantized
    lines.append(f"the weights are quantized ({method}); take the model in bfloat16 or float32")
  return [f"E105 config: {CONFIG}: {line}." for line in lines + _rope_problems(config)]


def _thetas(config: Mapping[str, Any]) -> dict[str, Any]:
  """Returns both spellings: `rope_theta` of transformers 4, `rope_parameters` of 5."""
  parameters = config.get("rope_parameters")
  return {
    "rope_theta": config.get("rope_theta"),
    "rope_parameters.rope_theta": (
      parameters.get("rope_theta") if isinstance(parameters, dict) else None
    ),
  }


def _theta_problems(config: Mapping[str, Any], model: ModelConfig) -> list[str]:
  thetas = {key: theta for key, theta in _thetas(config).items() if theta is not None}
  family = FAMILIES.get(_family_and_rank(config)[0])
  if not thetas and family and family.rope_theta != model.rope_theta:
    return [f"rope_theta is missing, expected {model.rope_theta} (model.rope_theta)"]
  return [
    f"{key} is {theta}, expected {model.rope_theta} (model.rope_theta)"
    for key, theta in thetas.items()
    if theta != model.rope_theta
  ]


def _rope_problems(config: Mapping[str, Any]) -> list[str]:
  lines = []
  for key in ("rope_scaling", "rope_parameters"):
    group = config.get(key) or {}
    rope_type = group.get("rope_type", group.get("type")) or "default"
    if rope_type != "default":
      lines.append(f"{key} is of type {rope_type!r}; only unscaled positions can be imported")
    if group.get("partial_rotary_factor", 1.0) not in (None, 1.0):
      lines.append(f"{key} has a partial_rotary_factor; only whole heads that turn can be imported")
  return lines


def _open(path: pathlib.Path) -> dict[str, Stored]:
  if (path / WEIGHTS).is_file():
    return open_file(path / WEIGHTS)
  if not (path / INDEX).is_file():
    raise LoadError(f"E104 file: {path} has neither {WEIGHTS} nor {INDEX}")
  placed = read_json(path / INDEX).get("weight_map")
  if not isinstance(placed, dict) or not placed:
    raise LoadError(f"E104 index: {path / INDEX} has no weight_map, tensor by file")
  if outside := sorted(repr(f) for f in placed.values() if not _is_inside(f)):
    raise LoadError(
      f"E104 index: {path / INDEX} names {outside[0][:80]}, which is no file of the folder"
    )
  absent = {f for f in placed.values() if not (path / f).is_file()}
  opened = {f: open_file(path / f) for f in sorted(set(placed.values()) - absent)}
  problems = [f"{f} is named in the index but not in the folder" for f in sorted(absent)]
  problems += [
    f"{name} is not in {file}, where the index places it"
    for name, file in placed.items()
    if file in opened and name not in opened[file]
  ]
  problems += [
    f"{name} stands in {file}, but the index says {placed.get(name, 'nothing of it')}"
    for file, tensors in opened.items()
    for name in tensors
    if placed.get(name) != file
  ]
  raise_all(path, [f"E104 index: {p}. Copy the folder again." for p in problems])
  return {name: opened[file][name] for name, file in placed.items()}


def _is_inside(name: Any) -> bool:
  """Returns whether a name is that of a file of a folder. The file itself may be a link, as in the
  cache of the Hub, where all are.
  """
  if not isinstance(name, str) or "\\" in name or "\0" in name:
    return False
  parts = pathlib.PurePosixPath(name)
  return not parts.is_absolute() and ".." not in parts.parts and parts.suffix == ".safetensors"


def open_file(path: pathlib.Path) -> dict[str, Stored]:
  """Returns the tensors of one file; LoadError where it is not whole."""
  try:
    if not path.is_file():  # a pipe would be waited for
      raise FileNotFoundError("there is no such file")
    file = safetensors.safe_open(path, "np")
  except (OSError, safetensors.SafetensorError) as error:
    raise LoadError(f"E104 file: {path} is not a whole safetensors file: {error}") from error
  return {name: Stored(file, name) for name in file.keys()}  # noqa: SIM118  (not a mapping)


def _without_prefix(
  path: pathlib.Path, stored: Mapping[str, Stored], tied: bool
) -> dict[str, Stored]:
  """Returns the tensors of the encoder under names without the prefix that all of them share.

  Left out are a language-model head, of which an encoder has no use, and the rotary frequencies
  that old versions of transformers stored. The head of a tied model is its token table, which may
  be stored under this name alone.
  """
  body = {
    name: tensor
    for name, tensor in stored.items()
    if name != HEAD and not name.endswith("rotary_emb.inv_freq")
  }
  prefix = _prefix(body)
  if prefix not in PREFIXES:
    raise LoadError(
      f"E102 {path}: tensors begin with {prefix!r}, expected 'model.' or nothing. "
      "Save the text model of this checkpoint on its own first."
    )
  found = {name.removeprefix(prefix): tensor for name, tensor in body.items()}
  return {param_mapping.TABLE[1]: stored[HEAD], **found} if tied and HEAD in stored else found


def _prefix(names: Iterable[str]) -> str:
  """Returns what stands before the name of the token table, or else of the first layers."""
  tables = (param_mapping.TABLE, *param_mapping.FACTORS)
  for end in (*(name for _, name, _ in tables), f"layers.0.{param_mapping.LAYER[0][1]}"):
    for name in names:
      if name.endswith(end):
        return name.removesuffix(end)
  return ""


def _tensor_problems(
  expected: Sequence[param_mapping.Tensor], stored: Mapping[str, Stored]
) -> list[str]:
  problems = []
  missing = [t.name for t in expected if t.name not in stored]
  if missing:
    problems.append(
      f"E101 missing tensors: {len(missing)} of {len(expected)} not found, {_some(missing)}. "
      f"config.json says {_layers(t.name for t in expected)} layers, the weights hold "
      f"{_layers(stored)}. File missing, or wrong num_hidden_layers?"
    )
  if unexpected := sorted(set(stored) - {t.name for t in expected}):
    problems.append(
      f"E102 unexpected tensors: {len(unexpected)}, {_some(unexpected)}. "
      "The body has none of them: another architecture, an adapter, or more layers?"
    )
  for t in expected:
    if t.name in stored and stored[t.name].shape != t.shape:
      found = list(stored[t.name].shape)
      problems.append(f"E103 shape: {t.name} is {found}, expected {list(t.shape)} = {t.meaning}.")
  others: dict[str, list[str]] = {}
  for name, tensor in stored.items():
    others.setdefault(tensor.dtype, []).append(name)
  problems += [
    f"E105 dtype: {len(names)} tensors are {dtype}, {_some(names)}, expected {', '.join(DTYPES)}. "
    "Take the model before it was quantized."
    for dtype, names in others.items()
    if dtype not in DTYPES
  ]
  return problems


def _shown(value: Any) -> str:
  text = repr(value)
  return text if len(text) <= 80 else text[:80] + "..."


def _some(found: Sequence[str]) -> str:
  more = f" and {len(found) - NAMES_SHOWN} more" if len(found) > NAMES_SHOWN else ""
  return "first " + ", ".join(found[:NAMES_SHOWN]) + more


def _layers(found: Any) -> int:
  return len({name.split(".")[1] for name in found if name.startswith("layers.")})
