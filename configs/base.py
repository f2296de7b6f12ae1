"""The 0.6B-shaped defaults; the other files state only what differs from them.

Every field, with its type, default and meaning, stands in mlembed_jax/config_fields.py, and
`python -m mlembed_jax.train --config configs/base.py --print_config` prints them.
`--config configs/8b.py:reference`, and so for every size, restores the published recipe where ours
departs from it. `configs/8b.py:v5p` (v5e, v6e) sets what a size needs on such a pod.
"""

from ml_collections import ConfigDict

from mlembed_jax.config import nested
from mlembed_jax.config_fields import DEFAULTS, REFERENCE

VARIANTS = {"": {}, "reference": REFERENCE}


def pod(remat: str, copies: int = 1) -> dict:
  """Returns the fields of a run on a pod.

  How many tokens are encoded at a time is chosen by the texts of the corpus (`data.micro_batch`).
  """
  return {
    "data.lengths": (1024,),  # one loop over blocks; shorter texts share sheets
    # All of the longest step, of clustering rows with 11 texts: nothing is encoded twice.
    "data.kept_tokens": 512 * 11 * 1024,
    "model.remat": remat,
    "mesh.data": copies,
  }


# What a size needs on the pod of a generation, whose shape mlembed_jax/devices/tpu.py gives; found
# with `python -m mlembed_jax.aot --sweep`.
PODS = {
  "v5e": {
    "0_6b": pod(remat="context", copies=16),
    "1_7b": pod(remat="context", copies=4),
    "4b": pod(remat="full"),
    "8b": pod(remat="full"),
  },
  "v5p": {size: pod(remat="context", copies=4) for size in ("0_6b", "1_7b", "4b", "8b")},
  "v6e": {
    "0_6b": pod(remat="context", copies=16),
    "1_7b": pod(remat="context", copies=4),
    "4b": pod(remat="full", copies=4),
    "8b": pod(remat="full", copies=4),
  },
}


def pods(size: str) -> dict[str, dict]:
  """Returns the variants of a configuration that are named after generations of TPUs."""
  return {generation: sizes[size] for generation, sizes in PODS.items()}


def get_config(variant: str = "") -> ConfigDict:
  """Returns the 0.6B-shaped defaults, changed by a named variant."""
  return apply_variant(ConfigDict(nested(DEFAULTS)), VARIANTS, variant)


def apply_variant(config: ConfigDict, variants: dict[str, dict], variant: str) -> ConfigDict:
  """Returns `config` with the fields of the named variant set."""
  if variant not in variants:
    known = ", ".join(name for name in variants if name)
    raise LookupError(f"unknown variant {variant!r}; known: {known}")
  config.update_from_flattened_dict(variants[variant])
  return config
