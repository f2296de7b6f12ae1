"""Exports that keep the tokens of some texts alone."""

import pathlib

import numpy as np
import pytest
import transformers

from mlembed_jax.data import token_use, vocabulary
from mlembed_jax.data.tokenizer import Vocabulary
from mlembed_jax.errors import DataError
from mlembed_jax.hf import own_file
from mlembed_jax.hf.config_files import Forms, prompts
from mlembed_jax.hf.export import TrainedModel, export_folder
from mlembed_jax.hf.trim import protected_ids, trim
from mlembed_jax.inference import Encoder
from mlembed_jax.matryoshka import Slice
from tests.hf.exports import Trained, load_st, read
from tests.material import sentences

KEPT = [*sentences("de"), *sentences("en")]
CUTS = {
  "all": (Slice(), Forms()),
  "cut": (Slice(depth=2, dim=16, rank=16), Forms()),
  "factors": (Slice(dim=16, rank=16), Forms(factors=True)),
  "onnx": (Slice(dim=16), Forms(onnx="float32")),
}


@pytest.fixture(scope="module")
def small(factorised: Trained, tmp_path_factory: pytest.TempPathFactory) -> TrainedModel:
  run, params, tokenizer = factorised.run, factorised.params, factorised.tokenizer
  use = token_use.of_texts(tokenizer, KEPT)
  folder = tmp_path_factory.mktemp("small")
  return trim(TrainedModel(run, 20, params, tokenizer), use, ("de", "en"), None, folder)


def test_tokens_are_fewer_and_those_of_kept_texts_the_same(
  small: TrainedModel, factorised: Trained
):
  before, after = factorised.tokenizer, small.tokenizer
  assert small.trimmed and small.trimmed.tokens < before.size - 100
  assert small.trimmed.changed_share == 0.0
  assert small.run.config.model.vocab == len(small.params["table"]) < 640
  names = {number: name for name, number in before.vocabulary.items()}
  new_names = {number: name for name, number in after.vocabulary.items()}
  for old, new in zip(before.encode(KEPT, 99), after.encode(KEPT, 99), strict=True):
    assert [names[one] for one in old] == [new_names[one] for one in new]
    rows = factorised.params["table"][np.array(old)]
    np.testing.assert_array_equal(small.params["table"][np.array(new)], rows)


@pytest.mark.parametrize("name", CUTS)
def test_kept_texts_have_the_same_vectors_everywhere(
  small: TrainedModel, factorised: Trained, name: str, tmp_path: pathlib.Path
):
  cut, forms = CUTS[name]
  folder = export_folder(tmp_path / "out", small, cut, forms=forms)
  texts = KEPT[::10]
  expected = factorised.vectors(texts, cut, "")
  np.testing.assert_allclose(Encoder.load(folder).encode(texts), expected, atol=1e-5)
  model = load_st(folder, remote=forms.factors)
  np.testing.assert_allclose(model.encode(texts), expected, atol=1e-5)
  others = ["สวัสดีชาวโลก", "👩‍👩‍👧‍👦", *sentences("zh")]
  np.testing.assert_allclose(Encoder.load(folder).encode(others), model.encode(others), atol=1e-5)
  loaded = transformers.AutoTokenizer.from_pretrained(folder)
  assert loaded(texts)["input_ids"] == small.tokenizer.encode(texts, 128)
  assert read(folder / "config.json")["vocab_size"] == small.run.config.model.vocab


def test_the_folder_says_what_was_kept(small: TrainedModel, tmp_path: pathlib.Path):
  folder = export_folder(tmp_path / "out", small, Slice(depth=2))
  own = own_file.read(folder)
  assert own and own.vocabulary == small.trimmed
  card = (folder / "README.md").read_text()
  assert f"| Vocabulary | {small.trimmed.tokens} tokens, those that the texts of de, en " in card


def test_fewer_tokens_change_a_share_of_the_texts(factorised: Trained, tmp_path: pathlib.Path):
  run, params, tokenizer = factorised.run, factorised.params, factorised.tokenizer
  use, model = token_use.of_texts(tokenizer, KEPT), TrainedModel(run, 20, params, tokenizer)
  few = trim(model, use, (), 340, tmp_path)
  assert few.trimmed and few.trimmed.tokens <= 340
  now = Vocabulary(tmp_path / "tokenizer.json").ids(KEPT)
  more = [len(new) > len(old) for new, old in zip(now, tokenizer.ids(KEPT), strict=True)]
  assert few.trimmed.changed_share == pytest.approx(np.mean(more)) and 0 < np.mean(more) < 1
  with pytest.raises(DataError, match=r"tokenizer.json: 200 tokens are fewer than the 258"):
    trim(model, use, (), 200, tmp_path)


def test_prompts_and_instructions_stay_whole(factorised: Trained, tmp_path: pathlib.Path):
  run, params, tokenizer = factorised.run, factorised.params, factorised.tokenizer
  use = token_use.of_texts(tokenizer, sentences("zh")[:3])
  small = trim(TrainedModel(run, 20, params, tokenizer), use, (), None, tmp_path)
  texts = [text for text in prompts(run.datasets).values() if text]
  assert len(texts) > 5
  for old, new in zip(tokenizer.ids(texts), small.tokenizer.ids(texts), strict=True):
    assert len(old) == len(new)
  protected = protected_ids(tokenizer, run.datasets, texts)
  least = len(vocabulary.kept_ids(tokenizer.spec, 0 * use.counts, protected))
  with pytest.raises(DataError, match="that every text, the instructions and"):
    trim(TrainedModel(run, 20, params, tokenizer), use, (), least - 1, tmp_path)
