"""Trains multilingual text encoders that can be cut in dimension, depth and embedding rank.

The public names, which are imported when they are first used, so that `import mlembed_jax` is fast:

  Encoder         texts to vectors, from an exported folder
  load_config     a configuration file, as `train_model` takes it
  train_model     one training run in a workdir, from the start or from its newest checkpoint
  export_model    Hugging Face folders from a workdir
  export_adapter  the adapter of a workdir alone, for peft
  evaluate_model  scores of an exported folder, with a report

`mlembed_jax.train`, `.export` and `.evaluate` are the commands: Python binds a module to its name
in the package as soon as anything imports it, so functions of these names would not last.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_HOMES = {
  "Encoder": "mlembed_jax.inference",
  "load_config": "mlembed_jax.config",
  "train_model": "mlembed_jax.training.loop",
  "export_adapter": "mlembed_jax.training.export",
  "export_model": "mlembed_jax.training.export",
  "evaluate_model": "mlembed_jax.eval.scoring",
}
__all__ = list(_HOMES)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
  if home := _HOMES.get(name):
    return getattr(importlib.import_module(home), name)
  raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
