"""ML-Embed-0.6B, the one released model trained along all three axes: 518,782,976 parameters."""

import pathlib

from ml_collections import ConfigDict

from mlembed_jax.config import load_module

base = load_module(pathlib.Path(__file__).with_name("base.py"))


PODS = {  # v5e:16x16, v5p:4x4x4, v6e:16x16
  "v5e": base.pod(remat="context", copies=16),
  "v5p": base.pod(remat="context", copies=4),
  "v6e": base.pod(remat="context", copies=16),
}


def get_config(variant: str = "") -> ConfigDict:
  config = base.get_config()
  return base.apply_variant(config, base.VARIANTS | PODS, variant)
