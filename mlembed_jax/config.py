"""Run configuration: ml_collections dictionaries become frozen dataclasses, checked before use.

What is known of a single setting stands in config_fields.py, rules between settings here.
"""

import copy
import dataclasses
import difflib
import importlib.util
import inspect
import math
import os
import pathlib
import textwrap
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

from mlembed_jax.config_fields import (
  ABSENT,
  LOWEST_TEMPERATURE,
  NO_LIMIT,
  NO_LORA,
  OLDER,
  SETTINGS,
  STORED,
  Config,
  ModelConfig,
  Setting,
)
from mlembed_jax.errors import ConfigError

# (model.qk_norm, model.qkv_bias) -> model.family, which version 0.1.0 knew by these alone.
FAMILY_OF_SWITCHES = {(True, False): "qwen3", (False, True): "qwen2", (False, False): "llama"}
REPLACED = {"qk_norm": "family", "qkv_bias": "family"}  # fields of 0.1.0 -> what says it today


def load_module(path: str | pathlib.Path) -> types.ModuleType:
  """Returns the Python file at `path` as a module (`0_6b.py` is not an importable name).

  `path` may be the name of a file of the package, such as from_hf.

  Raises:
    ConfigError: there is no such file.
  """
  path = find_file(os.fspath(path))
  if not os.path.exists(path):
    raise ConfigError(no_file(path))
  spec = importlib.util.spec_from_file_location(f"config_{pathlib.Path(path).stem}", path)
  if spec is None or spec.loader is None:
    raise ConfigError(f"{path} is not a Python file")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def load_config(path: str | os.PathLike[str], changes: Mapping[str, Any] | None = None) -> Config:
  """Returns the checked configuration of a file, as `--config` and `--config.FIELD` give it.

  Args:
    path: a configuration file, FILE or FILE:variant, e.g. configs/8b.py:v5p, or the name of one
      that comes with the package, e.g. quickstart.
    changes: values by dotted field name, e.g. {"train.steps": 100}.

  Raises:
    ConfigError: the file cannot be read, it has no such variant, or a field or value cannot be
      meant. Other errors of the file's own code are raised as they are.
  """
  config = read_file(path)
  try:
    config.update_from_flattened_dict(changes or {})
  except (LookupError, TypeError) as error:
    raise ConfigError(f"{path}: {error}") from error
  return from_mapping(typing.cast("Any", config))


def packaged() -> dict[str, pathlib.Path]:
  """Returns the configuration files that come with the package, by name."""
  package = pathlib.Path(__file__).parent  # a wheel has them inside, a checkout beside it
  folder = next((f for f in (package / "configs", package.parent / "configs") if f.is_dir()), None)
  found = sorted(folder.glob("*.py")) if folder else []
  return {path.stem: path for path in found if path.stem != "base"}


def no_file(path: str) -> str:
  """Returns what is said of a configuration file that does not exist."""
  return f"there is no {path}; the package has {', '.join(packaged())}"


def find_file(path: str) -> str:
  """Returns the file of FILE or FILE:variant, with its variant; the package has files by name."""
  file, colon, variant = path.partition(":")
  if os.path.exists(file) or file not in (files := packaged()):
    return path
  return f"{files[file]}{colon}{variant}"


def read_file(path: str | os.PathLike[str]) -> ConfigDict:
  """Returns what `get_config` of a configuration file gives; raises as `load_config`."""
  file, colon, variant = find_file(os.fspath(path)).partition(":")
  try:
    module = load_module(file)
  except (OSError, SyntaxError) as error:
    raise ConfigError(f"{path}: {error}") from error
  if not hasattr(module, "get_config"):
    raise ConfigError(f"{path}: has no function get_config(variant) that returns a ConfigDict")
  if missing := _needed(module.get_config)[bool(colon) :]:
    raise ConfigError(f"{path}: needs a value after a colon: {file}:{missing[0].upper()}")
  try:
    config = module.get_config(*([variant] if colon else []))
  except LookupError as error:
    if type(error) is not LookupError:  # a KeyError, say, is a fault in the file
      raise
    raise ConfigError(f"{path}: {error}") from error
  if not isinstance(config, ConfigDict):
    raise ConfigError(f"{path}: get_config returns a {type(config).__name__}, not a ConfigDict")
  return config


def _needed(get_config: Any) -> list[str]:
  """Returns the names of the parameters that a function must be given."""
  parameters = inspect.signature(get_config).parameters.values()
  return [p.name for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]


def from_mapping(values: Mapping[str, Any]) -> Config:
  """Returns the checked configuration of a (nested) mapping such as an ml_collections ConfigDict.

  Raises:
    ConfigError: unknown or missing field, wrong type, or a combination that is impossible on any
      machine; what depends on the number of devices is checked by `sharding.mesh_shape`.
  """
  config = _dataclass(Config, values, "")
  _check_values(config)
  _check_model(config.model)
  _check_matryoshka(config)
  _check_losses(config)
  _check_teacher(config)
  _check_frozen(config)
  _check_kept(config)
  _check_data_and_length(config)
  _check_evaluation(config)
  return config


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
  """Returns {group: {field: value}} of {dotted field name: value}."""
  return _filled({}, flat)


def with_older_values(values: Mapping[str, Any]) -> dict[str, Any]:
  """Returns a copy of a stored run's configuration in the fields of today.

  Fields that it lacks have the values of `OLDER`.

  Raises:
    ConfigError: it has switches of version 0.1.0 that are those of no model family.
  """
  values = copy.deepcopy(dict(values))
  _replace_switches(values.get("model", {}))
  return _filled(values, OLDER)


def _replace_switches(model: dict[str, Any]) -> None:
  """Puts the family in place of the two switches of version 0.1.0."""
  if "family" in model or "qk_norm" not in model:
    return
  qk_norm, qkv_bias = model.pop("qk_norm"), model.pop("qkv_bias", None)
  if (qk_norm, qkv_bias) not in FAMILY_OF_SWITCHES:
    raise ConfigError(
      f"model.qkv_bias: {qkv_bias} beside model.qk_norm = {qk_norm} is no architecture that could "
      "be exported: Qwen3 has norms, Qwen2 biases, Llama neither"
    )
  model["family"] = FAMILY_OF_SWITCHES[qk_norm, qkv_bias]


def _filled(values: dict[str, Any], flat: Mapping[str, Any]) -> dict[str, Any]:
  """Returns `values` with the fields of `flat` that are not there."""
  for name, value in flat.items():
    *groups, field = name.split(".")
    group = values
    for key in groups:
      group = group.setdefault(key, {})
    group.setdefault(field, value)
  return values


def _dataclass(cls: type, values: Mapping[str, Any], path: str) -> Any:
  hints = typing.get_type_hints(cls)
  for name in values:
    if name not in hints:
      close = difflib.get_close_matches(REPLACED.get(name, name), hints, n=1)
      hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(hints)}"
      raise ConfigError(f"{path}{name}: unknown field; {hint}")
  for name in hints:
    if name not in values:
      raise ConfigError(f"{path}{name}: missing field")
  return cls(**{n: _field(hints[n], values[n], f"{path}{n}") for n in hints})


def _field(wanted: Any, value: Any, path: str) -> Any:
  if dataclasses.is_dataclass(wanted):
    if not isinstance(value, Mapping) and not hasattr(value, "items"):
      raise ConfigError(f"{path}: expected a group of fields, found {value!r}")
    return _dataclass(typing.cast(type, wanted), value, f"{path}.")
  if typing.get_origin(wanted) is tuple and isinstance(value, (tuple, list)):
    item = typing.get_args(wanted)[0]
    return tuple(_field(item, v, f"{path}[{i}]") for i, v in enumerate(value))
  if wanted is float and type(value) is int:
    return float(value)
  if type(value) is not wanted:
    name = getattr(wanted, "__name__", str(wanted))
    raise ConfigError(f"{path}: expected {name}, found {value!r} ({type(value).__name__})")
  return value


def flatten(config: Any, path: str = "") -> dict[str, Any]:
  """Returns {dotted field name: value} of a configuration."""
  flat: dict[str, Any] = {}
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    name = path + field.name
    flat |= flatten(value, name + ".") if dataclasses.is_dataclass(value) else {name: value}
  return flat


def _check_values(config: Config) -> None:
  for name, value in flatten(config).items():
    setting = SETTINGS[name]
    if setting.choices:
      _check_choices(name, value, setting.choices)
    if type(value) in (int, float) and not setting.own_rule:
      _check_number(name, value, setting)


def _check_choices(name: str, value: Any, choices: tuple[str, ...]) -> None:
  chosen = value if isinstance(value, tuple) else (value,)
  if other := [each for each in chosen if each not in choices]:
    raise ConfigError(f"{name}: {other[0]!r} is not one of {', '.join(map(repr, choices))}")
  if len(set(chosen)) < len(chosen):
    raise ConfigError(f"{name}: {value} names one twice")


def _check_number(name: str, value: float, setting: Setting) -> None:
  if not math.isfinite(value) or value >= setting.below:
    bound = "finite" if math.isinf(setting.below) else f"below {setting.below}"
    raise ConfigError(f"{name}: must be {bound}, found {value}")
  if value < 0 or (value == 0 and not setting.zero):
    bound = "not be negative" if setting.zero else "be positive"
    raise ConfigError(f"{name}: must {bound}, found {value}")


def described(values: Mapping[str, Any]) -> str:
  """Returns every field with its value, its default where it differs, its meaning and its rules.

  What a group is for stands above its fields.

  Args:
    values: a (nested) mapping such as an ml_collections ConfigDict.

  Raises:
    ConfigError: an unknown or missing field, or a value of another type.
  """
  return "\n".join(_described_group(_dataclass(Config, values, "")))


def _described_group(config: Any, path: str = "") -> Iterator[str]:
  """Yields each setting of a configuration, and each group after a heading."""
  for field in dataclasses.fields(config):
    name, value = path + field.name, getattr(config, field.name)
    if dataclasses.is_dataclass(value):
      yield textwrap.indent(f"{name}\n{inspect.getdoc(value)}", "# ")
      yield from _described_group(value, f"{name}.")
    else:
      yield _described(name, value)


def _described(name: str, value: Any) -> str:
  setting = SETTINGS[name]
  lines = [f"{name} = {value!r}"]
  if value != setting.default:
    lines[0] += f"  (default {setting.default!r})"
  lines += textwrap.wrap(setting.meaning, 96)
  if setting.choices:
    lines.append("Choices: " + ", ".join(map(repr, setting.choices)))
  if type(value) in (int, float) and not setting.own_rule:
    upper = "" if math.isinf(setting.below) else f", below {setting.below:g}"
    lines.append(("Not negative" if setting.zero else "Positive") + f"{upper}.")
  if setting.published is not ABSENT and setting.published != setting.default:
    lines.append(f"Published recipe: {setting.published!r}")
  if setting.free:
    lines.append("May change between stop and resume.")
  return "\n    ".join(lines)


def _check_model(m: ModelConfig) -> None:
  if m.heads % m.kv_heads:
    raise ConfigError(f"model.heads: {m.heads} is not a multiple of model.kv_heads = {m.kv_heads}")
  if m.head_dim % 2:
    raise ConfigError(f"model.head_dim: {m.head_dim} is odd; rotary embedding pairs its halves")
  _check_lora(m)
  if m.rank > m.width:
    raise ConfigError(f"model.rank: {m.rank} is above model.width = {m.width}; 0 is a full table")


def _check_matryoshka(config: Config) -> None:
  axes = (
    ("dims", config.matryoshka.dims, "model.width", config.model.width),
    ("exits", config.matryoshka.exits, "model.layers", config.model.layers),
    ("ranks", config.matryoshka.ranks, "model.rank", config.model.rank),
  )
  for axis, sizes, limit, full in axes:
    name = f"matryoshka.{axis}"
    if sizes and (list(sizes) != sorted(set(sizes)) or sizes[0] < 1):
      raise ConfigError(f"{name}: {sizes} must be positive, ascending and without repeats")
    if sizes and sizes[-1] > full:
      raise ConfigError(f"{name}: {sizes[-1]} is beyond the model ({limit} = {full})")
    if sizes and sizes[-1] != full:
      raise ConfigError(f"{name}: the full model must be trained too: end with {limit} = {full}")


def _check_losses(config: Config) -> None:
  losses = config.losses
  if not -NO_LIMIT <= losses.false_negative_margin <= NO_LIMIT:
    raise ConfigError(
      f"losses.false_negative_margin: {losses.false_negative_margin} is no difference of two "
      f"cosines; between -{NO_LIMIT} and {NO_LIMIT}, where {NO_LIMIT} is no limit"
    )
  tasks = losses.contrastive_tasks()
  if losses.inbatch_negatives and not any(task.inbatch for task in tasks.values()):
    raise ConfigError("losses.inbatch_negatives: no task type has inbatch, so nothing meets them")
  for name, task in tasks.items():
    if task.symmetric and not task.inbatch:
      raise ConfigError(f"losses.{name}.symmetric: without inbatch there is no other direction")
  for name in (*tasks, "scored_pairs"):
    settings = getattr(losses, name)
    if losses.learn_temperature and settings.temperature != settings.final_temperature:
      raise ConfigError(
        f"losses.{name}.final_temperature: learned temperatures have no schedule; set it to "
        f"losses.{name}.temperature, or losses.learn_temperature to False"
      )
    if losses.learn_temperature and settings.temperature < LOWEST_TEMPERATURE:
      raise ConfigError(
        f"losses.{name}.temperature: {settings.temperature} is below {LOWEST_TEMPERATURE}, where "
        "learned temperatures are stopped"
      )


def _check_teacher(config: Config) -> None:
  losses, kd = config.losses, config.kd
  if losses.false_negative_score == "teacher" and not kd.teacher:
    raise ConfigError("losses.false_negative_score: there is no teacher; name one in kd.teacher")
  if losses.false_negative_score == "teacher" and losses.false_negative_margin == NO_LIMIT:
    raise ConfigError(
      f"losses.false_negative_score: with losses.false_negative_margin = {NO_LIMIT} (no limit) "
      "there is nothing to judge"
    )
  if kd.teacher and not kd.learns and losses.false_negative_score != "teacher":
    raise ConfigError(
      "kd.weight, kd.prefix, kd.similarity: all are 0, and the teacher judges nothing; it would "
      "change nothing"
    )
  if kd.projection and not (kd.teacher and kd.weight):
    raise ConfigError(
      "kd.projection: it is learnt by the distance to a teacher; name one in kd.teacher, and give "
      "kd.weight"
    )
  if kd.mrl and not kd.prefix:
    raise ConfigError("kd.mrl: it only allows kd.prefix, which is 0")
  if (kd.prefix or kd.similarity) and not kd.teacher:
    raise ConfigError("kd.prefix, kd.similarity: there is no teacher; name one in kd.teacher")
  if not losses.contrastive and not (kd.teacher and kd.learns):
    raise ConfigError("losses.contrastive: 0, and no teacher; there is nothing to learn")
  if list(kd.exits) != sorted(set(kd.exits)) or min(kd.exits, default=1) < 1:
    raise ConfigError(f"kd.exits: {kd.exits} must be positive and ascending")
  if kd.exits and kd.teacher in ("", STORED):
    raise ConfigError("kd.exits: only a teacher that is a folder has exits")


def _check_lora(m: ModelConfig) -> None:
  lora = m.lora
  if not lora.rank and lora != NO_LORA:
    raise ConfigError("model.lora: its rank is 0, so there is no adapter; give a rank")
  for name, sides in m.products().items():
    if lora.adapts(name) and lora.rank > min(sides):
      raise ConfigError(
        f"model.lora.rank: {lora.rank} is above {min(sides)}, the smaller side of {name}"
      )


def _check_frozen(config: Config) -> None:
  train = config.train
  if (config.model.lora.rank or train.frozen) and not train.init_from:
    raise ConfigError(
      "train.init_from: frozen parameters stay as this folder has them (model.lora, train.frozen); "
      "name one"
    )
  if bool(train.trainable) != bool(train.frozen):
    raise ConfigError(
      "train.trainable, train.frozen: together they name every parameter once; give both or neither"
    )


def _check_kept(config: Config) -> None:
  data = config.data
  if data.kept_tokens and config.model.remat == "offload":
    raise ConfigError(
      "data.kept_tokens: model.remat = offload moves the activations of one block at a time; set "
      "data.kept_tokens to 0, or model.remat to full"
    )


def _check_data_and_length(config: Config) -> None:
  data, train = config.data, config.train
  if not data.lengths or list(data.lengths) != sorted(set(data.lengths)) or data.lengths[0] < 2:
    raise ConfigError(f"data.lengths: {data.lengths} must be ascending sizes of at least 2 tokens")
  if data.lengths[-1] > config.export.max_positions:
    raise ConfigError(
      f"data.lengths: {data.lengths[-1]} is above export.max_positions = "
      f"{config.export.max_positions}"
    )
  if config.export.max_seq_length > config.export.max_positions:
    raise ConfigError("export.max_seq_length: must not be above export.max_positions")
  if "/" in config.export.name:
    raise ConfigError(f"export.name: {config.export.name!r} is a name, not a path")
  if data.builder and (data.dataset or data.manifest):
    raise ConfigError("data.builder: it writes its own data.dataset and data.manifest; drop them")
  if not data.builder and not data.dataset:
    raise ConfigError(
      "data.dataset: give the folder that python -m mlembed_jax.prepare wrote, e.g. "
      "--config.data.dataset=/data/prepared"
    )
  if data.heldout and not (data.builder or data.manifest):
    raise ConfigError("data.manifest: data.heldout names files of a manifest; give its path")
  if data.manifest and not data.heldout:
    raise ConfigError(
      "data.heldout: data.manifest is only read for held-out files; name some, or give neither"
    )
  if data.max_repeats < 1:
    raise ConfigError(
      f"data.max_repeats: {data.max_repeats} would leave rows out; use data.max_rows"
    )
  if data.document_instructions > 1:
    raise ConfigError(
      f"data.document_instructions: {data.document_instructions} is a share, 0 to 1"
    )
  if data.document_instructions and not data.query_instructions:
    raise ConfigError(
      "data.document_instructions: documents have instructions only where queries do; set it to 0 "
      "or data.query_instructions to True"
    )
  if data.complete_batches and not config.losses.mask_duplicates:
    raise ConfigError(
      "data.complete_batches: a batch may hold a row twice, whose query would meet its own positive"
      " as a negative; set losses.mask_duplicates to True"
    )
  if not data.train:
    raise ConfigError("data.train: name at least one pattern of training files")
  if (traced := train.profile_steps) and (len(traced) != 2 or not 1 <= traced[0] <= traced[1]):
    raise ConfigError(
      f"train.profile_steps: {traced} is no first and last step, such as (20, 25); steps begin at 1"
    )
  if bool(train.steps) == bool(train.epochs):
    raise ConfigError("train.steps, train.epochs: set exactly one of the two, and the other to 0")


def _check_evaluation(config: Config) -> None:
  if config.train.keep_best and not config.eval.every:
    raise ConfigError("train.keep_best: no checkpoint has scores; set eval.every")
  if config.eval.patience and not config.eval.every:
    raise ConfigError("eval.patience: nothing is evaluated on the way; set eval.every")
  if config.export.best and not config.train.keep_best:
    raise ConfigError("export.best: the best checkpoint may be gone by then; set train.keep_best")
  if config.export.best and not config.export.at_end:
    raise ConfigError("export.best: no folder is written when training ends; set export.at_end")
  if config.eval.every and not config.data.heldout:
    raise ConfigError("eval.every: there is nothing to evaluate; name files in data.heldout")
