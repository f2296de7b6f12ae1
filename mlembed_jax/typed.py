"""JSON objects as dataclasses, whose fields say what is allowed. Knows no other module."""

import dataclasses
import sys
import types
import typing
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

T = TypeVar("T")

# The number beside a type is the least value.
Count = Annotated[int, 0]
Size = Annotated[int, 1]
MOST = 2**53  # of whole numbers; beyond it programs disagree about what a file says


def from_json(cls: type[T], value: Any, name: str = "") -> T:
  """Returns a JSON object as the dataclass `cls`; `name` is that of the object in messages.

  Types of fields are int, float, str, bool, `Count`, `Size`, Any, other such dataclasses,
  tuple[X, ...], list[X] and dict[str, X] of them, and each of them `| None`. A float may be NaN, as
  the score of a correlation may be, but not infinite.

  Raises:
    ValueError: a field is missing, unknown, of another type or out of range; the message names it.
  """
  if not isinstance(value, Mapping):
    raise ValueError(f"{name or 'the content'} is {_short(value)}, expected dict")
  prefix = f"{name}." if name else ""
  fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
  needed = [f.name for f in fields.values() if f.default is f.default_factory]  # both MISSING
  if missing := [field for field in needed if field not in value]:
    raise ValueError(f"{prefix}{missing[0]} is missing")
  if unknown := [key for key in value if key not in fields]:
    raise ValueError(f"{prefix}{unknown[0]} is unknown; if a newer version wrote it, upgrade")
  return cls(**{key: _typed(fields[key].type, found, prefix + key) for key, found in value.items()})


def listed(value: Mapping[str, Any], name: str) -> list[Any]:
  """Returns a field that is a list; raises ValueError where it is none."""
  if name not in value:
    raise ValueError(f"{name} is missing")
  if not isinstance(found := value[name], list):
    raise ValueError(f"{name} is {_short(found)}, expected list")
  return found


def _typed(hint: Any, value: Any, name: str) -> Any:
  """Returns the JSON value of a field as its type `hint`."""
  if hint is Any:
    return value
  container, arguments = typing.get_origin(hint), typing.get_args(hint)
  if container in (types.UnionType, typing.Union):
    return None if value is None else _typed(arguments[0], value, name)
  if dataclasses.is_dataclass(hint):
    return from_json(typing.cast(Any, hint), value, name)
  if container is Annotated:
    return _whole(value, name, arguments[1])
  if hint is int:
    return _whole(value, name, -MOST)
  if hint is float:
    return _float(value, name)
  wanted = list if container is tuple else container or hint
  if type(value) is not wanted:
    raise ValueError(f"{name} is {_short(value)}, expected {wanted.__name__}")
  if container in (tuple, list):
    items = (_typed(arguments[0], item, f"{name}[{i}]") for i, item in enumerate(value))
    return container(items)
  if container is dict:
    return {key: _typed(arguments[1], item, f"{name}.{key}") for key, item in value.items()}
  return value


def _whole(value: Any, name: str, least: int) -> int:
  if not isinstance(value, int) or isinstance(value, bool):
    raise ValueError(f"{name} is {_short(value)}, expected int")
  if not least <= value <= MOST:
    raise ValueError(f"{name} is {_short(value)}, which is out of range")
  return value


def _float(value: Any, name: str) -> float:
  if not isinstance(value, int | float) or isinstance(value, bool):
    raise ValueError(f"{name} is {_short(value)}, expected float")
  if not (value != value or abs(value) <= sys.float_info.max):  # NaN is none but itself
    raise ValueError(f"{name} is {_short(value)}, which is out of range")
  return value


def _short(value: Any) -> str:
  text = repr(value)
  return text if len(text) <= 80 else text[:80] + "..."
