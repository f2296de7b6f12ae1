"""The Qwen3-8B shape. The rank is not public at this size; 1024 is the largest in the paper."""

import pathlib

from ml_collections import ConfigDict

from mlembed_jax.config import load_module

base = load_module(pathlib.Path(__file__).with_name("base.py"))


PODS = {  # v5e:16x16, v5p:4x4x4, v6e:16x16
  "v5e": base.pod(remat="full"),
  "v5p": base.pod(remat="context", copies=4),
  "v6e": base.pod(remat="full", copies=4),
}


def get_config(variant: str = "") -> ConfigDict:
  config = base.get_config()
  config.model.update(width=4096, layers=36, ffn=12_288, heads=32, rank=1024)
  config.optimizer.learning_rate = 6e-06
  config.export.name = "mlembed-8b"
  return base.apply_variant(config, base.VARIANTS | PODS, variant)
