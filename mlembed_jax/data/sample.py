"""Some texts of a split, for what is measured on training texts after the training."""

from collections.abc import Iterator

import numpy as np

from mlembed_jax.data.records import decode_record, decode_text
from mlembed_jax.data.store import Split
from mlembed_jax.data.tokenizer import Tokenizer


def sample_ids(split: Split, tokenizer: Tokenizer, count: int, max_length: int) -> list[list[int]]:
  """Returns token ids of up to `count` texts, in turns a query with its instruction and a positive.

  Rows are taken at even distances from all rows of the split, so files and languages have their
  shares. A text keeps its first `max_length` - 1 tokens; the pooled token ends it.

  Raises:
    DataError: a record cannot be read.
  """
  prefixes = {
    f.name: tokenizer.prefix(i) if (i := f.entry["instruction"]) else None for f in split.files
  }
  texts = (text for place in _places(split, count // 2) for text in _row(split, prefixes, place))
  return [[*ids[: max_length - 1], tokenizer.pooled_id] for ids in texts]


def _places(split: Split, count: int) -> list[int]:
  """Returns the records of up to `count` rows."""
  ends = np.cumsum([unit.rows for unit in split.units])
  rows = np.unique(np.linspace(0, ends[-1] - 1, count).astype(np.int64))
  units = np.searchsorted(ends, rows, side="right")
  starts = np.concatenate([[0], ends[:-1]])
  return split.rows.place(units, rows - starts[units]).tolist()


def _row(split: Split, prefixes: dict[str, list[int] | None], place: int) -> Iterator[list[int]]:
  query, row = decode_record(split.queries[place])
  prefix = prefixes[row.dataset]
  yield query.tokens.tolist() if prefix is None else query.after(prefix).tolist()
  if row.positives.size:
    yield decode_text(split.documents[int(row.positives[0])]).tokens.tolist()
