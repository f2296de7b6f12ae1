"""A small encoder from random weights on real text in 255 languages: minutes on two CPU cores.

`--config configs/quickstart.py:smoke` runs the same path with six steps.
"""

import pathlib

from ml_collections import ConfigDict

from mlembed_jax.config import load_module

base = load_module(pathlib.Path(__file__).with_name("base.py"))

VARIANTS = {
  "": {},
  "smoke": {"train.steps": 6, "train.log_every": 2, "optimizer.warmup_steps": 2},
}


def get_config(variant: str = "") -> ConfigDict:
  config = base.get_config()
  config.model.update(vocab=8192, width=128, layers=3, ffn=256, heads=2, kv_heads=1, head_dim=64)
  config.model.update(rank=128, rope_theta=10_000.0, dtype="float32", remat="full")
  config.matryoshka.update(dims=(16, 32, 64, 128), exits=(1, 2, 3), ranks=(32, 64, 128))
  # On two cores a larger batch teaches more than hard negatives of its translations do.
  config.losses.bitext.update(negatives=0)
  config.losses.clustering.update(negatives=1)
  config.data.update(
    builder="quickstart", heldout=("heldout/*",), global_batch=512, micro_batch=512
  )
  config.data.lengths = (32, 64)  # 99 in 100 texts are shorter
  config.optimizer.update(learning_rate=2e-3, min_learning_rate=0.0, warmup_steps=20)
  config.train.update(steps=300, epochs=0.0, checkpoint_every=100)
  config.export.update(name="mlembed-quickstart", at_end=True, dtype="float32")
  config.export.update(max_seq_length=512, max_positions=512)
  return base.apply_variant(config, VARIANTS, variant)
