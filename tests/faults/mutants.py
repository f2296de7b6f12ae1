"""Content that strangers may send: JSON with one wrong value, files with a few wrong bytes."""

import copy
import json
from typing import Any

from hypothesis import strategies as st

NUMBERS = (0, -1, 1, 2, 3, 10**9, 2**31, 2**53 + 1, 10**30, 0.5, -0.0, 1e308)
NUMBERS += (float("nan"), float("inf"), float("-inf"))
DEEP: Any = []
for _ in range(150):
  DEEP = [DEEP]

scalars = st.one_of(
  st.none(),
  st.booleans(),
  st.sampled_from(NUMBERS),
  st.integers(),
  st.floats(),
  st.text(max_size=8),
  st.sampled_from(["\ud83d", "\0", "../x", "/etc/passwd", "a" * 300, "Ελ"]),
)
values = st.one_of(
  scalars,
  st.lists(scalars, max_size=3),
  st.dictionaries(st.text(max_size=5), scalars, max_size=3),
  st.sampled_from([[], {}, DEEP]),
)


@st.composite
def changed(draw: st.DrawFn, value: Any) -> Any:
  """Draws a copy of a JSON value in which a value is another, absent, or new."""
  value = copy.deepcopy(value)
  if not isinstance(value, dict | list) or not value:
    return draw(values)
  at = value
  while True:
    keys = list(at) if isinstance(at, dict) else list(range(len(at)))
    key = draw(st.sampled_from(keys))
    if isinstance(at[key], dict | list) and at[key] and draw(st.integers(0, 3)):
      at = at[key]
      continue
    match draw(st.sampled_from(["replace", "replace", "replace", "remove", "add"])):
      case "replace":
        at[key] = draw(values)
      case "remove":
        del at[key]
      case "add" if isinstance(at, dict):
        at[draw(st.text(max_size=8))] = draw(values)
      case "add":
        at.append(draw(values))
    return value


@st.composite
def damaged(draw: st.DrawFn, data: bytes) -> bytes:
  """Draws bytes that are cut, or in which up to four bytes are others."""
  if draw(st.booleans()):
    return data[: draw(st.integers(0, len(data)))]
  found = bytearray(data)
  for _ in range(draw(st.integers(1, 4))):
    found[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
  return bytes(found)


def json_files(value: Any) -> st.SearchStrategy[bytes]:
  """Returns contents of a JSON file that should hold `value`."""
  text = json.dumps(value, ensure_ascii=False).encode()
  twice = text.replace(b"{", b'{"format_version": 1, "format_version": 1, ', 1)
  return st.one_of(
    changed(value).map(lambda found: json.dumps(found).encode()),
    changed(value).flatmap(changed).map(lambda found: json.dumps(found).encode()),
    damaged(text),
    st.sampled_from([b"", b"[" * 100_000, b'{"a":' * 100_000, b"\xff\xfe", b"1" * 5000, twice]),
    st.binary(max_size=40),
  )
