"""The 160M shape of F2LLM-v2 with a table of rank 512: 140,064,896 parameters.

The shape behind the name "ML-Embed 140M" is not public; this is our reading of it.
"""

import pathlib

from ml_collections import ConfigDict

from mlembed_jax.config import load_module

base = load_module(pathlib.Path(__file__).with_name("base.py"))


def get_config(variant: str = "") -> ConfigDict:
  config = base.get_config()
  config.model.update(width=640, layers=9, ffn=1536, rank=512)
  config.optimizer.learning_rate = 3e-05
  config.train.epochs = 3.0
  config.export.name = "mlembed-140m"
  return base.apply_variant(config, base.VARIANTS, variant)
