"""Texts in sheets: every text once, within capacity, little left empty; rows on devices alike."""

import numpy as np
import pytest

from mlembed_jax.batch import Sheets
from mlembed_jax.data import packing

WIDTHS = (256, 1024)


def layout_of(**changes):
  options = {"rows": 512, "texts_per_row": 9, "longest": 1024, "widths": WIDTHS}
  options |= {"block_tokens": 65_536, "batch_shards": 8, "packed": True}
  return packing.layout(**(options | changes))


def corpus(count, seed=0):
  """Lengths as of retrieval: median 60 tokens, one in fifty above 500."""
  drawn = np.random.default_rng(seed).lognormal(np.log(60), 1.0, count)
  return np.clip(drawn, 5, 1024).astype(int)


def texts_of(lengths):
  """Texts whose tokens are all different, so that a misplaced one shows."""
  ends = np.cumsum(lengths)
  return [np.arange(end - n, end) + 1 for end, n in zip(ends, lengths, strict=True)]


def read(made, layout, shard):
  """Returns {text: its tokens} of one shard, from the sheets alone."""
  found = {}
  for sheets, width in zip(made, layout.widths, strict=True):
    own = Sheets(*(np.split(array, layout.batch_shards, 1)[shard] for array in sheets))
    for at in np.ndindex(own.tokens.shape[:2]):
      start = 0
      for end, text in zip(own.ends[at], own.texts[at], strict=True):
        if text == layout.texts:
          assert end == width
          continue
        assert text not in found
        found[int(text)] = own.tokens[at][start : end + 1]
        start = end + 1
      assert not own.tokens[at][start:].any()
  return found


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("shards", [1, 8])
def test_every_text_is_in_one_place(packed, shards):
  layout = layout_of(rows=64, batch_shards=shards, packed=packed)
  lengths = corpus(64 * 9).reshape(shards, -1)
  ids = [texts_of(part) for part in lengths]
  made = packing.pack(ids, layout)
  for shard, texts in enumerate(ids):
    found = read(made, layout, shard)
    assert sorted(found) == list(range(len(texts)))
    for number, text in found.items():
      np.testing.assert_array_equal(text, texts[number])


def test_whole_batches_have_the_shapes_of_the_layout_and_empty_blocks_at_the_end():
  layout = layout_of(rows=64, block_tokens=8192)
  made = packing.pack([texts_of(part) for part in corpus(64 * 9).reshape(8, -1)], layout)
  for used, arrays, shapes in zip(made, packing.whole(made, layout), layout.shapes(), strict=True):
    assert Sheets(*(array.shape for array in arrays)) == shapes
    assert {array.dtype for array in arrays} == {np.dtype(np.int32)}
    blocks, width = len(used.tokens), arrays.tokens.shape[-1]
    assert np.all(np.any(used.texts < layout.texts, axis=(1, 2)))
    empty = Sheets(ends=width, texts=layout.texts, tokens=0)
    for whole, array, value in zip(arrays, used, empty, strict=True):
      np.testing.assert_array_equal(whole[:blocks], array)
      assert np.all(whole[blocks:] == value)
    assert blocks < len(arrays.tokens)


def test_a_text_is_in_the_narrowest_sheet_that_holds_it_or_beside_a_longer_one():
  layout = layout_of(rows=6, texts_per_row=1, batch_shards=1)
  made = packing.pack([texts_of([256, 257, 1024, 1, 768, 250])], layout)
  # 1024; 768 + 256; 257 + 250 + 1
  assert [sorted(s.texts[s.texts < 6].tolist()) for s in made] == [[], [0, 1, 2, 3, 4, 5]]
  layout = layout_of(rows=3, texts_per_row=1, batch_shards=1)
  made = packing.pack([texts_of([256, 1000, 20])], layout)
  assert [sorted(s.texts[s.texts < 3].tolist()) for s in made] == [[0], [1, 2]]


def test_a_text_beyond_the_widest_sheet_is_an_error():
  with pytest.raises(ValueError, match="a text of 1025 tokens"):
    packing.pack([texts_of([1025])], layout_of(rows=1, texts_per_row=1, batch_shards=1))


@pytest.mark.parametrize("width", [32, 256, 1024])
def test_sheets_hold_no_more_tokens_and_texts_than_they_can(width):
  lengths = np.random.default_rng(0).integers(1, width // 3, 2000)
  slots = width // 8
  sheets = packing.fill(lengths, width, slots)
  assert sorted(text for sheet in sheets for text in sheet) == list(range(2000))
  assert max(lengths[sheet].sum() for sheet in sheets) <= width
  assert max(map(len, sheets)) <= slots


def test_short_texts_stop_at_the_slots():
  assert [len(sheet) for sheet in packing.fill(np.full(20, 2), 32, 8)] == [8, 8, 4]


@pytest.mark.parametrize("widths", [(256,), (1024,), WIDTHS])
def test_sheets_of_a_real_mixture_are_full(widths):
  layout = layout_of(widths=widths)  # 576 texts on each of 8 devices
  lengths = np.minimum(corpus(8 * layout.texts), widths[-1]).reshape(8, -1)
  made = packing.pack([texts_of(part) for part in lengths], layout)
  capacity = sum(s.tokens.shape[-1] * int(np.any(s.texts < layout.texts, -1).sum()) for s in made)
  assert lengths.sum() / capacity >= 0.97


def test_blocks_are_filled_in_order():
  layout = layout_of(rows=64, block_tokens=8192)
  ids = [texts_of(part) for part in corpus(64 * 9).reshape(8, -1)]
  for sheets, per_block in zip(packing.pack(ids, layout), layout.sheets, strict=True):
    own = (sheets.texts[..., 0] < layout.texts).reshape(-1, 8, per_block // 8)
    filled = own.swapaxes(0, 1).reshape(8, -1)
    assert np.all(filled[:, :-1] >= filled[:, 1:])


@pytest.mark.parametrize("packed", [True, False])
def test_the_longest_texts_there_could_be_fit(packed):
  for block_tokens in (8192, 20_000, 10**6):
    layout = layout_of(rows=16, texts_per_row=3, block_tokens=block_tokens, packed=packed)
    for longest in WIDTHS:
      made = packing.pack([texts_of([longest] * 6)] * 8, layout)
      assert all(len(read(made, layout, shard)) == 6 for shard in range(8))


def test_blocks_are_as_large_as_asked_and_no_larger_than_needed():
  layout = layout_of()
  assert (layout.sheets, layout.blocks) == ((256, 64), (18, 72))  # 576 texts of 8 shards
  assert layout_of(block_tokens=8192).sheets == (32, 8)
  assert layout_of(block_tokens=10**9).sheets == (8 * 576, 8 * 576)
  assert layout_of(block_tokens=10**9).blocks == (1, 1)


@pytest.mark.parametrize(
  ("longest", "widths"), [(20, (256,)), (256, (256,)), (257, WIDTHS), (1024, WIDTHS)]
)
def test_widths_that_no_text_needs_are_left_out(longest, widths):
  assert layout_of(longest=longest).widths == widths


@pytest.mark.parametrize("shards", [1, 2, 8])
def test_devices_get_as_many_rows_and_about_as_many_tokens(shards):
  tokens = corpus(512 * 9).reshape(512, 9).sum(1)
  order = packing.balance(tokens, shards)
  assert sorted(order) == list(range(512))
  parts = tokens[order].reshape(shards, -1).sum(1)
  assert parts.max() <= 1.02 * parts.mean()
  if shards == 8:  # in the order of the file they differ by more
    given = tokens.reshape(shards, -1).sum(1)
    assert given.max() > 1.03 * given.mean()
