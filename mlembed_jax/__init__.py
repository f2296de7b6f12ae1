"""Trains multilingual text encoders that can be cut in dimension, depth and embedding rank.

The public names, which are imported when they are first used, so that `import mlembed_jax` is fast:

  Encoder      texts to vectors, from an exported folder
  load_config  a configuration file, as `train` takes it
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_HOMES = {
  "Encoder": "mlembed_jax.inference",
  "load_config": "mlembed_jax.config",
}
__all__ = ["Encoder", "load_config"]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
  if home := _HOMES.get(name):
    return getattr(importlib.import_module(home), name)
  raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
