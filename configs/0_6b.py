"""ML-Embed-0.6B, the one released model trained along all three axes: 518,782,976 parameters."""

import pathlib

from ml_collections import ConfigDict

from mlembed_jax.config import load_module

base = load_module(pathlib.Path(__file__).with_name("base.py"))


def get_config(variant: str = "") -> ConfigDict:
  config = base.get_config()
  return base.apply_variant(config, base.VARIANTS | base.pods("0_6b"), variant)
