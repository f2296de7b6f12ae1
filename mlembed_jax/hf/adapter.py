"""The adapter of a run as a folder that peft loads, by itself or below sentence-transformers."""

import pathlib
import shutil
from typing import Any

import numpy as np

from mlembed_jax.config_fields import PRODUCTS, ModelConfig
from mlembed_jax.errors import ExportError
from mlembed_jax.files import replace_folder, write_json, write_safetensors
from mlembed_jax.hf import config_files, param_mapping
from mlembed_jax.hf.export import TrainedModel, check_variant, small_files
from mlembed_jax.hf.file_names import ADAPTER
from mlembed_jax.hf.folder import HUB
from mlembed_jax.matryoshka import Slice
from mlembed_jax.models.encoder import LORA_A, LORA_B

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."  # of AutoModel, which has no head around it


def check_target(out: pathlib.Path) -> None:
  """Raises ExportError where `out` is neither free nor an empty folder."""
  if out.is_file() or (out.is_dir() and any(out.iterdir())):
    raise ExportError(f"{out} is there and not empty; choose another folder")


def export_adapter_folder(out: pathlib.Path, trained: TrainedModel) -> pathlib.Path:
  """Returns `out`, the complete folder of an adapter; it gets its name when it is whole.

  Args:
    out: folder to write.
    trained: the run, and its parameters with the factors of the adapter.

  Raises:
    ExportError: `out` holds something or cannot be written, or a factor is not finite.
    StorageError: the disk is full.
  """
  check_target(out)
  temporary = out.with_name(f".{out.name}.new")
  shutil.rmtree(temporary, ignore_errors=True)  # of an export that was killed
  try:
    temporary.mkdir(parents=True)
  except OSError as error:
    raise ExportError(f"{out} cannot be written: {error.strerror}; choose another") from error
  try:
    _write(temporary, trained)
    replace_folder(temporary, out)
  finally:
    shutil.rmtree(temporary, ignore_errors=True)
  return out


def _write(folder: pathlib.Path, trained: TrainedModel) -> None:
  config = trained.run.config
  variant = check_variant(trained.run, trained.step, Slice())
  spec = config_files.tokenizer_spec(trained.tokenizer, config.model)
  write_safetensors(folder / WEIGHTS, _tensors(config.model, trained.params))
  write_json(folder / ADAPTER, _config(config.model, config.train.init_from))
  for path, value in small_files(variant, trained.tokenizer, spec).items():
    write_json(folder / path, value)


def _tensors(model: ModelConfig, params: Any) -> dict[str, np.ndarray]:
  """Returns the factors in float32, by the names of peft."""
  tensors = {}
  for path, name, _ in param_mapping.LAYER:
    module = name.removesuffix(".weight")
    if model.lora.adapts(module.rpartition(".")[2]):
      for end, letter in ((LORA_A, "A"), (LORA_B, "B")):
        factors = param_mapping.leaf(params, f"layers/{path}{end}")
        for layer, factor in enumerate(factors):  # [in, out]; torch has [out, in]
          place = f"{PREFIX}layers.{layer}.{module}.lora_{letter}.weight"
          tensors[place] = np.ascontiguousarray(factor.T, np.float32)
  if unfit := [name for name, factor in tensors.items() if not np.isfinite(factor).all()]:
    raise ExportError(f"{unfit[0]} is not finite; export an earlier step")
  return tensors


def _config(model: ModelConfig, start: str) -> dict[str, Any]:
  is_of_hub = start.startswith(HUB)
  base = start.removeprefix(HUB) if is_of_hub else str(pathlib.Path(start).absolute())
  return {
    "peft_type": "LORA",
    "task_type": "FEATURE_EXTRACTION",
    "base_model_name_or_path": base,
    "r": model.lora.rank,
    "lora_alpha": model.lora.alpha,
    "target_modules": sorted(model.lora.targets or PRODUCTS),
    "lora_dropout": 0.0,
    "bias": "none",
    "fan_in_fan_out": False,
    "inference_mode": True,
  }
