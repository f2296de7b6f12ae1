"""Texts to token ids that always end with the pooled token."""

import hashlib
import pathlib
from collections.abc import Sequence

import tokenizers

from mlembed_jax.errors import DataError

# A query is PREFIX + QUERY. A line break ends a token for every tokenizer that we accept, so the
# ids of the two parts, one after the other, are those of the whole.
PREFIX = "Instruct: {instruction}\n"
QUERY = "Query: {text}"


def with_instruction(instruction: str, text: str) -> str:
  """Returns the query as the model reads it; the text itself where there is no instruction."""
  return PREFIX.format(instruction=instruction) + QUERY.format(text=text) if instruction else text


class Tokenizer:
  """A `tokenizer.json` and the token whose state is the embedding."""

  def __init__(self, path: str | pathlib.Path, pooled_token: str):
    """Reads the file.

    Raises:
      DataError: the file is missing or unreadable, or does not know the pooled token.
    """
    self.path = pathlib.Path(path)
    if not self.path.is_file():
      raise DataError(f"{path} does not exist; give the path of a tokenizer.json")
    try:
      self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
      raise DataError(f"{path} is not a tokenizer.json: {error}") from error
    # Truncation and padding are ours; a file may carry settings of its own.
    self._tokenizer.no_truncation()
    self._tokenizer.no_padding()
    pooled_id = self._tokenizer.token_to_id(pooled_token)
    if pooled_id is None:
      raise DataError(f"pooled_token: {path} has no token {pooled_token!r}")
    self.pooled_token = pooled_token
    self.pooled_id: int = pooled_id

  @property
  def size(self) -> int:
    """Rows of the smallest token table that holds every token: the largest id plus one."""
    return max(self.vocabulary.values()) + 1

  @property
  def vocabulary(self) -> dict[str, int]:
    """Id of every token."""
    return self._tokenizer.get_vocab(with_added_tokens=True)

  @property
  def fingerprint(self) -> str:
    """Hash of the file."""
    return hashlib.sha256(self.path.read_bytes()).hexdigest()

  def ids(self, texts: Sequence[str]) -> list[list[int]]:
    """Returns the ids of each whole text; no token is added."""
    return [e.ids for e in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]

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
