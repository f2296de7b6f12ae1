"""Says what a trimmed vocabulary keeps: python -m tests.release.vocabulary BEFORE AFTER TEXTS ...

BEFORE and AFTER are two folders in Hugging Face layout, or two tokenizer.json. TEXTS is a parquet
file with `lang` and a column of texts. Of the languages that were kept, no text may have other
pieces, nor (of folders) another vector; texts in other languages must still be whole.
"""

import argparse
import pathlib
import sys

import numpy as np
import pyarrow.parquet as pq
import tokenizers

from mlembed_jax.inference import Encoder

KEPT, OTHERS = 1000, 5  # texts of the kept languages together, and of each other language
LEAST_COSINE = 0.99999


def opened(path: pathlib.Path) -> tokenizers.Tokenizer:
  """Returns the tokenizer of a folder or file."""
  return tokenizers.Tokenizer.from_file(str(path / "tokenizer.json" if path.is_dir() else path))


def other_pieces(
  before: tokenizers.Tokenizer, after: tokenizers.Tokenizer, texts: list[str]
) -> int:
  """Returns how many texts are split into other pieces, or by other ids than their new ones."""
  names = {number: name for name, number in after.get_vocab().items()}
  differ = 0
  for old, new in zip(before.encode_batch(texts), after.encode_batch(texts), strict=True):
    differ += old.tokens != new.tokens or new.tokens != [names[one] for one in new.ids]
  return differ


def least_cosine(before: pathlib.Path, after: pathlib.Path, texts: list[str]) -> float:
  """Returns the least cosine between the vectors of two folders, at the sizes of the second."""
  small, whole = Encoder.load(after), Encoder.load(before)
  sizes = {"depth": small.config().layers, "dim": small.dim}
  rank = small.sizes.ranks[-1] if small.sizes.ranks else None
  found = whole.encode(texts, rank=rank, **sizes), small.encode(texts)
  return float(np.min(np.sum(found[0] * found[1], axis=1)))


def lost(before: tokenizers.Tokenizer, after: tokenizers.Tokenizer, texts: list[str]) -> int:
  """Returns how many texts do not come back as the first tokenizer gives them back."""
  found = []
  for one in (before, after):
    encoded = one.encode_batch(texts, add_special_tokens=False)
    found.append([one.decode(e.ids, skip_special_tokens=False) for e in encoded])
  return sum(a != b for a, b in zip(*found, strict=True))


def texts_by_language(file: pathlib.Path, column: str) -> dict[str, list[str]]:
  """Returns the texts of a parquet file."""
  table, found = pq.read_table(file, columns=["lang", column]).to_pydict(), {}
  for lang, text in zip(table["lang"], table[column], strict=True):
    found.setdefault(lang, []).append(text)
  return found


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument("before", type=pathlib.Path)
  parser.add_argument("after", type=pathlib.Path)
  parser.add_argument("texts", type=pathlib.Path)
  parser.add_argument("--column", default="text")
  parser.add_argument("--languages", required=True, help="That were kept, separated by commas.")
  given = parser.parse_args()
  kept, by_language = given.languages.split(","), texts_by_language(given.texts, given.column)
  own = [text for lang in kept for text in by_language[lang][: -(-KEPT // len(kept))]][:KEPT]
  rest = [lang for lang in by_language if lang not in kept]
  others = [text for lang in rest for text in by_language[lang][:OTHERS]]
  both = opened(given.before), opened(given.after)
  differ, gone = other_pieces(*both, own), lost(*both, others)
  print("tokens: {:,} before, {:,} after".format(*(one.get_vocab_size() for one in both)))
  print(f"texts in {given.languages}: {len(own):,}, of which {differ} are split otherwise")
  print(f"texts in {len(rest)} other languages: {len(others):,}, of which {gone} are lost")
  cosine = 1.0
  if (given.before / "config.json").is_file():
    cosine = least_cosine(given.before, given.after, own)
    print(f"least cosine of the first: {cosine:.7f}")
  sys.exit(bool(differ or gone or cosine < LEAST_COSINE))


if __name__ == "__main__":
  main()
