"""Tokenizers with fewer tokens: texts of the kept ones stay as they are, all others still work."""

import json

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from mlembed_jax.data import token_use, vocabulary
from mlembed_jax.data.tokenizer import Vocabulary
from mlembed_jax.errors import DataError
from tests.material import WORDS, sentences, train_tokenizer

LANGUAGES = tuple(WORDS)
KEPT = LANGUAGES[:2]
OTHERS = [
  "สวัสดีชาวโลก",
  "გამარჯობა",
  "👩‍👩‍👧‍👦 🏳️‍🌈",
  "\x00\x7f\ufffd",
  "ሰላም",
  "def f(x):\n\treturn x",
]


def texts_of(languages):
  return [text for language in languages for text in sentences(language)]


def bpe(**changes):
  """A byte-level BPE of all languages; `changes` of its model."""
  spec = json.loads(train_tokenizer(900).to_str())
  return {**spec, "model": {**spec["model"], **changes}}


def unigram(byte_fallback=False):
  """A Unigram of all languages, as sentencepiece makes them."""
  tokenizer = tokenizers.Tokenizer(models.Unigram())
  tokenizer.normalizer = normalizers.NFKC()
  tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
  tokenizer.decoder = decoders.Metaspace()
  ends = ["<s>", "</s>", "<unk>"]
  trainer = trainers.UnigramTrainer(
    vocab_size=400, special_tokens=ends, unk_token="<unk>", show_progress=False
  )
  tokenizer.train_from_iterator(texts_of(LANGUAGES), trainer)
  spec = json.loads(tokenizer.to_str())
  if byte_fallback:
    spec["model"]["byte_fallback"] = True
    spec["model"]["vocab"] += [[f"<0x{byte:02X}>", -20.0] for byte in range(256)]
  return spec


def loaded(spec):
  return tokenizers.Tokenizer.from_str(json.dumps(spec))


def counts_of(spec, texts):
  tokenizer = loaded(spec)
  counts = np.zeros(tokenizer.get_vocab_size(), np.int64)
  for encoding in tokenizer.encode_batch(texts):
    np.add.at(counts, encoding.ids, 1)
  return counts


def cut(spec, texts, most=None):
  ids = vocabulary.kept_ids(spec, counts_of(spec, texts), most=most)
  return ids, loaded(vocabulary.trimmed(spec, ids))


SPECS = {
  "bpe": bpe,
  "bpe that takes whole words": lambda: bpe(ignore_merges=True),
  "unigram": unigram,
  "unigram with bytes": lambda: unigram(byte_fallback=True),
}


@pytest.mark.parametrize("name", SPECS)
def test_texts_of_kept_tokens_have_the_same_pieces(name):
  spec = SPECS[name]()
  ids, after = cut(spec, texts_of(KEPT))
  before = loaded(spec)
  assert len(ids) < 0.9 * before.get_vocab_size() and after.get_vocab_size() == len(ids)
  for text in texts_of(KEPT):
    old, new = before.encode(text), after.encode(text)
    assert new.tokens == old.tokens and ids[new.ids].tolist() == old.ids, text


@pytest.mark.parametrize("name", SPECS)
def test_other_texts_still_work(name):
  spec = SPECS[name]()
  _, after = cut(spec, texts_of(KEPT))
  texts = [*OTHERS, *texts_of(LANGUAGES[2:])]
  found = after.encode_batch(texts)
  assert all(encoding.ids for encoding in found)
  if name.startswith("bpe"):
    assert [after.decode(encoding.ids) for encoding in found] == texts
    changed = [a.tokens != loaded(spec).encode(t).tokens for a, t in zip(found, texts, strict=True)]
    assert any(changed)


def test_all_tokens_on_the_way_to_a_piece_are_kept():
  """abcd comes about as ab + cd, and its bytes are kept in any case."""
  letters = {letter: place for place, letter in enumerate(sorted(vocabulary.BYTES))}
  pieces = ["ab", "bc", "cd", "abcd", "xy"]
  vocab = letters | {piece: len(letters) + place for place, piece in enumerate(pieces)}
  merges = [["a", "b"], ["b", "c"], ["c", "d"], ["ab", "cd"], ["x", "y"]]
  spec = bpe(vocab=vocab, merges=merges) | {"added_tokens": []}
  counts = np.zeros(len(vocab), np.int64)
  counts[vocab["abcd"]] = 1
  ids = vocabulary.kept_ids(spec, counts)
  assert ids.tolist() == [*range(256), *(vocab[p] for p in ("ab", "cd", "abcd"))]
  assert vocabulary.trimmed(spec, ids)["model"]["merges"] == [merges[i] for i in (0, 2, 3)]


def test_the_rarest_tokens_are_left_out_first():
  spec = bpe()
  counts = counts_of(spec, texts_of(KEPT))
  whole = vocabulary.kept_ids(spec, counts)
  few = vocabulary.kept_ids(spec, counts, most=len(whole) - 20)
  assert len(whole) - 24 <= len(few) <= len(whole) - 20 and {*few} < {*whole}
  dropped = sorted({*whole} - {*few})
  assert counts[dropped].max() <= np.sort(counts[whole][counts[whole] > 0])[40]
  with pytest.raises(DataError, match="257 tokens are fewer than the 258 that every text needs"):
    vocabulary.kept_ids(spec, counts, most=257)


def test_what_stands_beside_a_text_is_kept_and_renumbered():
  spec = json.loads(train_tokenizer(600).to_str())
  vocab = spec["model"]["vocab"]
  end = {"id": "<|im_end|>", "ids": [1], "tokens": ["<|im_end|>"]}
  pieces = [
    {"Sequence": {"id": "A", "type_id": 0}},
    {"SpecialToken": {"id": "<|im_end|>", "type_id": 0}},
  ]
  template = {"type": "TemplateProcessing", "single": pieces, "pair": pieces}
  template |= {"special_tokens": {"<|im_end|>": end}}
  for processor in (template, {"type": "Sequence", "processors": [template]}):
    spec["post_processor"] = processor
    ids, after = cut(spec, ["a"])
    assert after.encode("a").tokens == ["a", "<|im_end|>"]
  roberta = processors.RobertaProcessing(("<|im_end|>", 1), ("<|endoftext|>", 0))
  spec["post_processor"] = json.loads(roberta.__getstate__())
  spec["added_tokens"] = []  # kept although nothing else names them
  ids, after = cut(spec, ["a"])
  assert {0, 1, vocab["a"]} <= {*ids.tolist()}
  assert after.encode("a").tokens == ["<|endoftext|>", "a", "<|im_end|>"]


def test_the_table_has_the_rows_of_the_ids_and_zeros():
  table = np.arange(600 * 3, dtype=np.float32).reshape(600, 3)
  ids = np.array([0, 5, *range(100, 250)])
  rows = vocabulary.table_rows(table, ids, vocabulary.padded_rows(len(ids)))
  assert rows.shape == (256, 3) and rows.dtype == np.float32
  np.testing.assert_array_equal(rows[: len(ids)], table[ids])
  assert not rows[len(ids) :].any()
  new = vocabulary.new_ids(ids, 600)
  assert new[ids].tolist() == list(range(len(ids))) and new[1] == -1


def test_added_tokens_in_the_vocabulary_need_no_bytes(tmp_path):
  spec = json.loads(train_tokenizer(600).to_str())
  size = len(spec["model"]["vocab"])
  names = {"  ": size, "‹｜User｜›": size + 1}  # as files of DeepSeek have them
  spec["model"]["vocab"] |= names
  flags = dict.fromkeys(("special", "normalized", "single_word", "lstrip", "rstrip"), False)
  spec["added_tokens"] += [flags | {"id": names[name], "content": name} for name in names]
  spec["padding"] = {"strategy": "BatchLongest", "direction": "Left", "pad_to_multiple_of": None}
  spec["padding"] |= {"pad_id": 1, "pad_type_id": 0, "pad_token": "<|im_end|>"}
  (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
  whole, before = Vocabulary(tmp_path / "tokenizer.json"), loaded(spec)
  texts = ["a  b", "‹｜User｜› die Sonne"]
  ids = vocabulary.kept_ids(whole.spec, token_use.of_texts(whole, texts).counts)
  after = loaded(vocabulary.trimmed(whole.spec, ids))
  assert after.padding is None
  for text in texts:
    assert after.encode(text).tokens == before.encode(text).tokens


def test_a_file_without_a_type_or_of_other_ids_is_as_the_library_reads_it(tmp_path):
  spec = json.loads(train_tokenizer(600).to_str())
  del spec["model"]["type"]
  spec["added_tokens"][0]["id"] = 580  # the vocabulary says 0
  (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
  whole = Vocabulary(tmp_path / "tokenizer.json")
  use = token_use.of_texts(whole, texts_of(KEPT))
  ids = vocabulary.kept_ids(whole.spec, use.counts)
  assert 0 in ids and use.changed(ids) == 0


def test_the_sample_is_of_all_texts(monkeypatch, tmp_path):
  monkeypatch.setattr(token_use, "SAMPLE", 50)
  train_tokenizer(900).save(str(tmp_path / "tokenizer.json"))
  whole = Vocabulary(tmp_path / "tokenizer.json")
  texts = [*sentences("de"), *sentences("zh")]  # sorted by language
  use = token_use.of_texts(whole, texts)
  assert 50 <= len(use.sample) < 100 and use.texts == len(texts)
  german = token_use.of_texts(whole, sentences("de"))
  share = len(sentences("zh")) / len(texts)
  ids = vocabulary.kept_ids(whole.spec, german.counts)
  assert use.changed(ids) == pytest.approx(share, abs=0.1)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"model": {"type": "WordPiece"}}, "type WordPiece; byte-level BPE and Unigram can be cut"),
    ({"pre_tokenizer": {"type": "Whitespace"}}, "whose letters are no bytes"),
    ({"pre_tokenizer": None}, "whose letters are no bytes"),
    ({"model": {**bpe()["model"], "end_of_word_suffix": "</w>"}}, "end_of_word_suffix cannot"),
  ],
)
def test_other_tokenizers_are_refused(change, message):
  with pytest.raises(DataError, match=message):
    vocabulary.kept_ids({**bpe(), **change}, np.ones(900, np.int64))
