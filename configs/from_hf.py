"""The shape of any Qwen3, Qwen2 or Llama model, which is also where training starts.

`--config configs/from_hf.py:SOURCE`, a folder in Hugging Face layout or hf:ORG/NAME.
"""

import dataclasses
import pathlib

from ml_collections import ConfigDict

from mlembed_jax.config import load_module
from mlembed_jax.hf.folder import read_model, read_positions, resolve

base = load_module(pathlib.Path(__file__).with_name("base.py"))


def get_config(source: str) -> ConfigDict:
  if not source:
    raise LookupError("no SOURCE after the colon; give a folder or hf:ORG/NAME")
  config, folder = base.get_config(), resolve(source)
  shape = dataclasses.asdict(read_model(folder))
  own = ("rank", "dtype", "attention", "remat", "lora")  # not of the folder
  config.model.update({name: value for name, value in shape.items() if name not in own})
  config.model.rank = min(config.model.width, 512 if config.model.width < 2048 else 1024)
  config.train.init_from = source
  if positions := read_positions(folder):
    config.export.max_positions = positions
    config.export.max_seq_length = min(config.export.max_seq_length, positions)
  config.export.name = "mlembed-" + name_of(source)
  return config


def name_of(source: str) -> str:
  """Returns the last part of a path or of hf:ORG/NAME, whose folder is named after a commit."""
  return pathlib.Path(source).resolve().name.lower()
