"""Check of the vectors of parity.json against those that a program computes from the folder."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from mlembed_jax.errors import DataError, LoadError
from mlembed_jax.hf import parity
from mlembed_jax.hf import recipe as recipes
from mlembed_jax.hf.checks.finding import AGAIN, ERROR, OK, SKIPPED, WARNING, File, Finding, Subject
from mlembed_jax.hf.folder import check_folder, read_model
from mlembed_jax.hf.recipe import LAST, is_embedder

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
  """Returns texts and vectors to compare with: those of parity.json, or ours of a folder of others.

  [] where an export is damaged, or our loader refuses a folder of others, or this does not say how
  its states become vectors.
  """
  if not s.is_export:
    try:
      return _of_others(s) if is_embedder(s.path) else []
    except (DataError, LoadError):
      return []  # check_vectors says so
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


@functools.lru_cache(maxsize=1)  # asked for every program
def _of_others(s: Subject) -> list[Item]:
  recipe, model = recipes.read(s.path), read_model(s.path)
  texts = {name: recipe.default_prompt + text for name, text in parity.TEXTS.items()}
  limit = recipe.max_seq_length or max(map(len, texts.values()))
  ids = recipe.tokenizer.encode(list(texts.values()), limit)
  check_folder(s.path, model, recipe.tokenizer)
  found = parity.vectors(s.path, model, ids, recipe.dim, recipe)
  return [
    Item(name, text, limit, row, vector)
    for (name, text), row, vector in zip(texts.items(), ids, found, strict=True)
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
  try:
    yield from _compared(s) if s.is_export else _loaded(s)
  except (DataError, LoadError) as error:
    for line in str(error).splitlines()[1:] or [str(error)]:
      yield Finding(ERROR, "", f"{OURS} refuses the folder: {line}", AGAIN)


def _compared(s: Subject) -> Iterator[Finding]:
  if not s.own or not s.has(parity.FILE):
    yield Finding(SKIPPED, parity.FILE, "has nothing to compare with")
    return
  found, recipe = items(s), recipes.read(s.path)
  ids: Any = lambda item: recipe.tokenizer.encode([item.text], item.limit)[0]  # noqa: E731
  yield from compare(found, OURS, ids, lambda: _vectors(s, found, recipe.dim), EXACT)


def _vectors(s: Subject, found: Sequence[Item], dim: int) -> Any:
  return parity.vectors(s.path, read_model(s.path), [item.ids for item in found], dim)


def _loaded(s: Subject) -> Iterator[Finding]:
  recipe, model = recipes.read(s.path), read_model(s.path)
  check_folder(s.path, model, recipe.tokenizer)
  if recipe.pooling == LAST and not recipe.tokenizer.after:
    found = f"{OURS}: no token is put after a text; Encoder.load wants pooled_token"
    yield Finding(WARNING, File.TOKENIZER, found, "Name the token that ended texts in training.")
    return
  said = "loads it" if items(s) else "loads it as a language model: the last token's state"
  yield Finding(OK, "", f"{OURS}: {said}")
