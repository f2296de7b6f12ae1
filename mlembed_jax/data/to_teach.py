"""Which texts of a prepared dataset a teacher is to embed, each once, and who gets which vector.

Texts are read back from their token ids, as far as the dataset stores them.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from jaxtyping import Int

from mlembed_jax import progress
from mlembed_jax.data.catalog import Catalog
from mlembed_jax.data.manifest import File
from mlembed_jax.data.records import DOCUMENTS, TRAIN, Row, Text, decode_record, decode_text
from mlembed_jax.data.tokenizer import Vocabulary
from mlembed_jax.errors import DataError

# Which text of a translation is embedded.
QUERY, PASSAGE, ENGLISH = "query", "passage", "english"
NONE = -1  # stands for no text
BITEXT = "bitext"


@dataclasses.dataclass(frozen=True)
class Prompts:
  """What stands before the texts of a dataset when a teacher reads them."""

  documents: str
  queries: dict[str, str]  # by file


@dataclasses.dataclass(frozen=True)
class ToTeach:
  """The distinct texts, and the number of the one whose vector each text of the dataset gets."""

  sources: Int[np.ndarray, "T"]  # a document's place, or a row's after all documents; ascending
  prompts: Int[np.ndarray, "T"]  # number of what stands before it, in `before`
  before: list[str]
  documents: Int[np.ndarray, "N"]  # NONE: no taught file needs it
  queries: Int[np.ndarray, "R"]  # NONE: of another file


@dataclasses.dataclass(frozen=True)
class _Rows:
  """The text that each row needs beside its documents, and the documents that rows need."""

  sources: np.ndarray  # [R] as in ToTeach: the query or, where rows are aligned, any of its texts
  hashes: np.ndarray  # [R] uint64, of that text
  prompts: np.ndarray  # [R]; NONE: the row is not taught
  documents: np.ndarray  # [N] bool


class Texts:
  """The texts of a dataset, read back from their token ids."""

  def __init__(self, catalog: Catalog):
    """Opens the dataset's records; raises DataError where ids cannot become text again."""
    self._vocabulary = Vocabulary(catalog.tokenizer)
    self._vocabulary.texts([])
    self.rows, self.documents = catalog.records(TRAIN), catalog.records(DOCUMENTS)

  def row(self, place: int) -> tuple[Text, Row]:
    """Returns a query and its row."""
    return decode_record(self.rows[place])

  def document(self, place: int) -> Text:
    """Returns a document."""
    return decode_text(self.documents[place])

  def read(self, texts: Sequence[Text]) -> list[str]:
    """Returns what token ids stand for; a letter that was cut in the middle is left out."""
    found = self._vocabulary.texts([text.tokens.tolist() for text in texts])
    return [text.rstrip("\ufffd") for text in found]

  def source(self, place: int) -> Text:
    """Returns the text of an entry of `ToTeach.sources`."""
    count = len(self.documents)
    return self.document(place) if place < count else self.row(place - count)[0]


def is_aligned(file: File, align: str) -> bool:
  """Returns whether all texts of a row share one vector, and negatives have none."""
  return bool(align) and file.entry["task_type"] == BITEXT


def plan(catalog: Catalog, files: Sequence[File], prompts: Prompts, align: str) -> ToTeach:
  """Returns what is to be embedded of the training rows of some files.

  Args:
    catalog: of the prepared dataset.
    files: whose rows are taught.
    prompts: what stands before texts; before any text of an aligned row, that of queries.
    align: QUERY, PASSAGE or ENGLISH: a row of translations needs this text alone; "": each text
      gets its own vector.

  Raises:
    DataError: a record cannot be read, or the language of texts cannot be told.
  """
  texts = Texts(catalog)
  before = list(dict.fromkeys([prompts.documents, *(prompts.queries[f.name] for f in files)]))
  numbers = {f.name: before.index(prompts.queries[f.name]) for f in files}
  rows = _rows(catalog, texts, numbers, align)
  places, taught = np.flatnonzero(rows.documents), np.flatnonzero(rows.prompts != NONE)
  sources = np.concatenate([places, rows.sources[taught]])
  prompt = np.concatenate([np.zeros_like(places), rows.prompts[taught]])  # of documents: number 0
  hashes = np.concatenate([_hashes(texts, places), rows.hashes[taught]])
  first, number = _distinct(hashes, prompt, sources)
  documents, queries = (np.full(n, NONE) for n in (rows.documents.size, rows.prompts.size))
  documents[places], queries[taught] = np.split(number, [places.size])
  return ToTeach(sources[first], prompt[first], before, documents, queries)


def _distinct(
  hashes: np.ndarray, prompt: np.ndarray, sources: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """Returns where each pair of hash and prompt comes first, and the number of each.

  Numbers are in the order of sources, in which texts lie on the disk.
  """
  keys = hashes + prompt.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)  # wraps around
  _, first, number = np.unique(keys, return_index=True, return_inverse=True)
  order = np.argsort(sources[first], kind="stable")
  rank = np.empty_like(order)
  rank[order] = np.arange(order.size)
  return first[order], rank[number]


def _hashes(texts: Texts, places: np.ndarray) -> np.ndarray:
  found = np.zeros(len(places), np.uint64)
  with progress.count("reading documents", len(places), " texts") as bar:
    for i, place in enumerate(places.tolist()):
      found[i] = _hash(texts.document(place))
      bar.update()
  return found


def _hash(text: Text) -> np.uint64:
  return np.ascontiguousarray(text.hash).view(np.uint64)[0]


def _rows(catalog: Catalog, texts: Texts, numbers: dict[str, int], align: str) -> _Rows:
  rows, documents = len(texts.rows), len(texts.documents)
  found = _Rows(
    sources=documents + np.arange(rows),
    hashes=np.zeros(rows, np.uint64),
    prompts=np.full(rows, NONE),
    documents=np.zeros(documents, bool),
  )
  side = _side(texts, align) if align else None
  places = list(_places(catalog, numbers))
  with progress.count("reading rows", len(places), " rows") as bar:
    for place in places:
      text, row = texts.row(place)
      found.prompts[place] = numbers[row.dataset]
      if side is None or not is_aligned(catalog.files[row.dataset], align):
        found.documents[row.positives], found.documents[row.negatives] = True, True
      elif side(text, row) == PASSAGE:
        found.sources[place] = row.positives[0]
        text = texts.document(int(row.positives[0]))
      found.hashes[place] = _hash(text)
      bar.update()
  return found


def _places(catalog: Catalog, numbers: dict[str, int]) -> Iterator[int]:
  """Yields the places of the records of files."""
  start = 0
  for shard in catalog.shards[TRAIN]:
    if shard.file in numbers:
      yield from range(start, start + shard.written.records)
    start += shard.written.records


def _side(texts: Texts, align: str) -> Callable[[Text, Row], str]:
  """Returns the function that tells which text of a row is embedded, QUERY or PASSAGE."""
  if align != ENGLISH:
    return lambda *_: align
  score = _english()

  def side(text: Text, row: Row) -> str:
    query, passage = texts.read([text, texts.document(int(row.positives[0]))])
    return QUERY if score(query) >= score(passage) else PASSAGE

  return side


def _english() -> Callable[[str], float]:
  """Returns the function that tells how English a text is, against its likeliest language."""
  try:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier
  except ImportError as error:
    raise DataError(
      'align: telling which text is English needs py3langid; pip install "mlembed_jax[teach]", or '
      "name the side, query or passage"
    ) from error
  identifier = LanguageIdentifier.from_model_file(MODEL_FILE)

  def score(text: str) -> float:
    ranked = identifier.rank(text)
    return float(dict(ranked)["en"] - ranked[0][1])

  return score
