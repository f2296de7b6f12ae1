#!/usr/bin/env bash
# The `max_length` of model2vec counts tokens, but a text is first cut by characters.
#
# Guess: `StaticModel.encode(texts, max_length=512)` averages the vectors of the first 512 tokens of
# a text in any language, as it is documented to be "in tokens".
#
# Seen (model2vec 0.10.0): the text is first cut to `max_length` times the median length of the
# strings in the vocabulary, counted in characters and with its spaces. Where 60 % of the vocabulary
# are single Chinese characters, the median is 1. A Chinese text of 600 tokens then keeps its 512,
# and an English text of 400 tokens, which all fit, keeps 53. Its vector has a cosine of 0.74 to
# that of the whole text. With fewer Chinese characters and the same rows for the English words, all
# 400 are kept. Nothing is said.
#
# Why it matters: adding a script to a multilingual token table, or cutting the table to some
# languages, changes the vectors of long texts in all others, although the rows of their tokens stay
# the same. A comparison of languages at one `max_length` compares different amounts of text.
#
# What to do: pass `max_length=None`, and cut texts by their own tokens where that is needed.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet model2vec==0.10.0 tokenizers==0.23.3 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import sys
from importlib.metadata import version

import numpy as np
from model2vec import StaticModel
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

STEMS = "work light water house mount river stone forest".split()
ENDINGS = "ing shop side land man way field ward".split()
WORDS = [stem + ending for stem in STEMS for ending in ENDINGS]
CHARACTERS = [chr(0x4E00 + i) for i in range(96)]
TABLE = np.random.default_rng(0).normal(size=(1 + 64 + 96, 64)).astype(np.float32)


def static_model(number_of_characters):
  tokens = ["[UNK]", *WORDS, *CHARACTERS[:number_of_characters]]
  tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, "[UNK]"))
  tokenizer.normalizer = normalizers.BertNormalizer()
  tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
  return StaticModel(TABLE[: len(tokens)], tokenizer)


def tokens_kept(model, text, max_length):
  return len(model.encode_as_sequence([text], max_length=max_length)[0])


english = " ".join(np.random.default_rng(1).choice(WORDS, 400))
chinese = "".join(np.random.default_rng(1).choice(CHARACTERS[:32], 600))
print("model2vec", version("model2vec"), "- guess: (400, 512) English and Chinese tokens are kept")
seen = {}
for characters in (96, 32):
  model = static_model(characters)
  assert (tokens_kept(model, english, None), tokens_kept(model, chinese, None)) == (400, 600)
  seen[characters] = (tokens_kept(model, english, 512), tokens_kept(model, chinese, 512))
  short, whole = model.encode(english, max_length=512), model.encode(english, max_length=None)
  cosine = short @ whole / np.linalg.norm(short) / np.linalg.norm(whole)
  print(f"seen with 64 words and {characters} characters: {seen[characters]} are kept,")
  print(f"  and the English vector has a cosine of {cosine:.2f} to that of the whole text")
if seen != {96: (53, 512), 32: (400, 512)}:
  sys.exit("The number of tokens that model2vec keeps has changed.")
PYTHON
