"""The Qwen3-1.7B shape. The rank is not public at this size; 1024 is the largest in the paper."""

import pathlib

from ml_collections import ConfigDict

from mlembed_jax.config import load_module

base = load_module(pathlib.Path(__file__).with_name("base.py"))


def get_config(variant: str = "") -> ConfigDict:
  config = base.get_config()
  config.model.update(width=2048, layers=28, ffn=6144, rank=1024)
  config.optimizer.learning_rate = 9e-06
  config.export.name = "mlembed-1.7b"
  return base.apply_variant(config, base.VARIANTS | base.pods("1_7b"), variant)
