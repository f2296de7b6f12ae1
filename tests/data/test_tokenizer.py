"""Every text ends with the pooled token, once, wherever it is cut."""

import json

import pytest
import tokenizers

from mlembed_jax.data.tokenizer import Tokenizer, Vocabulary, told, with_instruction
from mlembed_jax.errors import DataError
from tests.material import train_tokenizer


@pytest.fixture
def path(data):
  return data / "tokenizer.json"


def test_truncation_keeps_the_first_tokens_and_ends_with_the_pooled_one(path):
  tokenizer = Tokenizer(path, "<|endoftext|>")
  full = tokenizer.encode(["one two three four five"], 100)[0]
  assert full[-1] == tokenizer.pooled_id and tokenizer.pooled_id not in full[:-1]
  for size in range(1, len(full) + 2):
    cut = tokenizer.encode(["one two three four five"], size)[0]
    assert cut == [*full[:-1][: size - 1], tokenizer.pooled_id]


def test_truncation_worked_example(tmp_path):
  """max_len 6, end 99: [1..5, 99] stays, [1..9, 99] becomes [1, 2, 3, 4, 5, 99]."""
  ids = {str(i): i for i in range(1, 10)} | {"[END]": 99}
  made = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token="1"))
  made.pre_tokenizer = tokenizers.pre_tokenizers.Digits(individual_digits=True)
  made.save(str(tmp_path / "tokenizer.json"))
  tokenizer = Tokenizer(tmp_path / "tokenizer.json", "[END]")
  assert tokenizer.encode(["12345", "123456789"], 6) == [[1, 2, 3, 4, 5, 99]] * 2


def test_a_text_may_hold_the_pooled_token(path):
  tokenizer = Tokenizer(path, "<|endoftext|>")
  ids = tokenizer.encode(["one <|endoftext|> two"], 100)[0]
  assert ids.count(tokenizer.pooled_id) == 2 and ids[-1] == tokenizer.pooled_id


def test_settings_inside_the_file_do_not_act(path, tmp_path):
  other = train_tokenizer(600)
  other.enable_truncation(2)
  other.enable_padding()
  other.save(str(tmp_path / "tokenizer.json"))
  texts = ["one two three four", "one"]
  plain, strange = (
    Tokenizer(p, "<|im_end|>").encode(texts, 50) for p in (path, tmp_path / "tokenizer.json")
  )
  assert plain == strange


def test_size_holds_every_token(path):
  tokenizer = Tokenizer(path, "<|im_end|>")
  stored = json.loads(path.read_text(encoding="utf-8"))["model"]["vocab"]
  assert tokenizer.size == max(stored.values()) + 1 == len(stored)


def test_missing_unreadable_and_unfitting_files(path, tmp_path):
  with pytest.raises(DataError, match=r"absent.json does not exist; a folder without one"):
    Tokenizer(tmp_path / "absent.json", "x")
  (tmp_path / "bad.json").write_text("[]")
  with pytest.raises(DataError, match=r"bad.json is not a tokenizer.json"):
    Tokenizer(tmp_path / "bad.json", "x")
  with pytest.raises(DataError, match=r"pooled_token: .* has no token '<\|end\|>'"):
    Tokenizer(path, "<|end|>")


def test_instruction():
  assert with_instruction("Do.", "text") == "Instruct: Do.\nQuery: text"
  assert with_instruction("", "text") == "text"


def test_a_word_without_a_token_is_told_with_the_file(tmp_path):
  model = tokenizers.models.WordLevel({"one": 0, "two": 1}, unk_token="[UNK]")
  tokenizers.Tokenizer(model).save(str(tmp_path / "tokenizer.json"))
  vocabulary = Vocabulary(tmp_path / "tokenizer.json")
  assert vocabulary.ids(["one"]) == [[0]]
  with pytest.raises(DataError, match=r"tokenizer.json cannot read a text: .*UNK"):
    vocabulary.ids(["three"])


def test_a_panic_is_told_and_an_interrupt_is_not(path):
  panic = type("PanicException", (BaseException,), {})  # as pyo3 makes it, beside Exception
  with pytest.raises(DataError, match=r"tokenizer.json is odd: no entry"), told(path, "is odd"):
    raise panic("no entry")
  with pytest.raises(KeyboardInterrupt), told(path, "is odd"):
    raise KeyboardInterrupt
