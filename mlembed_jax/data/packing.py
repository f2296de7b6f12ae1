"""Texts into token sheets of fixed shapes, and rows onto devices so that each has as much to do.

A sheet is one row of token ids, [T]; several texts share it, each a segment of its own for the
encoder. Sheets come in blocks: what all devices encode at a time. A step has room for the longest
texts there could be, but only blocks that hold a text are computed. No jax here.
"""

import bisect
import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from mlembed_jax.batch import Sheets

# A sheet has a place for the end of one text per so many tokens. Texts are longer than that on
# average: 8-40 tokens with their end token even in corpora of names and menu entries.
TOKENS_PER_TEXT = 4


@dataclasses.dataclass(frozen=True)
class Layout:
  """Shapes of a step's sheets, the same for every step of one kind of rows."""

  widths: tuple[int, ...]  # tokens of sheets, ascending; texts begin the narrowest they fit in
  blocks: tuple[int, ...]  # per width, as many as the longest texts could need
  sheets: tuple[int, ...]  # of each block of a width, over all shards
  batch_shards: int  # parts of the batch, one per data-parallel device
  texts: int  # that one shard has in a step
  packed: bool  # False: one text per sheet

  def slots(self, width: int) -> int:
    """Returns how many texts a sheet may hold."""
    return max(1, width // TOKENS_PER_TEXT) if self.packed else 1

  def shapes(self) -> list[Sheets]:
    """Returns `Sheets` of each width that hold shapes instead of int32 arrays."""
    made = []
    for n, s, t in zip(self.blocks, self.sheets, self.widths, strict=True):
      slots = (n, s, self.slots(t))
      made.append(Sheets(ends=slots, texts=slots, tokens=(n, s, t)))
    return made


def layout(
  *,
  rows: int,
  texts_per_row: int,
  longest: int,
  widths: Sequence[int],
  block_tokens: int,
  batch_shards: int,
  packed: bool,
) -> Layout:
  """Returns the shapes for batches of `rows` rows over all shards.

  Args:
    rows: of a batch, a multiple of `batch_shards`.
    texts_per_row: a query, its positives and its negatives.
    longest: tokens of the longest text there is; wider sheets than it needs are left out.
    widths: tokens of the sheets, ascending.
    block_tokens: tokens encoded at a time over all shards; a shard has one sheet at least.
    batch_shards: data-parallel devices.
    packed: whether several texts may share a sheet.
  """
  used = tuple(widths)[: bisect.bisect_left(widths, longest) + 1]
  texts = rows // batch_shards * texts_per_row
  per_shard = [max(1, min(texts, block_tokens // (batch_shards * width))) for width in used]
  # This is capacity for the worst case: one text per sheet.
  blocks = tuple(math.ceil(texts / n) for n in per_shard)
  sheets = tuple(n * batch_shards for n in per_shard)
  return Layout(used, blocks, sheets, batch_shards, texts, packed)


def balance(tokens: np.ndarray, shards: int) -> np.ndarray:
  """Returns an order of the rows in which each of `shards` equal runs has about as many tokens.

  Rows are dealt to the shards from the longest to the shortest, forth and back.
  """
  dealt = np.argsort(-tokens, kind="stable").reshape(-1, shards)
  dealt[1::2] = dealt[1::2, ::-1]
  return dealt.T.reshape(-1)


def pack(ids: Sequence[Sequence[np.ndarray]], layout: Layout) -> list[Sheets]:
  """Returns the blocks of each width that hold a text; `ids` are token ids by shard and text."""
  bins = [_bins(np.array([len(text) for text in texts]), layout) for texts in ids]
  made = []
  for i in range(len(layout.widths)):
    per_shard = layout.sheets[i] // layout.batch_shards
    sheets = _empty(layout, i, math.ceil(max(len(by_width[i]) for by_width in bins) / per_shard))
    for shard, (texts, by_width) in enumerate(zip(ids, bins, strict=True)):
      _write(sheets, shard, per_shard, by_width[i], texts)
    made.append(sheets)
  return made


def _bins(lengths: np.ndarray, layout: Layout) -> list[list[np.ndarray]]:
  """Returns for each width which texts share each sheet.

  The widest come first: the texts that need them leave room, which shorter texts take.
  """
  if lengths.max() > layout.widths[-1]:  # else it would be left out in silence
    raise ValueError(f"a text of {lengths.max()} tokens, but sheets of {layout.widths}")
  left, made = np.arange(len(lengths)), []
  for i, width in reversed(list(enumerate(layout.widths))):
    below = layout.widths[i - 1] if i else 0
    bins = fill(lengths[left], width, layout.slots(width), below)
    made.insert(0, [left[members] for members in bins])
    left = np.delete(left, [text for members in bins for text in members])
  return made


def whole(sheets: Sequence[Sheets], layout: Layout) -> tuple[Sheets, ...]:
  """Returns the sheets of each width with all blocks of the layout, the further ones empty."""
  made = []
  for i, used in enumerate(sheets):
    full = _empty(layout, i, layout.blocks[i])
    for into, array in zip(full, used, strict=True):
      into[: len(array)] = array
    made.append(full)
  return tuple(made)


def fill(lengths: np.ndarray, width: int, slots: int, below: int = 0) -> list[list[int]]:
  """Returns which texts share each sheet: longest first, each into the fullest sheet with room.

  Texts of up to `below` tokens begin no sheet: they take the room that is left, or are left out.
  """
  sheets: list[list[int]] = []
  room: list[tuple[int, int]] = []  # (free tokens, sheet), ascending
  shortest = int(lengths.min(initial=width))
  for text in np.argsort(-lengths, kind="stable").tolist():
    length = int(lengths[text])
    at = bisect.bisect_left(room, (length, -1))
    if at < len(room):
      free, sheet = room.pop(at)
    elif length <= below:
      continue
    else:
      free, sheet = width, len(sheets)
      sheets.append([])
    sheets[sheet].append(text)
    if free - length >= shortest and len(sheets[sheet]) < slots:
      bisect.insort(room, (free - length, sheet))
  return sheets


def _empty(layout: Layout, i: int, blocks: int) -> Sheets:
  filled = Sheets(ends=layout.widths[i], texts=layout.texts, tokens=0)
  shapes = layout.shapes()[i]
  return Sheets(
    *(np.full((blocks, *s[1:]), x, np.int32) for s, x in zip(shapes, filled, strict=True))
  )


def _write(
  into: Sheets,
  shard: int,
  per_block: int,
  bins: Sequence[np.ndarray],
  ids: Sequence[np.ndarray],
) -> None:
  """Writes one shard's sheets: the first ones of block 0, then of block 1 and so on."""
  for number, members in enumerate(bins):
    place = number // per_block, shard * per_block + number % per_block
    text = np.concatenate([ids[member] for member in members])
    into.tokens[place][: len(text)] = text
    into.ends[place][: len(members)] = np.cumsum([len(ids[m]) for m in members]) - 1
    into.texts[place][: len(members)] = members
