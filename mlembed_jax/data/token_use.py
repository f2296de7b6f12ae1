"""Which tokens texts have, of training rows or of a file."""

import dataclasses
import itertools
from collections.abc import Collection, Iterable, Iterator, Sequence

import numpy as np
from jaxtyping import Int

from mlembed_jax import progress
from mlembed_jax.data.catalog import Catalog
from mlembed_jax.data.languages import language_key
from mlembed_jax.data.records import TRAIN, VALIDATION, Records, Text, decode_record, decode_text
from mlembed_jax.data.store import open_split
from mlembed_jax.data.texts import read_texts
from mlembed_jax.data.tokenizer import QUERY, Vocabulary
from mlembed_jax.errors import DataError

SAMPLE = 10_000  # texts that are kept, up to twice as many
BATCH = 1024  # texts that are tokenised at a time

Ids = Int[np.ndarray, "T"]


@dataclasses.dataclass
class TokenUse:
  """How often each token comes in texts, and some of the texts, at even distances."""

  counts: Int[np.ndarray, "V"]
  sample: list[Ids] = dataclasses.field(default_factory=list)
  texts: int = 0  # that were added
  _every: int = 1  # of so many texts one is sampled

  @classmethod
  def empty(cls, vocabulary: Vocabulary) -> "TokenUse":
    """Returns the use of no text."""
    return cls(np.zeros(vocabulary.size, np.int64))

  def add(self, forms: Sequence[Ids]) -> None:
    """Adds a text in all its forms, as a document and as a query; the first may be sampled."""
    for ids in forms:
      np.add.at(self.counts, ids, 1)
    if self.texts % self._every == 0:
      self.sample.append(forms[0])
    self.texts += 1
    if len(self.sample) == 2 * SAMPLE:
      self.sample, self._every = self.sample[::2], 2 * self._every

  def changed(self, kept: Int[np.ndarray, "K"]) -> float:
    """Returns the share of the sampled texts that have a token outside of the kept ones."""
    there = np.zeros(len(self.counts), bool)
    there[kept] = True
    return float(np.mean([not there[ids].all() for ids in self.sample]))


def total(uses: Sequence[TokenUse]) -> TokenUse:
  """Returns the use of tokens in all texts of one or more uses."""
  counts = sum((use.counts for use in uses[1:]), uses[0].counts)
  return TokenUse(counts, [text for use in uses for text in use.sample], sum(u.texts for u in uses))


def of_file(vocabulary: Vocabulary, name: str, column: str, flag: str) -> TokenUse:
  """Returns the use of tokens in the texts of a file; raises DataError where it has none."""
  found = of_texts(vocabulary, read_texts(name, column, flag))
  if not found.texts:
    raise DataError(f"{flag}: {name} has no texts")
  return found


def of_texts(vocabulary: Vocabulary, texts: Iterable[str]) -> TokenUse:
  """Returns the use of tokens in texts, as documents and after `Query: `."""
  found, texts = TokenUse.empty(vocabulary), iter(texts)
  with progress.count("counting tokens", unit=" texts") as bar:
    while part := list(itertools.islice(texts, BATCH)):
      forms = part, [QUERY.format(text=text) for text in part]
      for both in zip(*map(vocabulary.ids, forms), strict=True):
        found.add([np.asarray(ids, np.int64) for ids in both])
      bar.update(len(part))
  return found


def of_rows(
  catalog: Catalog,
  names: Sequence[str],
  vocabulary: Vocabulary,
  languages: Collection[str],
  scheme: str,
) -> TokenUse:
  """Returns the use of tokens in prepared rows, those of validation too: queries and documents.

  Args:
    catalog: of the prepared folder.
    names: of its files whose rows count.
    vocabulary: of its ids.
    languages: keys of those whose rows count; none: all rows.
    scheme: how languages are named, see `data.language_key`.

  Raises:
    DataError: the rows have no such language, or a record cannot be read.
  """
  splits = [open_split(catalog, TRAIN, list(names), scheme)]
  if held := [s.file for s in catalog.shards[VALIDATION] if s.file in names and s.written.records]:
    splits.append(open_split(catalog, VALIDATION, list(dict.fromkeys(held)), scheme))
  units = [unit for split in splits for unit in split.units]
  known = {unit.language for unit in units}
  if unknown := sorted({*languages} - known):
    raise DataError(
      f"the training rows have no {', '.join(unknown)}; they have {', '.join(sorted(known))}"
    )
  wanted = sum(unit.rows for unit in units if not languages or unit.language in languages)
  found, needed = TokenUse.empty(vocabulary), np.zeros(len(splits[0].documents), bool)
  with progress.count("counting tokens of rows", wanted, " rows") as bar:
    for query, row in (decode_record(m) for split in splits for m in _all(split.queries)):
      kept = not languages or language_key(row.language, scheme) in languages
      if row.dataset in names and kept:
        found.add(_forms(query))
        needed[row.positives], needed[row.negatives] = True, True
        bar.update()
  places = np.flatnonzero(needed)
  with progress.count("counting tokens of documents", len(places), " texts") as bar:
    for place in places.tolist():
      found.add(_forms(decode_text(splits[0].documents[place])))
      bar.update()
  return found


def _all(records: Records) -> Iterator[bytes]:
  return (records[place] for place in range(len(records)))


def _forms(text: Text) -> list[Ids]:
  """Returns the ids of a text as a document, and after an instruction where it may stand there."""
  return [text.tokens, text.after(())] if text.head.size else [text.tokens]
