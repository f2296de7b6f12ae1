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
