"""Packages that only some exports need."""

import importlib
from typing import Any

from mlembed_jax.errors import ExportError


def require(package: str, extra: str) -> Any:
  """Returns a package; raises ExportError, which names the extra, where it is not installed."""
  try:
    return importlib.import_module(package)
  except ImportError as error:
    raise ExportError(f'{package}: pip install "mlembed_jax[{extra}]"') from error
