"""Fewer tokens: those that some texts need, and the tokenizer that has only these.

A text whose tokens are all kept is split into the same pieces as before, under new ids. Any other
text is split into smaller pieces, down to single bytes.

Byte-level BPE: no merge ever crosses the ends of a piece, so a piece comes about as its letters
alone would merge. Everything that comes about on the way is kept, too; then each merge that the
whole tokenizer would choose is there, and is still the first in order.

Unigram: the best split of a text stays the best among fewer, if its pieces are there and an unknown
letter costs the same. That cost is set by the piece of the lowest score, and there is an unknown
letter only where no piece is that letter alone; these are kept, too.
"""

import itertools
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int
from tokenizers import pre_tokenizers

from mlembed_jax.errors import DataError

ROWS = 128  # a table has a multiple of so many rows: the lanes of a TPU, and parts of a mesh
BYTES = tuple(pre_tokenizers.ByteLevel.alphabet())  # the letters that stand for bytes
Spec = Mapping[str, Any]  # the content of a tokenizer.json


def check(spec: Spec, most: int | None = None) -> None:
  """Raises DataError where a tokenizer cannot be cut, or not to `most` tokens for any text.

  It is of another kind than byte-level BPE and Unigram, or needs more for every text.
  """
  least = len({*_always(spec), *_model(spec).always(())})
  if most is not None and least > most:
    raise DataError(f"{most} tokens are fewer than the {least} that every text needs")


def kept_ids(
  spec: Spec,
  counts: Int[np.ndarray, "V"],
  protected: Collection[int] = (),
  most: int | None = None,
) -> Int[np.ndarray, "K"]:
  """Returns the ids of a tokenizer that are kept, ascending.

  Args:
    spec: what `Vocabulary.spec` gives.
    counts: how often each id comes in the texts; all that come are kept.
    protected: ids that are kept in any case.
    most: ids that are kept; the rarest that come are left out.

  Raises:
    DataError: see `check`, or `most` leaves no room for the protected ids. Of Unigram every letter
      of the texts is one.
  """
  check(spec, most)
  model, used = _model(spec), np.flatnonzero(counts)
  kept = {*_always(spec), *model.always(used.tolist())}
  kept.update(*map(model.needed, protected))
  if most is not None and len(kept) > most:
    raise DataError(
      f"{most} tokens are fewer than the {len(kept)} that every text, the instructions and, of "
      "Unigram, each letter of the texts need"
    )
  for one in used[np.argsort(-counts[used], kind="stable")].tolist():
    fresh = model.needed(one) - kept
    if most is not None and len(kept) + len(fresh) > most:
      break
    kept |= fresh
  return np.array(sorted(kept))


def trimmed(spec: Spec, ids: Int[np.ndarray, "K"]) -> dict[str, Any]:
  """Returns tokenizer.json with these ids alone, as 0, 1, 2, ... in their order."""
  new = {int(old): place for place, old in enumerate(ids)}
  return {
    **spec,
    "added_tokens": [{**token, "id": new[token["id"]]} for token in spec["added_tokens"]],
    "post_processor": _renumbered(spec["post_processor"], new),
    "model": _model(spec).trimmed(new),
  }


def table_rows(table: np.ndarray, ids: Int[np.ndarray, "K"], rows: int) -> np.ndarray:
  """Returns the rows of a token table [V, D] for these ids, and zeros up to [rows, D]."""
  padding = np.zeros((rows - len(ids), table.shape[1]), table.dtype)
  return np.concatenate([table[ids], padding])


def padded_rows(tokens: int) -> int:
  """Returns how many rows a table of so many tokens has."""
  return -(-tokens // ROWS) * ROWS


def new_ids(ids: Int[np.ndarray, "K"], size: int) -> Int[np.ndarray, "V"]:
  """Returns the new id of each of `size` old ones, -1 for those that are not kept."""
  found = np.full(size, -1)
  found[ids] = np.arange(len(ids))
  return found


def _model(spec: Spec) -> "_Bpe | _Unigram":
  """Returns the model of a tokenizer; raises DataError for one of another kind."""
  model = spec["model"]
  if model["type"] == "Unigram":
    return _Unigram(model)
  if model["type"] != "BPE":
    raise DataError(f"a tokenizer of type {model['type']}; byte-level BPE and Unigram can be cut")
  if not _has(spec.get("pre_tokenizer"), "ByteLevel"):
    raise DataError("a BPE tokenizer whose letters are no bytes (ByteLevel) cannot be cut")
  for field in ("continuing_subword_prefix", "end_of_word_suffix"):
    if model.get(field):
      raise DataError(f"a BPE tokenizer with {field} cannot be cut")
  return _Bpe(model)


def _has(step: Any, kind: str) -> bool:
  """Returns whether a step of a tokenizer, or one inside of it, is of a kind."""
  if not step:
    return False
  return step["type"] == kind or any(_has(s, kind) for s in step.get("pretokenizers", ()))


def _always(spec: Spec) -> set[int]:
  """Returns the ids of added tokens, and of those that stand before and after a text."""
  return {token["id"] for token in spec["added_tokens"]} | set(_named(spec["post_processor"]))


def _named(step: Any) -> Iterable[int]:
  """Yields the ids that a post-processor names."""
  for inner in (step or {}).get("processors", ()):
    yield from _named(inner)
  for token in (step or {}).get("special_tokens", {}).values():
    yield from token["ids"]
  for end in ("sep", "cls"):  # [token, id], of RobertaProcessing and BertProcessing
    if step and end in step:
      yield step[end][1]


def _renumbered(step: Any, new: Mapping[int, int]) -> Any:
  """Returns a post-processor with new ids."""
  if not step:
    return step
  found = dict(step)
  if "processors" in step:
    found["processors"] = [_renumbered(inner, new) for inner in step["processors"]]
  if "special_tokens" in step:
    found["special_tokens"] = {
      name: {**token, "ids": [new[old] for old in token["ids"]]}
      for name, token in step["special_tokens"].items()
    }
  return found | {end: [step[end][0], new[step[end][1]]] for end in ("sep", "cls") if end in step}


class _Bpe:
  """A byte-level BPE."""

  def __init__(self, model: Spec):
    self._model = model
    self._id: dict[str, int] = model["vocab"]
    self._token = {number: token for token, number in self._id.items()}
    self._merges = [
      tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model["merges"]
    ]
    self._order = {pair: place for place, pair in enumerate(self._merges)}

  def always(self, used: Sequence[int]) -> set[int]:
    """Returns the ids of single bytes, of which any text can be made, and of unknown ones."""
    del used
    names = (*BYTES, self._model.get("unk_token"))
    return {self._id[name] for name in names if name in self._id}

  def needed(self, one: int) -> set[int]:
    """Returns an id, and those that come about as its letters merge."""
    parts = list(self._token.get(one, ""))
    if not self._id.keys() >= {*parts}:  # an added token, whose name is no bytes
      return {one}
    found = {one, *(self._id[part] for part in parts)}
    while (place := self._next(parts)) is not None:
      parts[place : place + 2] = [parts[place] + parts[place + 1]]
      found.add(self._id[parts[place]])
    return found

  def _next(self, parts: Sequence[str]) -> int | None:
    """Returns where the first merge in order is, the leftmost of equals; None without any."""
    order = [self._order.get(pair, len(self._order)) for pair in itertools.pairwise(parts)]
    least = min(order, default=len(self._order))
    return order.index(least) if least < len(self._order) else None

  def trimmed(self, new: Mapping[int, int]) -> dict[str, Any]:
    """Returns the model with the ids of `new` alone, and the merges whose parts are all there."""
    vocab = {token: new[old] for token, old in self._id.items() if old in new}
    merges = [list(m) for m in self._merges if {*m, m[0] + m[1]} <= vocab.keys()]
    return {**self._model, "vocab": vocab, "merges": merges}


class _Unigram:
  """A Unigram model, which splits a text so that the sum of the scores of its pieces is largest."""

  def __init__(self, model: Spec):
    self._model, self._pieces = model, model["vocab"]

  def always(self, used: Sequence[int]) -> set[int]:
    """Returns the ids of unknown and of single bytes, of the lowest score and of used letters."""
    letters = {letter for one in used if one < len(self._pieces) for letter in self._pieces[one][0]}
    lowest = min(range(len(self._pieces)), key=lambda i: self._pieces[i][1])
    unknown = self._model.get("unk_id")
    found = {i for i, (piece, _) in enumerate(self._pieces) if piece in letters}
    if self._model.get("byte_fallback"):
      names = {f"<0x{byte:02X}>" for byte in range(256)}
      found |= {i for i, (piece, _) in enumerate(self._pieces) if piece in names}
    return found | {lowest} | ({unknown} if unknown is not None else set())

  def needed(self, one: int) -> set[int]:
    """Returns the id: no piece needs another."""
    return {one}

  def trimmed(self, new: Mapping[int, int]) -> dict[str, Any]:
    """Returns the model with the ids of `new` alone."""
    vocab = [piece for old, piece in enumerate(self._pieces) if old in new]
    unknown = self._model.get("unk_id")
    return {**self._model, "vocab": vocab, "unk_id": unknown if unknown is None else new[unknown]}
