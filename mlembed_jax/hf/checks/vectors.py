"""Check of the vectors of parity.json against those that a program computes from the folder."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from mlembed_jax.data.tokenizer import Tokenizer
from mlembed_jax.errors import DataError, LoadError
from mlembed_jax.hf import parity
from mlembed_jax.hf.checks.finding import AGAIN, ERROR, OK, SKIPPED, File, Finding, Subject
from mlembed_jax.hf.folder import read_model

OURS = "ours"
EXACT = parity.TOLERANCE["float32"]


@dataclasses.dataclass(frozen=True)
class Item:
  """A text as the model reads it, and what should become of it."""

  name: str
  text: str  # with its prompt
  limit: int  # of its tokens
  ids: list[int]
  vector: np.ndarray


def items(s: Subject) -> list[Item]:
  """Returns the texts of parity.json with the prompts of the folder; [] where there are none."""
  if not s.own:
    return []
  limit = s.allowed or s.own.pooling.max_seq_length
  return [
    Item(
      name=item["id"],
      text=(s.prompts.get(item["prompt_name"]) or "") + item["text"],
      limit=item.get("max_length", limit),
      ids=item["input_ids"],
      vector=parity.embedding(item),
    )
    for item in s.json(parity.FILE).get("items", [])
  ]


def compare(
  found: Sequence[Item],
  program: str,
  ids: Callable[[Item], list[int]],
  vectors: Callable[[], Sequence[np.ndarray]],
  tolerance: dict[str, float],
) -> Iterator[Finding]:
  """Yields what differs; vectors of other ids are not compared."""
  others = [(item, got) for item in found if (got := list(ids(item))) != item.ids]
  if others:
    item, got = others[0]
    text = f"{program}: the tokenizer gives other ids to {len(others)} of {len(found)} texts, "
    text += f"first {item.name!r}: {got[:8]}... instead of {item.ids[:8]}..."
    remedy = "Tokenizer, prompts or max_seq_length changed since the export."
    yield Finding(ERROR, parity.FILE, text, remedy)
    return
  yield _distances(found, program, vectors(), tolerance)


def _distances(
  found: Sequence[Item],
  program: str,
  vectors: Sequence[np.ndarray],
  tolerance: dict[str, float],
) -> Finding:
  sizes = {(item.vector.shape[-1], len(v)) for item, v in zip(found, vectors, strict=True)}
  if other := [pair for pair in sizes if pair[0] != pair[1]]:
    text = f"{program} gives {other[0][1]} coordinates, parity.json {other[0][0]}"
    return Finding(ERROR, parity.FILE, text, AGAIN)
  pairs = [(item.vector, np.asarray(v, np.float32)) for item, v in zip(found, vectors, strict=True)]
  cosines = [float(np.nan_to_num(a @ b)) for a, b in pairs]  # NaN agrees with nothing
  largest = max(float(np.abs(a - b).max()) for a, b in pairs)
  worst = int(np.argmin(cosines))
  text = f"{program}: least cosine {cosines[worst]:.7f} of {len(found)} texts"
  if cosines[worst] >= tolerance["min_cos"] and largest <= tolerance.get("max_abs", np.inf):
    return Finding(OK, parity.FILE, text)
  text += f", of {found[worst].name!r}; largest difference {largest:.1e}"
  return Finding(ERROR, parity.FILE, text, "The weights changed since the export.")


def check_vectors(s: Subject) -> Iterator[Finding]:
  """Our own forward pass of the stored weights gives the vectors of parity.json."""
  if not (own := s.own):
    yield Finding(SKIPPED, File.OWN, "says nothing that can be used")
    return
  found = items(s)
  try:
    tokenizer = Tokenizer(s.path / File.TOKENIZER, own.pooling.token)
    ids: Any = lambda item: tokenizer.encode([item.text], item.limit)[0]  # noqa: E731
    yield from compare(found, OURS, ids, lambda: _vectors(s, found, own.dims.exported), EXACT)
  except (DataError, LoadError) as error:
    text = f"{OURS} refuses the folder: {str(error).splitlines()[-1]}"
    yield Finding(ERROR, parity.FILE, text, AGAIN)


def _vectors(s: Subject, found: Sequence[Item], dim: int) -> Any:
  return parity.vectors(s.path, read_model(s.path), [item.ids for item in found], dim)
