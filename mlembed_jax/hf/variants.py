"""Variants of an export by name: d256-l8-onnx-int8 is what `--variants` takes and a folder ends in.

The parts are d<dim>, l<layers>, r<rank>, uv, onnx and int8.
"""

from mlembed_jax.errors import ExportError
from mlembed_jax.hf.config_files import FLOAT32, INT8, Forms
from mlembed_jax.matryoshka import Slice

AXES = {"d": "dim", "l": "depth", "r": "rank"}
FORMS = ("uv", "onnx", "int8")


def variant_name(name: str, cut: Slice, forms: Forms = Forms()) -> str:  # noqa: B008  (frozen)
  """Returns `name` with a part for each axis that is cut, and for the forms of the weights."""
  parts = (("d", cut.dim), ("l", cut.depth), ("r", cut.rank))
  found = [f"-{letter}{size}" for letter, size in parts if size is not None]
  return name + "".join(found) + forms.suffix


def parse_variant(text: str) -> tuple[Slice, Forms]:
  """Returns what is cut and the forms of the weights, of a text like d256-l8-uv.

  Raises:
    ExportError: the text is not of this form.
  """
  sizes: dict[str, int] = {}
  forms = []
  for part in text.split("-"):
    axis = AXES.get(part[:1])
    if part in FORMS and part not in forms:
      forms.append(part)
    elif axis and axis not in sizes and part[1:].isdecimal() and int(part[1:]):
      sizes[axis] = int(part[1:])
    else:
      raise _no_variant(text)
  if "int8" in forms and "onnx" not in forms:
    raise _no_variant(text)
  onnx = (INT8 if "int8" in forms else FLOAT32) if "onnx" in forms else ""
  return Slice(**sizes), Forms(factors="uv" in forms, onnx=onnx)


def _no_variant(text: str) -> ExportError:
  return ExportError(
    f"{text!r} is no variant; one is made of d<dim>, l<layers>, r<rank>, uv, onnx and, after it, "
    "int8, each once, joined by -: d256-l8-onnx-int8"
  )
