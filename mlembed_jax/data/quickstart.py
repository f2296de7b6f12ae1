"""The quickstart's data: multilingual text that ordinary pip packages ship, ready to train on.

Training files have the columns of the public release; held-out files are what `eval.tasks` scores.
Bitext is split by its English side, so that what is held out is unseen in every language. Reads
installed packages only; knows nothing of models or the trainer, and never imports jax.
"""

import hashlib
import importlib.metadata
import importlib.resources
import itertools
import json
import pathlib
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from mlembed_jax.data import intent_templates
from mlembed_jax.data.intent_templates import ByLanguage
from mlembed_jax.data.names import MANIFEST, TOKENIZER
from mlembed_jax.data.quickstart_sources import (
  KINDS,
  Translations,
  fold,
  part,
  read_messages,
  read_names,
  read_utterances,
  seeded,
)
from mlembed_jax.data.tokenizer import with_instruction
from mlembed_jax.errors import DataError
from mlembed_jax.files import replace_folder

VERSION = 2  # raise it when the same packages would give other files
LICENCES = {
  "babel": "BSD-3-Clause, Unicode-3.0",
  "django": "BSD-3-Clause",
  "django-allauth": "MIT",
  "home-assistant-intents": "Apache-2.0",
}
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_end|>"]

HELDOUT_PAIRS = 100  # per language; languages with fewer are not scored
HELDOUT_LANGUAGES, HELDOUT_UTTERANCES = 29, 80  # English is one of them; per language
SUPPORT_UTTERANCES = 8  # per intent, English

BITEXT_NEGATIVES = 4
PARAPHRASE = 0.85  # English similarity above which a negative may be a true positive
NAMES_PER_LANGUAGE = 200  # makes `names` about as large as `messages`
NAMES_PER_KIND = 10  # and language, in `name_kinds`

# Instructions are short: most names are three tokens, and a small model must first learn to look
# past the instruction.
BITEXT = "bitext", "Translate."
INTENTS = "Find the intent."
NAME_KINDS = "Name the kind."
FILES = {  # task type, instruction, packages
  "train/messages.parquet": (*BITEXT, ["django", "django-allauth"]),
  "train/names.parquet": (*BITEXT, ["babel"]),
  "train/intents.parquet": ("clustering", INTENTS, ["home-assistant-intents"]),
  "train/name_kinds.parquet": ("classification", NAME_KINDS, ["babel"]),
  "heldout/bitext.parquet": (*BITEXT, ["django", "django-allauth", "babel"]),
  "heldout/intents.parquet": ("classification", INTENTS, ["home-assistant-intents"]),
}
# Qwen's, but marks stay with their letters: Indic words would else be cut at every vowel sign.
_PRETOKEN = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{M}\p{N}]?[\p{L}\p{M}]+|\p{N}"
  r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

Row = dict[str, str]
MARK = "fingerprint"  # names the file that says what the text was made of


def build(out: pathlib.Path, *, vocab_size: int, seed: int) -> None:
  """Writes manifest, tokenizer, training and held-out files to `out`, unless it has them already.

  Raises:
    DataError: a package whose text is read is not installed, `out` holds something else, or the
      text gives fewer than `vocab_size` tokens.
  """
  if is_built(out, vocab_size=vocab_size, seed=seed):
    return
  if out.exists() and not (out / MARK).is_file() and any(out.iterdir()):
    raise DataError(f"{out} holds files that are not the quickstart's; name another folder")
  new = out.with_name(f".{out.name}.new")
  shutil.rmtree(new, ignore_errors=True)  # of a build that was killed
  try:
    new.mkdir(parents=True)
    _write(new, _rows(seed), vocab_size)
    (new / MARK).write_text(_fingerprint(vocab_size, seed))
    replace_folder(new, out)
  finally:
    shutil.rmtree(new, ignore_errors=True)


def is_built(out: pathlib.Path, *, vocab_size: int, seed: int) -> bool:
  """Returns whether `build` has nothing to do: the same text by the same versions is there.

  Raises:
    DataError: a package whose text is read is not installed.
  """
  mark = _fingerprint(vocab_size, seed)
  return (out / MARK).is_file() and (out / MARK).read_text() == mark


def _fingerprint(vocab_size: int, seed: int) -> str:
  versions = [_version(package) for package in (*LICENCES, "pyarrow", "tokenizers")]
  return hashlib.sha256(json.dumps([VERSION, versions, vocab_size, seed]).encode()).hexdigest()


def _version(package: str) -> str:
  try:
    return importlib.metadata.version(package)
  except importlib.metadata.PackageNotFoundError as error:
    raise DataError(
      f"the quickstart reads the text of {package}, which is not installed: "
      "pip install 'mlembed_jax[quickstart]'"
    ) from error


def _rows(seed: int) -> dict[str, list[Row]]:
  """Returns file name -> rows."""
  messages, (names, kinds) = read_messages(), read_names()
  utterances, unseen_utterances = read_utterances(seed)
  support = {
    intent: [texts.pop() for _ in range(min(SUPPORT_UTTERANCES, len(texts) // 2))]
    for intent, texts in utterances["en"].items()
  }
  pairs = intent_templates.pairs(utterances, seeded(seed))
  train = {
    "train/messages.parquet": bitext_rows(part(messages, heldout=False), None, seed),
    "train/names.parquet": bitext_rows(part(names, heldout=False), NAMES_PER_LANGUAGE, seed),
    "train/intents.parquet": [_row(query, documents, lang) for lang, query, documents in pairs],
    "train/name_kinds.parquet": kind_rows(part(names, heldout=False), kinds, seed),
  }
  seen = {fold(text) for text in _texts(train)}
  unseen = {"messages": part(messages, heldout=True), "names": part(names, heldout=True)}
  return {name: seeded(seed).sample(rows, len(rows)) for name, rows in train.items()} | {
    "heldout/bitext.parquet": heldout_bitext(unseen, seen, seed),
    "heldout/intents.parquet": heldout_intents(support, unseen_utterances, seen),
  }


def _texts(files: dict[str, list[Row]]) -> set[str]:
  return {row[key] for rows in files.values() for row in rows for key in row if key != "lang"}


# Training rows.


def bitext_rows(translations: Translations, limit: int | None, seed: int) -> list[Row]:
  """Returns up to `limit` rows per language, every other one to English, with hard negatives."""
  spread = Counter(english for pairs in translations.values() for english in pairs)
  ranked = hardest_first(sorted(spread))
  rows = []
  for lang, pairs in sorted(translations.items()):
    rng = seeded(seed, lang)
    # What few languages name comes early, so that the languages together name everything.
    place = {english: rng.random() * spread[english] for english in sorted(pairs)}
    for i, english in enumerate(sorted(place, key=place.__getitem__)[:limit]):
      negatives = _bitext_negatives(english, pairs, ranked[english])
      if len(negatives) == BITEXT_NEGATIVES:
        sides = [(english, pairs[english]), *negatives]
        to = i % 2  # 0: to English
        rows.append(_row(sides[0][1 - to], [side[to] for side in sides], lang))
  return rows


def hardest_first(english: list[str]) -> dict[str, list[str]]:
  """Returns for each string the others by falling similarity, likely paraphrases left out.

  TF-IDF over the letter trigrams of words: names are often a single word.
  """
  terms = [{f" {w} "[i : i + 3] for w in fold(t).split() for i in range(len(w))} for t in english]
  column = {term: i for i, term in enumerate(sorted(set().union(*terms)))}
  weight = np.zeros((len(english), len(column)), np.float32)
  for row, mine in enumerate(terms):
    weight[row, [column[term] for term in mine]] = 1
  weight *= np.log1p(len(english) / weight.sum(axis=0))
  weight /= np.linalg.norm(weight, axis=1, keepdims=True)
  similarity = (weight @ weight.T).round(3)  # near-ties go by index, whatever the order of sums
  order = np.argsort(-similarity, axis=1, kind="stable")
  return {
    text: [english[j] for j in order[i] if similarity[i, j] <= PARAPHRASE]
    for i, text in enumerate(english)
  }


def _bitext_negatives(
  english: str, pairs: dict[str, str], ranked: Iterable[str]
) -> list[tuple[str, str]]:
  """Returns the hardest pairs of which no side equals a side of this pair or of each other."""
  used = {fold(english), fold(pairs[english])}
  found: list[tuple[str, str]] = []
  for other in ranked:
    if other in pairs and used.isdisjoint(sides := {fold(other), fold(pairs[other])}):
      used |= sides
      found.append((other, pairs[other]))
      if len(found) == BITEXT_NEGATIVES:
        break
  return found


def kind_rows(names: Translations, kinds: dict[str, str], seed: int) -> list[Row]:
  """Returns names in every language, English too, each with the label of its kind."""
  english = {name: name for pairs in names.values() for name in pairs}
  rows = []
  for lang, pairs in sorted({**names, "en": english}.items()):
    rng, meanings = seeded(seed, lang), defaultdict(set)
    for name, text in pairs.items():
      meanings[text].add(kinds.get(name))
    for kind, label in KINDS.items():
      mine = sorted(text for text, found in meanings.items() if found == {kind})
      for text in rng.sample(mine, min(NAMES_PER_KIND, len(mine))):
        wrong = rng.choice([other for other in KINDS.values() if other != label])
        rows.append(_row(text, [label, wrong], lang))
  return rows


def _row(query: str, documents: list[str], lang: str) -> Row:
  passage, *negatives = documents
  numbered = {f"negative_{i}": text for i, text in enumerate(negatives, 1)}
  return {"query": query, "passage": passage, **numbered, "lang": lang}


# Held-out rows. `seen` holds every training text, folded.


def heldout_bitext(sources: dict[str, Translations], seen: set[str], seed: int) -> list[Row]:
  """Returns HELDOUT_PAIRS rows of each language that has them, from the sources in turn."""
  rows = []
  for lang in sorted(set().union(*sources.values())):
    columns = []
    for source, translations in sources.items():
      pairs = sorted(translations.get(lang, {}).items())
      shuffled = seeded(seed, lang).sample(pairs, len(pairs))
      columns.append([{"lang": lang, "text": t, "en": en, "source": source} for en, t in shuffled])
    mine = list(_distinct(_in_turn(columns), seen))[:HELDOUT_PAIRS]
    rows += mine if len(mine) == HELDOUT_PAIRS else []
  return rows


def _distinct(rows: Iterable[Row], seen: set[str]) -> Iterator[Row]:
  """Yields the rows with text and English that are new, so that every pair has one answer."""
  texts, english = set(), set()
  for row in rows:
    text, en = fold(row["text"]), fold(row["en"])
    if seen.isdisjoint((text, en)) and text not in texts and en not in english:
      texts.add(text)
      english.add(en)
      yield row


def heldout_intents(
  support: dict[str, list[str]], heldout: ByLanguage, seen: set[str]
) -> list[Row]:
  """Returns English support rows, and test rows of the languages that have most intents."""

  def rows(lang: str, intents: dict[str, list[str]], split: str, seen: set[str]) -> list[Row]:
    columns = [
      [{"lang": lang, "intent": k, "text": t, "split": split} for t in texts if fold(t) not in seen]
      for k, texts in sorted(intents.items())
      if k in support
    ]
    return list(_in_turn(columns))

  centroids = rows("en", support, "support", seen)
  seen = seen | {fold(row["text"]) for row in centroids}
  tests = {lang: rows(lang, columns, "test", seen) for lang, columns in heldout.items()}
  full = {
    lang: test[:HELDOUT_UTTERANCES]
    for lang, test in tests.items()
    if len(test) >= HELDOUT_UTTERANCES
  }
  intents = {lang: len({row["intent"] for row in test}) for lang, test in full.items()}
  best = sorted(full, key=lambda lang: (lang != "en", -intents[lang], lang))[:HELDOUT_LANGUAGES]
  return centroids + [row for lang in sorted(best) for row in full[lang]]


def _in_turn(columns: list[list[Row]]) -> Iterator[Row]:
  return (row for turn in itertools.zip_longest(*columns) for row in turn if row)


# Files.


def _write(folder: pathlib.Path, files: dict[str, list[Row]], vocab_size: int) -> None:
  manifest = {}
  for name, rows in files.items():
    (folder / name).parent.mkdir(exist_ok=True)
    schema = pa.schema([(column, pa.string()) for column in rows[0]])
    table = pa.Table.from_pylist(rows, schema=schema)
    pq.write_table(table, folder / name, compression="zstd")
    manifest[name] = _entry(name, rows)
  (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
  texts = _texts({name: rows for name, rows in files.items() if name.startswith("train/")})
  train_tokenizer(texts, vocab_size).save(str(folder / TOKENIZER))


def _entry(name: str, rows: list[Row]) -> dict[str, Any]:
  """Returns what the manifest says of a file."""
  task_type, instruction, packages = FILES[name]
  licences = dict.fromkeys(part for p in packages for part in LICENCES[p].split(", "))
  return {
    "task_type": task_type,
    "instruction": instruction,
    "query_has_instruction": False,
    "negatives": sum(column.startswith("negative_") for column in rows[0]),
    "rows": len(rows),
    "languages": dict(sorted(Counter(row["lang"] for row in rows).items())),
    "licence": ", ".join(licences),
    "source": ", ".join(f"{package} {_version(package)}" for package in packages),
  }


def train_tokenizer(texts: set[str], vocab_size: int) -> tokenizers.Tokenizer:
  """Returns a byte-level BPE of exactly `vocab_size` tokens.

  Every text counts once, which balances the languages: each has some hundred, English a few
  thousand although half of all rows are English.

  Raises:
    DataError: the texts give fewer tokens.
  """
  tokenizer = tokenizers.Tokenizer(models.BPE())
  tokenizer.normalizer = normalizers.NFC()
  split = pre_tokenizers.Split(tokenizers.Regex(_PRETOKEN), "isolated")
  to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
  tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
  tokenizer.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=vocab_size,
    special_tokens=SPECIAL_TOKENS,
    initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    show_progress=False,
  )
  prompts = [with_instruction(file[1], "") for file in FILES.values()] * 100
  tokenizer.train_from_iterator(sorted(texts) + prompts, trainer)
  if tokenizer.get_vocab_size() != vocab_size:
    raise DataError(
      f"model.vocab: the quickstart's text gives {tokenizer.get_vocab_size()} tokens, "
      f"not {vocab_size}"
    )
  return tokenizer
