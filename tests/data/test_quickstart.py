"""The quickstart's data, built once from the installed packages."""

import hashlib
import importlib.metadata
import json
import os
import pathlib
import subprocess
import sys
import types
import unicodedata
from collections import Counter, defaultdict
from random import Random

import pyarrow.parquet as pq
import pytest
import tokenizers

from mlembed_jax import load_config
from mlembed_jax.data import (
  intent_templates,
  manifest,
  prepare,
  quickstart,
  quickstart_sources,
)
from mlembed_jax.data.quickstart_sources import fold
from mlembed_jax.errors import DataError
from mlembed_jax.training import inputs

VOCAB = 4096
TRAIN = ["messages", "names", "intents", "name_kinds"]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  out = tmp_path_factory.mktemp("quickstart") / "data"
  quickstart.build(out, vocab_size=VOCAB, seed=0)
  return out


@pytest.fixture(scope="module")
def files(built: pathlib.Path) -> dict[str, list[dict[str, str]]]:
  names = json.loads((built / "manifest.json").read_text())
  return {name: pq.read_table(built / name).to_pylist() for name in names}


@pytest.fixture(scope="module")
def sources() -> dict[str, quickstart_sources.Translations]:
  return {
    "messages": quickstart_sources.read_messages(),
    "names": quickstart_sources.read_names()[0],
  }


@pytest.fixture(scope="module")
def train_texts(files) -> set[str]:
  rows = [row for name in TRAIN for row in files[f"train/{name}.parquet"]]
  return {fold(row[column]) for row in rows for column in row if column != "lang"}


# What is written.


def test_the_manifest_describes_the_files(built, files):
  for name, entry in json.loads((built / "manifest.json").read_text()).items():
    rows = files[name]
    assert entry["rows"] == len(rows) > 1000
    assert entry["languages"] == Counter(row["lang"] for row in rows)
    assert entry["query_has_instruction"] is False
    assert entry["instruction"] and entry["licence"] and entry["source"]
    if name.startswith("train/"):
      negatives = [f"negative_{i}" for i in range(1, entry["negatives"] + 1)]
      assert list(rows[0]) == ["query", "passage", *negatives, "lang"]
    else:
      assert entry["negatives"] == 0


def test_no_text_is_empty_or_has_outer_blanks(files):
  texts = {text for rows in files.values() for row in rows for text in row.values()}
  assert all(text and text == " ".join(text.split()) for text in texts)
  assert all(unicodedata.is_normalized("NFC", text) for text in texts)


@pytest.mark.parametrize("name", ["messages", "names"])
def test_half_of_the_bitext_rows_are_to_english(files, sources, name):
  rows = files[f"train/{name}.parquet"]
  from_english = sum(sources[name][row["lang"]].get(row["query"]) == row["passage"] for row in rows)
  assert 0.49 < from_english / len(rows) < 0.51


def test_names_cover_every_english_name_that_is_not_held_out(files, sources):
  rows = files["train/names.parquet"]
  trained = {row[side] for row in rows for side in ("query", "passage")}
  english = {name for pairs in sources["names"].values() for name in pairs}
  assert all(quickstart_sources._is_heldout(name) for name in english - trained)
  assert max(Counter(row["lang"] for row in rows).values()) <= quickstart.NAMES_PER_LANGUAGE


def test_another_script_is_kept_where_it_shares_no_name_with_the_usual_one(sources):
  names = sources["names"]
  codes = {lang.partition("-")[0]: lang for lang in names if len(lang.partition("-")[2]) == 4}
  kept = {code: lang for code, lang in codes.items() if code in names}
  assert {"az-cyrl", "bs-cyrl", "ff-adlm", "kk-arab", "uz-cyrl"} <= {*kept.values()}
  for code, lang in kept.items():
    assert names[code].items().isdisjoint(names[lang].items()), lang
  assert not {"az-latn", "en-dsrt", "kaa-cyrl", "yue-hans"} & names.keys()


# The split.


@pytest.mark.parametrize("column", ["en", "text"])
def test_no_held_out_bitext_is_trained_on(files, train_texts, column):
  assert not {fold(row[column]) for row in files["heldout/bitext.parquet"]} & train_texts


def test_no_held_out_utterance_is_trained_on(files, train_texts):
  rows = files["heldout/intents.parquet"]
  assert not {fold(row["text"]) for row in rows} & train_texts
  support = {fold(row["text"]) for row in rows if row["split"] == "support"}
  assert not {fold(row["text"]) for row in rows if row["split"] == "test"} & support


def test_held_out_bitext_has_100_distinct_pairs_per_language(files):
  by_language = defaultdict(list)
  for row in files["heldout/bitext.parquet"]:
    by_language[row["lang"]].append(row)
  assert len(by_language) >= 60
  for rows in by_language.values():
    assert len(rows) == 100
    for column in ("en", "text"):
      assert len({fold(row[column]) for row in rows}) == 100


def test_held_out_intents_have_english_support(files):
  rows = files["heldout/intents.parquet"]
  support = [row for row in rows if row["split"] == "support"]
  assert {row["lang"] for row in support} == {"en"}
  assert {row["intent"] for row in rows} == {row["intent"] for row in support}
  tests = Counter(row["lang"] for row in rows if row["split"] == "test")
  assert len(tests) >= 20 and set(tests.values()) == {quickstart.HELDOUT_UTTERANCES}


# Negatives.


@pytest.mark.parametrize("name", TRAIN)
def test_negatives_are_distinct_and_not_the_positive(files, name):
  for row in files[f"train/{name}.parquet"]:
    documents = [fold(text) for key, text in row.items() if key not in ("query", "lang")]
    assert len(set(documents)) == len(documents)


@pytest.mark.parametrize("name", ["messages", "names"])
def test_bitext_negatives_have_another_english_side(files, sources, name):
  meanings = defaultdict(set)  # of a text in a language
  for lang, pairs in sources[name].items():
    for english, text in pairs.items():
      meanings[lang, text].add(fold(english))
  for row in files[f"train/{name}.parquet"]:
    negatives = [row[f"negative_{i}"] for i in range(1, 5)]
    pairs = sources[name][row["lang"]]
    if pairs.get(row["query"]) == row["passage"]:
      assert all(fold(row["query"]) not in meanings[row["lang"], text] for text in negatives)
    else:
      assert meanings[row["lang"], row["query"]].isdisjoint(map(fold, negatives))


def test_intent_negatives_are_of_other_intents(files):
  intents = defaultdict(set)  # utterances joined by a row have one intent
  for row in files["train/intents.parquet"]:
    intents[row["query"]].add(row["passage"])
  for row in files["train/intents.parquet"]:
    negatives = {row[f"negative_{i}"] for i in range(1, 10)}
    assert not negatives & intents[row["query"]]
  languages = Counter(row["lang"] for row in files["train/intents.parquet"])
  assert len(languages) >= 40


def test_the_hardest_negative_shares_most_and_paraphrases_are_left_out():
  texts = ["Enter a valid date", "Enter a valid date.", "Enter a valid time", "Sign out"]
  assert quickstart.hardest_first(texts)["Enter a valid date"] == [
    "Enter a valid time",
    "Sign out",
  ]


# The tokenizer.

SCRIPTS = {
  "Latin": "Đường về nhà, façade",
  "Greek": "Επιλέξτε ημερομηνία",
  "Cyrillic": "Введите правильный пароль.",
  "Armenian": "Մուտքագրեք ամսաթիվը",
  "Georgian": "შეიყვანეთ პაროლი",
  "Hebrew": "נא להזין תאריך חוקי",
  "Arabic": "أدخل تاريخًا صالحًا",
  "Devanagari": "कृपया सही दिनांक दर्ज करें",
  "Bengali": "একটি বৈধ তারিখ দিন",
  "Tamil": "சரியான தேதியை உள்ளிடவும்",
  "Thai": "กรุณากรอกวันที่",
  "Burmese": "ရက်စွဲကို ထည့်ပါ",
  "Khmer": "សូមបញ្ចូលកាលបរិច្ឆេទ",
  "Amharic": "ትክክለኛ ቀን ያስገቡ",
  "Hangul": "올바른 날짜를 입력하세요",
  "Kana": "正しい日付を入力してください。",
  "Han": "请输入有效的日期",
  "Cherokee, never trained on as a sentence": "ᏣᎳᎩ ᎦᏬᏂᎯᏍᏗ",
  "no script": " two  blanks\n\n\ttab 12345 \U0001f469\u200d\U0001f680 \x00",
}


@pytest.fixture(scope="module")
def tokenizer(built: pathlib.Path) -> tokenizers.Tokenizer:
  return tokenizers.Tokenizer.from_file(str(built / "tokenizer.json"))


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_tokenizer_round_trips(tokenizer, script):
  text = unicodedata.normalize("NFC", SCRIPTS[script])
  assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_the_tokenizer_has_its_size_and_special_tokens(tokenizer):
  assert tokenizer.get_vocab_size() == VOCAB
  for token in ("<|endoftext|>", "<|im_end|>"):
    assert tokenizer.encode(token).ids == [tokenizer.token_to_id(token)]
  assert len(tokenizer.encode("plain text").ids) == len(tokenizer.encode("plain text", None, False))


def test_combining_marks_do_not_cut_words(tokenizer):
  pieces = tokenizer.pre_tokenizer.pre_tokenize_str("कृपया सही")
  assert len(pieces) == 2


def test_too_large_a_vocabulary_is_an_error():
  with pytest.raises(DataError, match="tokens, not 9999"):
    quickstart.train_tokenizer({"one", "two"}, 9999)


# Building.


def test_two_builds_give_identical_bytes(built, tmp_path):
  code = (
    "import pathlib, sys; from mlembed_jax.data import quickstart;"
    f"quickstart.build(pathlib.Path(sys.argv[1]), vocab_size={VOCAB}, seed=0);"
    "assert 'jax' not in sys.modules"
  )
  again = tmp_path / "again"
  environment = {**os.environ, "PYTHONHASHSEED": "7"}
  subprocess.run([sys.executable, "-c", code, str(again)], check=True, env=environment)
  assert _digests(again) == _digests(built)
  assert list(tmp_path.iterdir()) == [again]  # no temporary folder stays


def _digests(folder: pathlib.Path) -> dict[str, str]:
  return {
    str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
    for path in folder.rglob("*")
    if path.is_file()
  }


def test_what_is_built_is_not_built_again(built, monkeypatch):
  monkeypatch.setattr(quickstart, "_rows", lambda seed: pytest.fail("read the sources again"))
  quickstart.build(built, vocab_size=VOCAB, seed=0)


def test_a_run_under_way_keeps_its_text_where_packages_have_changed(tmp_path, monkeypatch):
  """Its dataset stays, too; without a checkpoint both are made anew."""
  config = load_config("configs/quickstart.py")
  for name in ("text", "dataset"):
    (tmp_path / "data" / name).mkdir(parents=True)
  (tmp_path / "data/text/fingerprint").write_text("of other versions")
  made = []
  monkeypatch.setattr(quickstart, "build", lambda *args, **options: made.append(args))
  monkeypatch.setattr(prepare, "prepare_dataset", lambda *args, **options: made.append(args))
  monkeypatch.setattr(prepare, "make_recipe", lambda *args, **options: None)
  monkeypatch.setattr(manifest, "select", lambda *args: [])
  monkeypatch.setattr(inputs, "Tokenizer", lambda path, token: types.SimpleNamespace(path=path))
  (tmp_path / "checkpoints/10").mkdir(parents=True)
  inputs._build(config, tmp_path, tmp_path / "data")
  assert not made and (tmp_path / "data/dataset").is_dir()
  (tmp_path / "checkpoints/10").rmdir()
  inputs._build(config, tmp_path, tmp_path / "data")
  assert len(made) == 2 and not (tmp_path / "data/dataset").exists()


def test_another_fingerprint_replaces_the_folder(tmp_path, monkeypatch):
  out = tmp_path / "data"
  out.mkdir()
  (out / "fingerprint").write_text("of other versions")
  (out / "stale").touch()
  monkeypatch.setattr(quickstart, "_rows", lambda seed: {})
  monkeypatch.setattr(quickstart, "_write", lambda folder, rows, size: (folder / "new").touch())
  quickstart.build(out, vocab_size=VOCAB, seed=0)
  assert {path.name for path in out.iterdir()} == {"new", "fingerprint"}


def test_a_failed_build_leaves_nothing(tmp_path, monkeypatch):
  monkeypatch.setattr(quickstart, "_rows", lambda seed: {"train/empty.parquet": []})
  with pytest.raises(IndexError):
    quickstart.build(tmp_path / "data", vocab_size=VOCAB, seed=0)
  assert not list(tmp_path.iterdir())


def test_a_folder_of_someone_else_is_kept(tmp_path):
  (tmp_path / "thesis.txt").touch()
  with pytest.raises(DataError, match="another folder"):
    quickstart.build(tmp_path, vocab_size=VOCAB, seed=0)


def test_a_missing_package_is_named(tmp_path, monkeypatch):
  def version(package: str) -> str:
    if package == "django-allauth":
      raise importlib.metadata.PackageNotFoundError(package)
    return "1.0"

  monkeypatch.setattr(importlib.metadata, "version", version)
  with pytest.raises(DataError, match=r"django-allauth.*pip install 'mlembed_jax\[quickstart\]'"):
    quickstart.build(tmp_path / "data", vocab_size=VOCAB, seed=0)


# Small parts.


@pytest.mark.parametrize(
  ("code", "expected"),
  [
    ("de", "de"),
    ("en_GB", None),
    ("es_AR", None),
    ("no", "nb"),
    ("pt_BR", "pt-br"),
    ("sr_Latn", "sr-latn"),
    ("zh-CN", "zh-hans"),
    ("zh_Hant", "zh-hant"),
  ],
)
def test_language_codes_have_one_spelling(code, expected):
  assert quickstart_sources.language_code(code) == expected


def test_fold_ignores_case_and_punctuation_but_keeps_vowel_signs():
  assert fold("E-mail, Address!") == fold("e mail address")
  assert fold("कि") != fold("का")
  assert fold("…") == "…"


def test_templates_expand_to_every_sentence_and_no_other():
  language = {
    "intents": {
      "HassTurnOn": {"data": [{"sentences": ["[please ](turn;on) <the>{colour} (lamp|light)"]}]},
      "HassLightSet": {"data": [{"sentences": ["brighter"]}]},
    },
    "expansion_rules": {"the": "[the ]"},
    "lists": {"colour": {"values": [{"in": "re(d|ddish)"}]}},
  }
  drawn = {u.text for u in intent_templates.utterances(language, Random(0))}
  assert drawn == {
    f"{please}{verb} {the}{colour} {noun}"
    for please in ("", "please ")
    for verb in ("turn on", "on turn")
    for the in ("", "the ")
    for colour in ("red", "reddish")
    for noun in ("lamp", "light")
  }


def test_an_utterance_of_two_intents_is_left_out():
  intents = {
    "HassMediaPause": {"data": [{"sentences": ["stop", "pause the music"]}]},
    "HassTurnOff": {"data": [{"sentences": ["Stop", "turn it off"]}]},
  }
  language = {"intents": intents, "expansion_rules": {}, "lists": {}}
  drawn = {u.text for u in intent_templates.utterances(language, Random(0))}
  assert drawn == {"pause the music", "turn it off"}
