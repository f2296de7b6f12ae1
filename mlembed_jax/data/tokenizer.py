"""Texts to token ids: those of training end with the pooled token, those of a folder as it says."""

import contextlib
import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import tokenizers
from tokenizers import normalizers

from mlembed_jax.errors import DataError
from mlembed_jax.files import digest

# A query is PREFIX + QUERY. A line break ends a token for every tokenizer that we accept, so the
# ids of the two parts, one after the other, are those of the whole.
PREFIX = "Instruct: {instruction}\n"
QUERY = "Query: {text}"


def with_instruction(instruction: str, text: str) -> str:
  """Returns the query as the model reads it; the text itself where there is no instruction."""
  return PREFIX.format(instruction=instruction) + QUERY.format(text=text) if instruction else text


@contextlib.contextmanager
def told(path: pathlib.Path, what: str) -> Iterator[None]:
  """Turns what the tokenizers library raises, bare Exception and panics, into a DataError."""
  try:
    yield
  except BaseException as error:  # a panic of Rust code is no Exception
    if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
      raise
    raise DataError(f"{path} {what}: {error}") from error


class Vocabulary:
  """A `tokenizer.json`; it cuts, pads and adds nothing."""

  def __init__(self, path: str | pathlib.Path):
    """Reads the file.

    Raises:
      DataError: the file is missing or unreadable.
    """
    self.path = pathlib.Path(path)
    if not self.path.is_file():
      raise DataError(
        f"{path} does not exist; a folder without one gets it by save_pretrained of its fast "
        "tokenizer in transformers"
      )
    with told(self.path, "is not a tokenizer.json"):
      self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
    # Truncation and padding are ours; a file may carry settings of its own.
    self.cut_side = (self._tokenizer.truncation or {}).get("direction")
    self._tokenizer.no_truncation()
    self._tokenizer.no_padding()

  @property
  def size(self) -> int:
    """Rows of the smallest token table that holds every token: the largest id plus one."""
    return max(self.vocabulary.values()) + 1

  @property
  def vocabulary(self) -> dict[str, int]:
    """Id of every token."""
    return self._tokenizer.get_vocab(with_added_tokens=True)

  @property
  def spec(self) -> dict[str, Any]:
    """The content of the file as the library understands it, without truncation and padding."""
    return json.loads(self._tokenizer.to_str())

  @property
  def fingerprint(self) -> str:
    """Hash of the file."""
    return digest(self.path)

  def id(self, token: str) -> int:
    """Returns the id of a token; raises DataError where there is none."""
    found = self._tokenizer.token_to_id(token)
    if found is None:
      raise DataError(f"pooled_token: {self.path} has no token {token!r}")
    return found

  def ids(self, texts: Sequence[str]) -> list[list[int]]:
    """Returns the ids of each whole text; no token is added.

    Raises:
      DataError: the tokenizer cannot read a text, such as one with a word that it has no token for.
    """
    with told(self.path, "cannot read a text"):
      found = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
    return [encoding.ids for encoding in found]

  def texts(self, ids: Sequence[Sequence[int]]) -> list[str]:
    """Returns the texts of token ids, as the tokenizer's normaliser left them.

    Raises:
      DataError: the tokenizer does not say how tokens become text.
    """
    if self._tokenizer.decoder is None:
      raise DataError(f"{self.path}: has no decoder, so texts cannot be read back from their ids")
    return self._tokenizer.decode_batch(list(map(list, ids)), skip_special_tokens=False)


class Tokenizer(Vocabulary):
  """A `tokenizer.json` and the token whose state is the embedding."""

  def __init__(self, path: str | pathlib.Path, pooled_token: str):
    """Reads the file.

    Raises:
      DataError: the file is missing or unreadable, or does not know the pooled token.
    """
    super().__init__(path)
    self.pooled_token = pooled_token
    self.pooled_id = self.id(pooled_token)

  @property
  def pooled_is_added(self) -> bool:
    """Returns whether the pooled token is an added one, which splits no text but by its name."""
    return self.pooled_id in self._tokenizer.get_added_tokens_decoder()

  def prefix(self, instruction: str) -> list[int]:
    """Returns the ids that stand before those of `Query: ...`.

    Raises:
      DataError: the tokenizer reads across the line break between the two.
    """
    prefix, query = PREFIX.format(instruction=instruction), QUERY.format(text="a")
    first, second, whole = self.ids([prefix, query, prefix + query])
    if first + second != whole:
      raise DataError(
        f"{self.path}: joins the end of an instruction with the query of the next line; give a "
        "tokenizer that splits at line breaks, such as Qwen's"
      )
    return first

  def encode(self, texts: Sequence[str], max_length: int) -> list[list[int]]:
    """Returns the ids of each text: its first `max_length` - 1 tokens, then the pooled token."""
    return [[*ids[: max_length - 1], self.pooled_id] for ids in self.ids(texts)]


class TemplateTokenizer(Vocabulary):
  """A `tokenizer.json` and the ids that its post-processor puts before and after every text."""

  def __init__(self, path: str | pathlib.Path, pooled_token: str | None = None):
    """Reads the file; a `pooled_token` stands in place of what it puts after a text.

    Raises:
      DataError: the file is missing or unreadable, gives no token to a text, or does not know the
        pooled token.
    """
    super().__init__(path)
    with told(self.path, "cannot read the text 'a'"):
      whole = self._tokenizer.encode("a")
    # Ids that the post-processor added belong to no sequence.
    inside = [i for i, sequence in enumerate(whole.sequence_ids) if sequence is not None]
    if not inside:
      raise DataError(f"{path} gives no token to the text 'a'; take another tokenizer.json")
    self.before = whole.ids[: inside[0]]
    self.after = whole.ids[inside[-1] + 1 :]
    if pooled_token is not None:
      self.after = [self.id(pooled_token)]

  @property
  def end(self) -> str | None:
    """Returns the token that ends every text, None where nothing is put after a text."""
    return self._tokenizer.id_to_token(self.after[-1]) if self.after else None

  def lower_case(self) -> None:
    """Makes every text lower case before it is read, but for special tokens in it."""
    found, lower = self._tokenizer.normalizer, normalizers.Lowercase()
    # The library declares the attribute as one that cannot be set.
    both: Any = normalizers.Sequence([lower, found]) if found else lower
    self._tokenizer.normalizer = both

  def encode(self, texts: Sequence[str], max_length: int) -> list[list[int]]:
    """Returns the ids of each text with what stands before and after it, `max_length` at most."""
    kept = max(0, max_length - len(self.before) - len(self.after))
    return [[*self.before, *ids[:kept], *self.after] for ids in self.ids(texts)]
