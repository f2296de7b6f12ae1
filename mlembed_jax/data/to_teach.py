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

  sources: Int[np.ndarray, "T"]  # a document's place, or a row's after all documents
  prompts: Int[np.ndarray, "T"]  # number of what stands before it, in `before`
  before: list[str]
  documents: Int[np.ndarray, "N"]  # NONE: no taught file needs it
  queries: Int[np.ndarray, "R"]
  known: dict[str, int]  # texts of a row that get a vector, the first ones, by file


@dataclasses.dataclass(frozen=True)
class _Rows:
  """What the rows say, before equal texts are found."""

  hashes: np.ndarray  # [R] uint64
  prompts: np.ndarray  # [R]
  as_document: np.ndarray  # [R] the document whose vector a query gets; NONE: its own
  needed: np.ndarray  # [N] bool: documents that are embedded themselves
  as_query: np.ndarray  # [N] the row whose query's vector a document gets; NONE: its own or none


class Texts:
  """The texts of a dataset, read back from their token ids."""

  def __init__(self, catalog: Catalog):
    """Opens the dataset's records and tokenizer."""
    self._vocabulary = Vocabulary(catalog.tokenizer)
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


def plan(catalog: Catalog, files: Sequence[File], prompts: Prompts, align: str) -> ToTeach:
  """Returns what is to be embedded of the training rows of some files.

  Args:
    catalog: of the prepared dataset.
    files: whose rows are taught.
    prompts: what stands before texts.
    align: QUERY, PASSAGE or ENGLISH: both texts of a translation get the vector of this one, and
      negatives of such files get none; "": each text gets its own.

  Raises:
    DataError: a record cannot be read, or the language of texts cannot be told.
  """
  texts = Texts(catalog)
  before = list(dict.fromkeys([prompts.documents, *(prompts.queries[f.name] for f in files)]))
  numbers = {f.name: before.index(prompts.queries[f.name]) for f in files}
  found = _rows(catalog, texts, numbers, align)
  places = np.flatnonzero(found.needed)
  own = np.flatnonzero((found.as_document == NONE) & (found.prompts != NONE))
  keys = np.zeros(places.size + own.size, [("hash", np.uint64), ("prompt", np.int64)])
  keys["hash"] = np.concatenate([_hashes(texts, places), found.hashes[own]])
  keys["prompt"][places.size :] = found.prompts[own]  # those of documents have number 0
  distinct, first, number = np.unique(keys, return_index=True, return_inverse=True)
  documents, queries = (np.full(n, NONE) for n in (found.needed.size, found.hashes.size))
  documents[places], queries[own] = np.split(number, [places.size])
  aligned = found.as_document != NONE
  queries[aligned] = documents[found.as_document[aligned]]
  aligned = (found.as_query != NONE) & ~found.needed
  documents[aligned] = queries[found.as_query[aligned]]
  return ToTeach(
    sources=np.concatenate([places, found.needed.size + own])[first],
    prompts=distinct["prompt"],
    before=before,
    documents=documents,
    queries=queries,
    known={f.name: _known(f, align) for f in files},
  )


def _known(file: File, align: str) -> int:
  aligned = align and file.entry["task_type"] == BITEXT
  return 1 + file.positives + (0 if aligned else file.negatives)


def _hashes(texts: Texts, places: np.ndarray) -> np.ndarray:
  with progress.count("reading documents", len(places), " texts") as bar:
    found = [(_hash(texts.document(int(place))), bar.update())[0] for place in places]
  return np.array(found, np.uint64)


def _hash(text: Text) -> np.uint64:
  return np.ascontiguousarray(text.hash).view(np.uint64)[0]


def _rows(catalog: Catalog, texts: Texts, numbers: dict[str, int], align: str) -> _Rows:
  rows, documents = len(texts.rows), len(texts.documents)
  found = _Rows(
    hashes=np.zeros(rows, np.uint64),
    prompts=np.full(rows, NONE),
    as_document=np.full(rows, NONE),
    needed=np.zeros(documents, bool),
    as_query=np.full(documents, NONE),
  )
  side = _side(texts, align) if align else None
  places = list(_places(catalog, numbers))
  with progress.count("reading rows", len(places), " rows") as bar:
    for place in places:
      text, row = texts.row(place)
      found.hashes[place], found.prompts[place] = _hash(text), numbers[row.dataset]
      if side is None or catalog.files[row.dataset].entry["task_type"] != BITEXT:
        found.needed[row.positives], found.needed[row.negatives] = True, True
      elif side(text, row) == QUERY:
        found.as_query[row.positives] = place
      else:
        found.as_document[place], found.needed[row.positives] = row.positives[0], True
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
