"""Every config file loads and has the published size; what cannot be meant is refused by name."""

import dataclasses
import json
import math
import re
import subprocess
import sys
import tarfile

import pytest
from ml_collections import ConfigDict

import mlembed_jax
from mlembed_jax import config_fields
from mlembed_jax.config import (
  described,
  flatten,
  from_mapping,
  load_config,
  load_module,
  with_older_values,
)
from mlembed_jax.config_fields import OLDER, SETTINGS
from mlembed_jax.devices.tpu import TPUS
from mlembed_jax.errors import ConfigError
from mlembed_jax.models.encoder import parameter_count
from tests.material import CONFIGS, config_dict

STORED = CONFIGS.parent / "tests/stored/run_0_1_0.tar.gz"

# These take their shape from a model: tests/hf/test_families.py, training/test_texts_alone.py.
OF_A_MODEL = ("from_hf", "elastic")
FILES = sorted(path.stem for path in CONFIGS.glob("*.py") if path.stem not in OF_A_MODEL)
# Published totals with a full table, and (layers + final norm) from the same table.
PUBLISHED = {
  "140m": (159_185_024, 61_945_984, 640, 512),
  "330m": (334_349_184, 198_214_528, 896, 512),
  "0_6b": (596_049_920, 440_467_456, 1024, 512),
  "1_7b": (1_720_574_976, 1_409_410_048, 2048, 1024),
  "4b": (4_022_468_096, 3_633_511_936, 2560, 1024),
  "8b": (7_568_405_504, 6_946_075_648, 4096, 1024),
}


def load(name, variant="", **overrides):
  config = load_module(CONFIGS / f"{name}.py").get_config(variant)
  if not config.data.builder:
    config.data.update(dataset="prepared")
  config.update_from_flattened_dict(overrides)
  return from_mapping(config)


@pytest.mark.parametrize("name", FILES)
def test_every_file_loads(name):
  assert load(name).model.width > 0


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_parameter_counts(name):
  full, rest, width, rank = PUBLISHED[name]
  model = load(name).model
  assert (model.width, model.rank) == (width, rank)
  assert parameter_count(dataclasses.replace(model, rank=0)) == full
  assert parameter_count(model) == rest + rank * (151_936 + width)


def test_parameter_counts_of_cuts_of_the_0_6b():
  model = load("0_6b").model
  counts = {
    (512, 28): 518_782_976,
    (64, 28): 450_256_896,
    (0, 8): 281_431_040,
    (512, 8): 204_164_096,
  }
  for (rank, layers), count in counts.items():
    assert parameter_count(dataclasses.replace(model, rank=rank, layers=layers)) == count


def test_reference_variant_sets_the_published_switches():
  config = load("140m", "reference")
  assert not config.losses.inbatch_passage_grad and not config.losses.mask_duplicates
  assert not config.losses.bitext.symmetric and config.kd.match == "index"
  assert config.data.pooled_token == "<|im_end|>"


@pytest.mark.parametrize("name", ["0_6b", "1_7b", "4b", "8b"])
@pytest.mark.parametrize("pod", [name for name, tpu in TPUS.items() if tpu.pod])
def test_pod_variants_keep_the_longest_step_and_change_nothing_that_is_learned(name, pod):
  config, plain = load(name, pod), load(name)
  tasks = config.losses.contrastive_tasks().values()
  texts = max(2 + task.negatives for task in tasks)
  assert config.data.kept_tokens == config.data.global_batch * texts * config.data.lengths[-1]
  assert math.prod(TPUS[pod].pod) % config.mesh.data == 0
  changed = {n for n, value in flatten(config).items() if value != flatten(plain)[n]}
  assert changed <= {"data.lengths", "data.kept_tokens", "model.remat", "mesh.data"}


def test_unknown_variant_is_refused():
  with pytest.raises(
    LookupError, match="unknown variant 'refrence'; known: reference, v5e, v5p, v6e"
  ):
    load_module(CONFIGS / "8b.py").get_config("refrence")


def test_every_setting_is_described_in_sentences():
  config = from_mapping(config_dict())
  assert list(SETTINGS) == list(flatten(config))
  for name, setting in SETTINGS.items():
    assert re.fullmatch(r"[A-Z(a-z].{12,}[.]", setting.meaning), f"{name}: {setting.meaning!r}"
    chosen = setting.default if isinstance(setting.default, tuple) else (setting.default,)
    assert not setting.choices or set(chosen) <= set(setting.choices), name


def test_a_field_without_a_setting_does_not_even_load():
  @dataclasses.dataclass
  class Forgotten:
    size: int

  with pytest.raises(KeyError, match="setting"):
    dict(config_fields._settings(Forgotten, "", {}))


def test_fields_that_joined_after_0_1_0_have_a_value_for_older_runs():
  """The fields of run.json in tests/stored, which never change."""
  with tarfile.open(STORED) as archive:
    stored = archive.extractfile("run_0_1_0/workdir/run.json")
    first = flat_names(json.load(stored)["config"])
  assert set(SETTINGS) - first <= set(OLDER)


@pytest.mark.parametrize(
  ("switches", "family"),
  [
    ({"qk_norm": True, "qkv_bias": False}, "qwen3"),
    ({"qk_norm": False, "qkv_bias": True}, "qwen2"),
    ({"qk_norm": False, "qkv_bias": False}, "llama"),
    ({}, "qwen3"),
  ],
)
def test_older_switches_are_a_family(switches, family):
  values = config_dict().to_dict()
  del values["model"]["family"]
  values["model"] |= switches
  assert from_mapping(with_older_values(values)).model.family == family
  assert values["model"].items() >= switches.items()  # given a copy, and only that is changed


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"qk_norm": True, "qkv_bias": True}, "model.qkv_bias: True beside model.qk_norm = True is no"),
    ({"qk_norm": "no", "qkv_bias": True}, "model.qkv_bias: True beside model.qk_norm = no is no"),
    ({"qk_norm": True}, "model.qkv_bias: None beside model.qk_norm = True is no"),
    ({"qkv_bias": True}, "model.qkv_bias: unknown field; did you mean family?"),
    ({"family": "qwen3", "qk_norm": True}, "model.qk_norm: unknown field; did you mean family?"),
  ],
)
def test_older_switches_of_no_family_are_refused(fields, message):
  values = config_dict().to_dict()
  del values["model"]["family"]
  values["model"] |= fields
  with pytest.raises(ConfigError) as error:
    from_mapping(with_older_values(values))
  assert message in str(error.value)


def flat_names(values, path=""):
  nested = {path + name: value for name, value in values.items()}
  groups = [flat_names(v, name + ".") for name, v in nested.items() if isinstance(v, dict)]
  return {n for n, v in nested.items() if not isinstance(v, dict)}.union(*groups)


def test_described_shows_value_default_and_meaning_of_every_field():
  text = described(load_module(CONFIGS / "8b.py").get_config("reference"))
  entries = re.findall(r"^[a-z].*(?:\n    .*)+", text, re.MULTILINE)
  assert len(entries) == len(SETTINGS)
  width = next(entry for entry in entries if entry.startswith("model.width"))
  assert width.startswith("model.width = 4096  (default 1024)\n    Width of the residual stream")
  match = next(entry for entry in entries if entry.startswith("kd.match"))
  assert "Choices: 'depth_fraction', 'index'" in match and "Published recipe: 'index'" in match


def test_described_shows_what_a_number_may_be_and_what_a_group_is_for():
  text = described(config_dict())
  lines = {entry.split(" = ")[0]: entry for entry in re.split(r"\n(?=[a-z#])", text)}
  allowed = {
    "model.width": ["Positive."],
    "train.steps": ["Not negative."],
    "optimizer.beta1": ["Not negative, below 1."],
    "mesh.data": [],
    "model.dtype": [],
    "data.packing": [],
  }
  for name, rule in allowed.items():
    found = re.findall(r"^    ((?:Positive|Not negative)\b.*)$", lines[name], re.MULTILINE)
    assert found == rule, name
  groups = {name.rsplit(".", 1)[0] for name in SETTINGS}
  assert set(re.findall(r"^# ([a-z_.]+)$", text, re.MULTILINE)) == groups
  assert "# model\n# The encoder: a dense decoder" in text


BAD = [
  ("model.heads", 3, "model.heads: 3 is not a multiple of model.kv_heads = 2"),
  ("model.head_dim", 15, "model.head_dim: 15 is odd"),
  ("model.rank", 64, "model.rank: 64 is above model.width = 48"),
  ("model.layers", 0, "model.layers: must be positive"),
  ("model.dtype", "float16", "model.dtype: 'float16' is not one of 'float32', 'bfloat16'"),
  ("model.family", "gemma3", "model.family: 'gemma3' is not one of 'qwen3', 'qwen2', 'llama'"),
  ("model.remat", "all", "model.remat: 'all' is not one of"),
  ("matryoshka.exits", (1, 4), "matryoshka.exits: 4 is beyond the model (model.layers = 3)"),
  ("matryoshka.exits", (1, 2), "matryoshka.exits: the full model must be trained too"),
  ("matryoshka.dims", (16, 8, 48), "matryoshka.dims: (16, 8, 48) must be positive, ascending"),
  ("matryoshka.dims", (8, 64), "matryoshka.dims: 64 is beyond the model (model.width = 48)"),
  ("matryoshka.ranks", (8, 32), "matryoshka.ranks: 32 is beyond the model (model.rank = 24)"),
  ("losses.bitext.temperature", 0.0, "losses.bitext.temperature: must be positive, found 0.0"),
  ("losses.retrieval.negatives", -1, "losses.retrieval.negatives: must not be negative"),
  ("losses.false_negative_margin", 3.0, "losses.false_negative_margin: 3.0 is no difference"),
  ("losses.clustering.symmetric", True, "losses.clustering.symmetric: without inbatch"),
  ("losses.false_negative_score", "teacher", "losses.false_negative_score: there is no teacher"),
  ("losses.softmax", "both", "losses.softmax: 'both' is not one of 'separate', 'joint'"),
  ("losses.int8", -0.1, "losses.int8: must not be negative"),
  ("kd.exits", (4, 2), "kd.exits: (4, 2) must be positive and ascending"),
  ("kd.match", "depth", "kd.match: 'depth' is not one of"),
  ("kd.exits", (1, 2), "kd.exits: only a teacher that is a folder has exits"),
  ("data.micro_batch", -1, "data.micro_batch: must not be negative, found -1"),
  ("data.workers", -1, "data.workers: must not be negative, found -1"),
  ("data.max_rows", -1, "data.max_rows: must not be negative, found -1"),
  ("data.size_exponent", 0.0, "data.size_exponent: must be positive, found 0.0"),
  ("data.language_temperature", 0.0, "data.language_temperature: must be positive, found 0.0"),
  ("data.max_repeats", 0.5, "data.max_repeats: 0.5 would leave rows out; use data.max_rows"),
  ("data.document_instructions", 1.5, "data.document_instructions: 1.5 is a share, 0 to 1"),
  ("data.document_instructions", -0.1, "data.document_instructions: must not be negative"),
  (
    "data.query_instructions",
    False,
    "data.document_instructions: documents have instructions only",
  ),
  ("data.builder", "quickstart", "data.builder: it writes its own data.dataset and data.manifest"),
  ("data.builder", "other", "data.builder: 'other' is not one of '', 'quickstart'"),
  ("data.dataset", "", "data.dataset: give the folder that python -m mlembed_jax.prepare wrote"),
  ("data.manifest", "", "data.manifest: data.heldout names files of a manifest; give its path"),
  ("data.heldout", (), "data.heldout: data.manifest is only read for held-out files; name some"),
  ("data.train", (), "data.train: name at least one pattern"),
  ("data.lengths", (64, 32), "data.lengths: (64, 32) must be ascending"),
  ("data.lengths", (64, 2048), "data.lengths: 2048 is above export.max_positions = 1024"),
  ("optimizer.learning_rate", float("nan"), "optimizer.learning_rate: must be finite"),
  ("optimizer.beta2", 1.0, "optimizer.beta2: must be below 1, found 1.0"),
  ("export.name", "a/b", "export.name: 'a/b' is a name, not a path"),
  ("optimizer.schedule", "linear", "optimizer.schedule: 'linear' is not one of"),
  ("optimizer.moments", "float16", "optimizer.moments: 'float16' is not one of 'float32', 'bfl"),
  ("train.trackers", ("wandb", "neptune"), "train.trackers: 'neptune' is not one of 'tensorboard'"),
  ("train.profile_steps", (25, 20), "train.profile_steps: (25, 20) is no first and last step"),
  ("train.profile_steps", (0, 2), "train.profile_steps: (0, 2) is no first and last step"),
  ("train.profile_steps", (3,), "train.profile_steps: (3,) is no first and last step"),
  ("train.trackers", ("mlflow", "mlflow"), "names one twice"),
  ("train.epochs", 1.0, "train.steps, train.epochs: set exactly one"),
  ("train.steps", 0, "train.steps, train.epochs: set exactly one"),
]


@pytest.mark.parametrize(("field", "value", "message"), BAD, ids=[f"{f}={v}" for f, v, _ in BAD])
def test_impossible_values_are_refused_by_name(field, value, message):
  config = config_dict(**{field: value})
  with pytest.raises(ConfigError) as error:
    from_mapping(config)
  assert message in str(error.value)


JUDGE = {"kd.teacher": "stored", "losses.false_negative_score": "teacher"}
NO_INBATCH = {f"losses.{kind}.inbatch": False for kind in ("retrieval", "bitext")}
NO_INBATCH |= {"losses.bitext.symmetric": False}
COLD = {"losses.scored_pairs.temperature": 0.005, "losses.scored_pairs.final_temperature": 0.005}


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    (JUDGE, "losses.false_negative_score: with losses.false_negative_margin = 2.0"),
    ({"kd.teacher": "stored", "kd.weight": 0}, "kd.weight, kd.prefix, kd.similarity: all are 0"),
    ({"kd.prefix": 1.0}, "kd.prefix, kd.similarity: there is no teacher"),
    ({"kd.projection": 64}, "kd.projection: it is learnt by the distance to a teacher"),
    ({"kd.teacher": "stored", "kd.mrl": True}, "kd.mrl: it only allows kd.prefix"),
    ({"losses.contrastive": 0.0}, "losses.contrastive: 0, and no teacher"),
    (NO_INBATCH | {"losses.inbatch_negatives": True}, "losses.inbatch_negatives: no task type"),
    (COLD | {"losses.learn_temperature": True}, "losses.scored_pairs.temperature: 0.005 is below"),
  ],
)
def test_settings_that_would_change_nothing_are_refused(fields, message):
  with pytest.raises(ConfigError) as error:
    from_mapping(config_dict(**fields))
  assert message in str(error.value)
  from_mapping(config_dict(**COLD))  # fixed temperatures may be lower


def test_unknown_field_is_refused_with_a_suggestion():
  config = config_dict()
  with config.unlocked():
    config.model.widht = 3
  with pytest.raises(ConfigError, match=r"model.widht: unknown field; did you mean width\?"):
    from_mapping(config)


def test_missing_field_is_refused():
  config = config_dict()
  del config["optimizer"]["eps"]
  with pytest.raises(ConfigError, match=r"optimizer.eps: missing field"):
    from_mapping(config)


@pytest.mark.parametrize(
  ("group", "field", "value", "message"),
  [
    ("model", "width", "wide", "model.width: expected int, found 'wide'"),
    ("model", "width", 48.0, "model.width: expected int, found 48.0"),
    ("model", "width", True, "model.width: expected int, found True"),
    ("losses", "mask_duplicates", 1, "losses.mask_duplicates: expected bool, found 1"),
    ("matryoshka", "dims", (8, "x"), "matryoshka.dims[1]: expected int, found 'x'"),
    ("losses", "bitext", 7, "losses.bitext: expected a group of fields, found 7"),
  ],
)
def test_wrong_types_are_refused_by_name(group, field, value, message):
  values = config_dict().to_dict()
  values[group][field] = value
  with pytest.raises(ConfigError) as error:
    from_mapping(ConfigDict(values, type_safe=False))
  assert message in str(error.value)


def test_completed_batches_need_the_mask_of_equal_texts():
  fields = {"data.complete_batches": True, "losses.mask_duplicates": False}
  with pytest.raises(ConfigError, match=r"data.complete_batches: a batch may hold a row twice, "):
    from_mapping(config_dict(**fields))


def test_learned_temperatures_have_no_schedule():
  fields = {"losses.learn_temperature": True, "losses.bitext.final_temperature": 0.02}
  with pytest.raises(ConfigError, match=r"losses.bitext.final_temperature: learned temperatures"):
    from_mapping(config_dict(**fields))


def test_load_config_reads_files_as_the_flag_does():
  changes = {"train.steps": 7, "train.epochs": 0.0, "data.dataset": "/d"}
  config = load_config(str(CONFIGS / "8b.py:v5p"), changes)
  assert (config.train.steps, config.model.remat) == (7, "context")


@pytest.mark.parametrize(
  ("path", "changes", "message"),
  [
    ("absent.py", {}, "absent.py"),
    ("8b.py:v9", {}, "unknown variant 'v9'"),
    ("8b.py", {"train.stepz": 7}, "stepz"),
  ],
)
def test_load_config_names_what_it_cannot_read(path, changes, message):
  with pytest.raises(ConfigError, match=message):
    load_config(str(CONFIGS / path), changes)


@pytest.mark.parametrize(
  ("code", "error", "message"),
  [
    ("x = (", ConfigError, r"own.py: .*was never closed"),
    ("def get_config(_=None): return {}", ConfigError, r"own.py: get_config returns a dict, not a"),
    ("x = 1", ConfigError, r"own.py: has no function get_config\(variant\)"),
    ("def get_config(_=None): return {}['a']", KeyError, r"^'a'$"),  # a fault in the file
  ],
)
def test_load_config_tells_a_file_that_is_none_from_a_fault_in_it(code, error, message, tmp_path):
  (tmp_path / "own.py").write_text(code)
  with pytest.raises(error, match=message):
    load_config(tmp_path / "own.py")


def test_importing_the_package_imports_nothing_heavy():
  code = "import sys, mlembed_jax; print(*{'jax', 'numpy', 'flax'} & set(sys.modules))"
  result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
  assert not result.stdout.strip()
  assert len(mlembed_jax.__all__) == 6
  assert all(callable(getattr(mlembed_jax, name)) for name in mlembed_jax.__all__)


def test_a_configuration_of_the_package_is_loaded_by_name():
  assert load_module("quickstart").__file__ == str(CONFIGS / "quickstart.py")
  with pytest.raises(ConfigError, match=r"there is no configs/nope.py; the package has 0_6b, "):
    load_module("configs/nope.py")
