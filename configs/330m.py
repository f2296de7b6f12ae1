"""The 330M shape of F2LLM-v2; with the factorised table it has 276,464,512 parameters.

The rank that ML-Embed used at this size is not public.
"""

import pathlib

from ml_collections import ConfigDict

from mlembed_jax.config import load_module

base = load_module(pathlib.Path(__file__).with_name("base.py"))


def get_config(variant: str = "") -> ConfigDict:
  config = base.get_config()
  config.model.update(width=896, layers=16, ffn=2560, rank=512)
  config.optimizer.learning_rate = 2e-05
  config.train.epochs = 3.0
  config.export.name = "mlembed-330m"
  return base.apply_variant(config, base.VARIANTS, variant)
