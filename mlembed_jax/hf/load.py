"""Strict import of a Qwen3 folder in Hugging Face layout, one of ours or anyone's.

All that does not fit is reported in one error before any weight is read. Weights are read tensor
by tensor from mapped files: the host holds the parameters and one tensor.
"""

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import flax.traverse_util
import ml_dtypes  # noqa: F401  (gives numpy the name bfloat16, which safetensors looks up)
import numpy as np
import safetensors

from mlembed_jax.config_fields import ModelConfig
from mlembed_jax.hf import names
from mlembed_jax.matryoshka import factorize

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
FACTORS = "mlembed/uv.safetensors"  # of our own exports: tensors U [vocab, rank], V [rank, width]
DTYPES = ("BF16", "F16", "F32")
PREFIXES = ("", "model.")
# What our encoder does and cannot be told otherwise; a key that is absent has this default.
FIXED = {"hidden_act": "silu", "attention_bias": False, "use_sliding_window": False}
# Product of the trained factors against the stored table, which may be rounded to bfloat16 (2^-9);
# the second is for sums in another order, relative to the largest value.
FACTORS_RTOL, FACTORS_ATOL = 2**-8, 1e-5
FACTORS_ROWS = 1024  # compared
NAMES_SHOWN = 3  # of each kind of problem

Params = dict[str, Any]


class LoadError(ValueError):
  """A folder that cannot be imported; the message names file, tensor, expected and found."""


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
    """Returns the tensor in float32."""
    return self.file.get_tensor(self.name).astype(np.float32)


def load_params(path: pathlib.Path, model: ModelConfig) -> Params:
  """Returns the float32 tree of `model`, its token table factorised where `model.rank` asks.

  The trained factors of our own export are used where they reach the rank: their columns stand in
  the order of training, which a new factorisation of their product would lose.

  Raises:
    LoadError: see `load_folder`; or the trained factors do not belong to the table.
  """
  params = load_folder(path, model)
  if not model.rank:
    return params
  factors = _trained_factors(path / FACTORS, model, params["table"])
  table, up = factors or (np.array(x) for x in factorize(params["table"], model.rank))
  return {**params, "table": table, "up": up}


def load_folder(path: pathlib.Path, model: ModelConfig) -> Params:
  """Returns the float32 tree of the folder; the token table is whole whatever `model.rank` is.

  Rows of the table that the folder does not have are zero.

  Raises:
    LoadError: config.json is not that of `model`; a tensor is missing, unexpected, not finite or
      of another shape; a file is absent or unreadable.
  """
  expected, stored = _checked(path, model)
  return _read(path, model, expected, stored)


def check_folder(path: pathlib.Path, model: ModelConfig, tokens: int) -> None:
  """Raises LoadError where `load_folder` would, or the table lacks rows; reads headers only."""
  _checked(path, model)
  if (rows := _read_json(path / "config.json")["vocab_size"]) < tokens:
    raise LoadError(
      f"E106 tokenizer: {tokens} ids but the table of {path} has {rows} rows. "
      "Take the tokenizer.json of that folder."
    )


def _checked(
  path: pathlib.Path, model: ModelConfig
) -> tuple[Sequence[names.Tensor], dict[str, Stored]]:
  config = _read_json(path / "config.json")
  _raise(path, _config_problems(config, model))
  stored = _without_prefix(path, _open(path))
  expected = names.tensors(dataclasses.replace(model, vocab=config["vocab_size"]))
  _raise(path, _tensor_problems(expected, stored))
  return expected, stored


def _raise(path: pathlib.Path, problems: Sequence[str]) -> None:
  if problems:
    raise LoadError(f"{path}: this folder cannot be imported\n" + "\n".join(problems))


def _read_json(path: pathlib.Path) -> dict[str, Any]:
  try:
    return json.loads(path.read_text(encoding="utf-8"))
  except (OSError, ValueError) as error:
    raise LoadError(f"E104 file: {path} cannot be read as JSON: {error}") from error


def read_model(path: pathlib.Path) -> ModelConfig:
  """Returns the shape that config.json states, with a full token table, in float32.

  Raises:
    LoadError: the file is absent, or lacks a field.
  """
  config = _read_json(path / "config.json")
  shape: dict[str, Any] = {f: config.get(key) for f, key in names.CONFIG_KEYS.items()}
  shape["rope_theta"] = next(filter(None, _thetas(config).values()), None)
  if absent := [field for field, value in shape.items() if value is None]:
    key = names.CONFIG_KEYS.get(absent[0], absent[0])
    raise LoadError(f"E105 config: {path}/config.json has no {key}")
  return ModelConfig(**shape, rank=0, dtype="float32", attention="auto", remat="none")


def _config_problems(config: Mapping[str, Any], model: ModelConfig) -> list[str]:
  lines = []
  if config.get("model_type") != "qwen3":
    lines.append(f"model_type is {config.get('model_type')!r}; only 'qwen3' can be imported")
  for field, key in names.CONFIG_KEYS.items():
    found, wanted = config.get(key), getattr(model, field)
    if field == "vocab" and isinstance(found, int) and found < wanted:
      continue  # the missing rows belong to no token and become zeros
    if found != wanted:
      lines.append(f"{key} is {found}, expected {wanted} (model.{field})")
  lines += _rope_problems(config, model)
  for key, wanted in FIXED.items():
    if config.get(key, wanted) != wanted:
      lines.append(f"{key} is {config[key]!r}; only {wanted!r} can be imported")
  if others := set(config.get("layer_types") or ()) - {"full_attention"}:
    lines.append(f"layer_types has {sorted(others)}; only 'full_attention' can be imported")
  return [f"E105 config: config.json: {line}." for line in lines]


def _thetas(config: Mapping[str, Any]) -> dict[str, Any]:
  """Returns both spellings: `rope_theta` of transformers 4, `rope_parameters` of 5."""
  parameters = config.get("rope_parameters") or {}
  return {
    "rope_theta": config.get("rope_theta"),
    "rope_parameters.rope_theta": parameters.get("rope_theta"),
  }


def _rope_problems(config: Mapping[str, Any], model: ModelConfig) -> list[str]:
  lines = []
  parameters, thetas = config.get("rope_parameters") or {}, _thetas(config)
  if not any(thetas.values()):
    lines.append(f"rope_theta is missing, expected {model.rope_theta} (model.rope_theta)")
  for key, theta in thetas.items():
    if theta is not None and theta != model.rope_theta:
      lines.append(f"{key} is {theta}, expected {model.rope_theta} (model.rope_theta)")
  for key, group in (("rope_scaling", config.get("rope_scaling")), ("rope_parameters", parameters)):
    kind = group and group.get("rope_type", group.get("type", "default"))
    if kind and kind != "default":
      lines.append(f"{key} is of type {kind!r}; only unscaled positions can be imported")
  return lines


def _open(path: pathlib.Path) -> dict[str, Stored]:
  if (path / WEIGHTS).is_file():
    return _open_file(path / WEIGHTS)
  if not (path / INDEX).is_file():
    raise LoadError(f"E104 file: {path} has neither {WEIGHTS} nor {INDEX}")
  placed = _read_json(path / INDEX).get("weight_map", {})
  absent = {f for f in placed.values() if not (path / f).is_file()}
  opened = {f: _open_file(path / f) for f in sorted(set(placed.values()) - absent)}
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
  _raise(path, [f"E104 index: {p}. Copy the folder again." for p in problems])
  return {name: opened[file][name] for name, file in placed.items()}


def _open_file(path: pathlib.Path) -> dict[str, Stored]:
  try:
    file = safetensors.safe_open(path, "np")
  except (OSError, safetensors.SafetensorError) as error:
    raise LoadError(f"E104 file: {path} is not a whole safetensors file: {error}") from error
  return {name: Stored(file, name) for name in file.keys()}  # noqa: SIM118  (not a mapping)


def _without_prefix(path: pathlib.Path, stored: Mapping[str, Stored]) -> dict[str, Stored]:
  """Returns the tensors of the encoder under names without the prefix that all of them share.

  Left out are a language-model head, of which an encoder has no use, and the rotary frequencies
  that old versions of transformers stored.
  """
  body = {
    name: tensor
    for name, tensor in stored.items()
    if name != "lm_head.weight" and not name.endswith("rotary_emb.inv_freq")
  }
  tables = [name for name in body if name.endswith(names.TABLE[1])]
  prefix = tables[0].removesuffix(names.TABLE[1]) if tables else ""
  if prefix not in PREFIXES:
    raise LoadError(
      f"E102 {path}: tensors begin with {prefix!r}, expected 'model.' or nothing. "
      "Save the text model of this checkpoint on its own first."
    )
  return {name.removeprefix(prefix): tensor for name, tensor in body.items()}


def _tensor_problems(expected: Sequence[names.Tensor], stored: Mapping[str, Stored]) -> list[str]:
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
      "A Qwen3 body has none of them: another architecture, an adapter, or more layers?"
    )
  for t in expected:
    if t.name in stored and stored[t.name].shape != t.shape:
      found = list(stored[t.name].shape)
      problems.append(f"E103 shape: {t.name} is {found}, expected {list(t.shape)} = {t.meaning}.")
  for name, tensor in stored.items():
    if tensor.dtype not in DTYPES:
      problems.append(f"E105 dtype: {name} is {tensor.dtype}, expected {', '.join(DTYPES)}.")
  return problems


def _some(found: Sequence[str]) -> str:
  more = f" and {len(found) - NAMES_SHOWN} more" if len(found) > NAMES_SHOWN else ""
  return "first " + ", ".join(found[:NAMES_SHOWN]) + more


def _layers(found: Any) -> int:
  return len({name.split(".")[1] for name in found if name.startswith("layers.")})


def _read(
  path: pathlib.Path,
  model: ModelConfig,
  expected: Sequence[names.Tensor],
  stored: Mapping[str, Stored],
) -> Params:
  leaves: dict[str, np.ndarray] = {}
  problems = []
  for t in expected:
    tensor = stored[t.name].read()
    if damage := np.count_nonzero(~np.isfinite(tensor)):
      problems.append(
        f"E107 not finite: {t.name} has {damage} NaN or infinite values. "
        "The file is damaged or was saved from a diverged run."
      )
    if t.path not in leaves:
      stack = () if t.layer is None else (model.layers,)
      shape = (model.vocab, model.width) if t.path == names.TABLE[0] else t.our_shape
      leaves[t.path] = np.zeros(stack + shape, np.float32)
    at = slice(len(tensor)) if t.layer is None else t.layer
    leaves[t.path][at] = t.from_hf(tensor)
  _raise(path, problems)
  return flax.traverse_util.unflatten_dict(leaves, sep="/")


def _trained_factors(
  path: pathlib.Path, model: ModelConfig, table: np.ndarray
) -> tuple[np.ndarray, np.ndarray] | None:
  """Returns the leading columns and rows of the trained factors; None where there are too few."""
  if not path.is_file():
    return None
  stored = _open_file(path)
  u, v = (stored[name].read() for name in ("U", "V"))
  if not _multiply_to(u, v, table):
    raise LoadError(
      f"E108 factors: U @ V of {path} is not the table of the weights beside it, which changed "
      "since the export. Delete the file to factorise the table anew."
    )
  if u.shape[1] < model.rank:
    return None
  padded = np.zeros((model.vocab, model.rank), np.float32)
  padded[: len(u)] = u[:, : model.rank]
  return padded, v[: model.rank].copy()


def _multiply_to(u: np.ndarray, v: np.ndarray, table: np.ndarray) -> bool:
  """Returns whether U @ V are the leading rows of `table`; a sample of them is compared."""
  if len(u) > len(table) or u.shape[1] != len(v) or v.shape[1] != table.shape[1]:
    return False
  rows = np.arange(0, len(u), max(1, len(u) // FACTORS_ROWS))
  product = u[rows] @ v
  return np.allclose(product, table[rows], FACTORS_RTOL, FACTORS_ATOL * np.abs(product).max())
