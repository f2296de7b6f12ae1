"""Variants of an export by name: d256-l8-onnx-int8 is what `--variants` takes and a folder ends in.

The parts are d<dim>, l<layers>, r<rank>, uv, onnx and int8, and v with the languages after it whose
tokens are kept: v-de-zh_Hant-d256.
"""

import re
from typing import NamedTuple

from mlembed_jax.errors import ExportError
from mlembed_jax.hf.config_files import FLOAT32, INT8, Forms
from mlembed_jax.matryoshka import Slice

AXES = {"d": "dim", "l": "depth", "r": "rank"}
FORMS = ("uv", "onnx", "int8")
VOCABULARY = "v"
LANGUAGE = re.compile(r"[a-z]{2,3}(_[A-Za-z0-9]+)*")


class Parts(NamedTuple):
  """What the name of a variant says."""

  cut: Slice
  forms: Forms
  # Tags of those whose tokens are kept; (): of all training texts, or a file; None: all tokens.
  languages: tuple[str, ...] | None = None


def variant_name(name: str, cut: Slice, forms: Forms = Forms()) -> str:  # noqa: B008  (frozen)
  """Returns `name` with a part for each axis that is cut, and for the forms of the weights."""
  parts = (("d", cut.dim), ("l", cut.depth), ("r", cut.rank))
  found = [f"-{letter}{size}" for letter, size in parts if size is not None]
  return name + "".join(found) + forms.suffix


def parse_variant(text: str) -> Parts:
  """Returns what is cut and the forms of the weights, of a text like d256-l8-uv.

  Raises:
    ExportError: the text is not of this form.
  """
  sizes: dict[str, int] = {}
  forms: list[str] = []
  languages: list[str] | None = None
  before = ""
  for part in text.split("-"):
    axis = AXES.get(part[:1])
    if part in FORMS and part not in forms:
      forms.append(part)
    elif axis and axis not in sizes and part[1:].isdecimal() and int(part[1:]):
      sizes[axis] = int(part[1:])
    elif part == VOCABULARY and languages is None:
      languages = []
    elif languages is not None and before in (VOCABULARY, *languages) and LANGUAGE.fullmatch(part):
      languages.append(part)
    else:
      raise _no_variant(text)
    before = part
  if "int8" in forms and "onnx" not in forms:
    raise _no_variant(text)
  onnx = (INT8 if "int8" in forms else FLOAT32) if "onnx" in forms else ""
  kept = None if languages is None else tuple(dict.fromkeys(languages))
  return Parts(Slice(**sizes), Forms(factors="uv" in forms, onnx=onnx), kept)


def _no_variant(text: str) -> ExportError:
  return ExportError(
    f"{text!r} is no variant; one is made of d<dim>, l<layers>, r<rank>, uv, v with languages "
    "after it, onnx and, after it, int8, each once, joined by -: d256-l8-onnx-int8, "
    "v-de-zh_Hant-d256"
  )
