"""Trains multilingual text encoders that can be cut in dimension, depth and embedding rank.

The public names, which are imported when they are first used, so that `import mlembed_jax` is fast:

  Encoder         texts to vectors, from an exported folder
  load_config     a configuration file, as `train_model` takes it
  train_model     one training run in a workdir, from the start or from its newest checkpoint
  export_model    Hugging Face folders from a workdir
  evaluate_model  scores of an exported folder, with a report

`mlembed_jax.train`, `.export` and `.evaluate` are the commands: Python binds a module to its name in
the package as soon as anything imports it, so functions of these names would not last.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_HOMES = {
  "Encoder": ("mlembed_jax.inference", "Encoder"),
  "load_config": ("mlembed_jax.config", "load_config"),
  "train_model": ("mlembed_jax.training.loop", "train"),
  "export_model": ("mlembed_jax.training.export_run", "export_run"),
  "evaluate_model": ("mlembed_jax.eval.scoring", "evaluate_model"),
}
__all__ = [  # pyright: ignore[reportUnsupportedDunderAll]
  "Encoder",
  "evaluate_model",
  "export_model",
  "load_config",
  "train_model",
]


def __getattr__(name: str) -> Any:
  if name not in _HOMES:
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
  module, attribute = _HOMES[name]
  return getattr(importlib.import_module(module), attribute)
