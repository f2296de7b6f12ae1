"""Texts to token ids that always end with the pooled token."""

import hashlib
import pathlib
from collections.abc import Sequence

import tokenizers

INSTRUCTION = "Instruct: {instruction}\nQuery: {text}"


class DataError(ValueError):
  """Data that cannot be used; the message names the file and what to do."""


def with_instruction(instruction: str, text: str) -> str:
  """Returns the query as the model reads it; the text itself where there is no instruction."""
  return INSTRUCTION.format(instruction=instruction, text=text) if instruction else text


class Tokenizer:
  """A `tokenizer.json` and the token whose state is the embedding."""

  def __init__(self, path: str | pathlib.Path, pooled_token: str):
    """Reads the file.

    Raises:
      DataError: the file is missing or unreadable, or does not know the pooled token.
    """
    self.path = pathlib.Path(path)
    if not self.path.is_file():
      raise DataError(f"data.tokenizer: {path} does not exist; give the path of a tokenizer.json")
    try:
      self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
      raise DataError(f"data.tokenizer: {path} is not a tokenizer.json: {error}") from error
    # Truncation and padding are ours; a file may carry settings of its own.
    self._tokenizer.no_truncation()
    self._tokenizer.no_padding()
    pooled_id = self._tokenizer.token_to_id(pooled_token)
    if pooled_id is None:
      raise DataError(f"data.pooled_token: {path} has no token {pooled_token!r}")
    self.pooled_token = pooled_token
    self.pooled_id: int = pooled_id

  @property
  def size(self) -> int:
    """One more than the largest id, i.e. the smallest table that holds every token."""
    return max(self.vocabulary.values()) + 1

  @property
  def vocabulary(self) -> dict[str, int]:
    """Id of every token."""
    return self._tokenizer.get_vocab(with_added_tokens=True)

  @property
  def fingerprint(self) -> str:
    """Hash of the file and the pooled token."""
    return hashlib.sha256(self.path.read_bytes() + self.pooled_token.encode()).hexdigest()

  def encode(self, texts: Sequence[str], max_length: int) -> list[list[int]]:
    """Returns the ids of each text: its first `max_length` - 1 tokens, then the pooled token."""
    encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
    return [[*e.ids[: max_length - 1], self.pooled_id] for e in encodings]
