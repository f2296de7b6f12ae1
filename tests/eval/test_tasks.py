"""Scores from vectors whose answers are known, and refusals of unusable held-out files."""

import gzip
import json

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import csv, feather

from mlembed_jax.data.manifest import File
from mlembed_jax.errors import DataError
from mlembed_jax.eval import scores, scoring, tasks
from mlembed_jax.quantize import unit
from tests.material import CONVENTIONS, entry, write_parquet


def load(folder, task_type, scheme="language-script", **columns):
  write_parquet(folder / "t.parquet", columns)
  return tasks.load_task(File("t.parquet", entry(task_type, 0, "Do."), str(folder)), scheme)


def vectors(task, by_text):
  """Returns one unit vector per text of the task; `by_text` is keyed without instruction."""
  return np.array([by_text[t.removeprefix("Instruct: Do.\nQuery: ")] for t in task.texts])


def main_scores(task, by_text):
  found = task.score(*2 * [vectors(task, by_text)])
  return {lang: scores[task.metric] for lang, scores in found.items()}


def test_bitext_counts_own_translations_within_a_language(tmp_path):
  task = load(
    tmp_path,
    "bitext",
    lang=["de", "de", "fr", "fr"],
    text=["eins", "zwei", "un", "deux"],
    en=["one", "two", "one", "two"],
  )
  assert sum(text.endswith("one") for text in task.texts) == 1
  east, north = [1.0, 0.0], [0.0, 1.0]
  known = {"one": east, "two": north, "eins": east, "zwei": north, "un": north, "deux": north}
  # Both French rows find "two": 2 * 1 / (1 + 2) for it, 0 for "one".
  assert main_scores(task, known) == {"deu-Latn": 1.0, "fra-Latn": pytest.approx(1 / 3)}


def test_both_sides_of_symmetric_tasks_have_the_instruction(tmp_path):
  bitext = load(tmp_path, "bitext", lang=["de"], text=["eins"], en=["one"])
  assert bitext.texts == ["Instruct: Do.\nQuery: eins", "Instruct: Do.\nQuery: one"]
  retrieval = load(tmp_path, "retrieval", lang=["de"], title=["eins"], passage=["one"])
  assert retrieval.texts == ["Instruct: Do.\nQuery: eins", "one"]


def test_retrieval_finds_the_passage(tmp_path):
  task = load(tmp_path, "retrieval", lang=["de"] * 2, title=["a", "b"], passage=["x", "y"])
  known = {"a": [1.0, 0], "b": [0, 1.0], "x": [0.9, 0.1], "y": [0.8, 0.2]}
  assert main_scores(task, known) == {"deu-Latn": 1.0}


def test_all_passages_of_a_title_are_right(tmp_path):
  columns = {"title": ["a", "a", "b"], "passage": ["x", "y", "z"]}
  task = load(tmp_path, "retrieval", lang=["de"] * 3, **columns)
  known = {"a": [1.0, 0], "b": [0, 1.0], "x": [0.9, 0.1], "y": [0.8, 0.2], "z": [0, 1.0]}
  assert main_scores(task, known) == {"deu-Latn": 1.0}


def test_labels_are_learnt_in_the_language_or_in_english(tmp_path):
  rows = [
    *(("en", "on", "on 1", "support"), ("en", "off", "off 1", "support")),
    *(("de", "on", "an", "test"), ("de", "off", "aus", "test")),
    *(("fr", "on", "oui", "support"), ("fr", "off", "non", "support"), ("fr", "on", "u", "test")),
  ]
  lang, intent, text, split = map(list, zip(*rows, strict=True))
  task = load(tmp_path, "classification", lang=lang, intent=intent, text=text, split=split)
  known = {"on 1": [1, 0], "off 1": [0, 1], "an": [0.8, 0.6], "aus": [0.9, 0.1]}
  known |= {"oui": [0, 1], "non": [1, 0], "u": [0, 1]}  # French is the other way round
  assert main_scores(task, known) == {"deu-Latn": 0.5, "fra-Latn": 1.0}


def test_other_labels_are_another_task(tmp_path):
  def digest(label):
    columns = {"lang": ["de"] * 2, "label": ["a", label], "text": ["1", "2"]}
    return load(tmp_path, "clustering", **columns).digest

  assert digest("b") == digest("b") != digest("a")


def test_clusters_and_scored_pairs_by_language(tmp_path):
  columns = {"label": ["a", "a", "b", "b"], "text": ["1", "2", "3", "4"]}
  task = load(tmp_path, "clustering", lang=["de"] * 4, **columns)
  east, north = [1.0, 0.0], [0.0, 1.0]
  assert main_scores(task, {"1": east, "2": east, "3": north, "4": north}) == {"deu-Latn": 1.0}
  columns = {"query": ["1", "2", "3"], "passage": ["x"] * 3, "score": [0.1, 0.5, 1.0]}
  task = load(tmp_path, "scored_pairs", lang=["de"] * 3, **columns)
  known = {"1": north, "2": [0.6, 0.8], "3": east, "x": east}
  assert main_scores(task, known) == {"deu-Latn": pytest.approx(1.0)}


@pytest.mark.parametrize(
  ("task_type", "columns", "message"),
  [
    ("bitext", {"lang": ["de"], "text": ["a"]}, "column en is missing"),
    ("bitext", {"lang": ["de"], "text": ["a"], "en": [None]}, "expected string"),
    (
      "bitext",
      {"lang": ["de", "de"], "text": ["a", "b"], "en": [None, "x"]},
      "null or empty texts in en; held-out files must be whole",
    ),
    (
      "classification",
      {"lang": ["de"], "intent": ["x"], "text": ["a"], "split": ["test"]},
      "no rows with split 'support' to learn the labels from, neither in deu-Latn nor in English",
    ),
    ("clustering", {"lang": ["de"], "text": ["a"]}, "column label is missing"),
    (
      "clustering",
      {"lang": ["de"], "class": ["a"]},
      "columns text, label are missing; it has lang",
    ),
    (
      "bitext",
      {"language": ["de"], "text": ["a"], "en": ["b"]},
      "; rename language to lang, or give",
    ),
    (
      "scored_pairs",
      {"lang": ["de"], "query": ["a"], "passage": ["b"], "score": ["high"]},
      "column score holds string, expected number",
    ),
    (
      "scored_pairs",
      {"lang": ["de"] * 2, "query": ["a"] * 2, "passage": ["b"] * 2, "score": [1.0, None]},
      "the scores of deu-Latn are absent, not finite or all equal",
    ),
    (
      "scored_pairs",
      {"lang": ["de"] * 2, "query": ["a"] * 2, "passage": ["b"] * 2, "score": [1.0, np.inf]},
      "the scores of deu-Latn are absent, not finite or all equal",
    ),
    (
      "classification",
      {"lang": ["de"], "intent": ["x"], "text": ["a"], "split": ["support"]},
      "all rows have split 'support'; there are none to be scored",
    ),
    (
      "classification",
      {"lang": ["de"] * 2, "intent": ["x"] * 2, "text": ["a", "b"], "split": ["suport", "test"]},
      "split 'suport' is neither 'support' nor 'test'",
    ),
  ],
)
def test_unusable_files_are_refused(tmp_path, task_type, columns, message):
  with pytest.raises(DataError, match=message):
    load(tmp_path, task_type, **columns)


def test_a_folder_of_tasks_is_listed_in_a_manifest_in_it_or_above(tmp_path, data):
  expected = ["heldout/bitext.parquet", "heldout/colours.parquet"]
  assert [task.name for task in tasks.load_folder(data / "heldout")] == expected
  (tmp_path / "none").mkdir()
  with pytest.raises(DataError, match=r"neither .* nor the folder above has a manifest.json"):
    tasks.load_folder(tmp_path / "none")
  for wrong in (tmp_path / "absent", data / "heldout" / "bitext.parquet"):
    with pytest.raises(DataError, match=r"^tasks: .* is no folder"):
      tasks.load_folder(wrong)
  with pytest.raises(DataError, match=r"^tasks: .*manifest.json lists no file of"):
    tasks.load_folder(data)
  with pytest.raises(DataError, match=r"is it a file to train on, as the manifest has `negatives`"):
    tasks.load_folder(data / "train")


def test_a_row_that_cannot_be_used_is_named(tmp_path):
  (tmp_path / "manifest.json").write_text(json.dumps({"a.csv": entry("classification", 0, "")}))
  rows = ["text,intent,split,lang", "one,x,support,de", "m\u00fcde,x,test,de"]
  (tmp_path / "a.csv").write_bytes("\n".join(rows).encode("latin-1"))
  with pytest.raises(DataError, match=r"text of row 1 cannot be used: bytes that are .*iconv"):
    tasks.load_folder(tmp_path)


def test_the_digest_follows_all_that_scores_depend_on(tmp_path):
  columns = {"lang": ["de"] * 2, "query": ["a", "b"], "passage": ["x", "y"], "score": [0.1, 0.5]}
  task = load(tmp_path, "scored_pairs", **columns)
  assert load(tmp_path, "scored_pairs", **columns).digest == task.digest
  other = load(tmp_path, "scored_pairs", **columns | {"score": [0.5, 0.1]})
  assert other.texts == task.texts and other.digest != task.digest


# Files of every form, as the manifest of a new user says.

FORMS = {
  "t.parquet": lambda columns, path: write_parquet(path, columns),
  "t.arrow": lambda columns, path: feather.write_feather(pa.table(columns), path),
  "t.csv": lambda columns, path: csv.write_csv(pa.table(columns), path),
  "t.csv.gz": lambda columns, path: path.write_bytes(gzip.compress(as_csv(columns))),
  "t.jsonl": lambda columns, path: path.write_text(
    "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in pa.table(columns).to_pylist()),
    encoding="utf-8",
  ),
  "t.json": lambda columns, path: path.write_text(json.dumps(pa.table(columns).to_pylist())),
}


def as_csv(columns):
  sink = pa.BufferOutputStream()
  csv.write_csv(pa.table(columns), sink)
  return sink.getvalue().to_pybytes()


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("task_type", tasks.COLUMNS)
def test_heldout_files_of_every_form_and_type_are_one_task(tmp_path, task_type, name):
  columns = OF_TYPE[task_type]
  expected = load(tmp_path, task_type, lang=["he"] * ROWS, **columns).digest
  described = {"task_type": task_type, "instruction": "Do.", "lang": "he"}  # all that is needed
  (tmp_path / "held").mkdir()
  FORMS[name](columns, tmp_path / "held" / name)
  (tmp_path / "manifest.json").write_text(json.dumps({f"held/{name}": described}))
  (task,) = tasks.load_folder(tmp_path / "held")
  assert task.digest == expected


def test_a_row_may_have_another_language_than_its_file(tmp_path):
  columns = {"lang": ["de", None, " "], "text": ["a", "b", "c"], "label": ["x", "y", "x"]}
  write_parquet(tmp_path / "t.parquet", columns)
  described = {"task_type": "clustering", "instruction": "", "lang": "sw"}
  task = tasks.load_task(File("t.parquet", described, str(tmp_path)))
  assert set(task.score(*2 * [np.eye(3, dtype=np.float32)])) == {"deu-Latn", "swa-Latn"}


# One language, one name.

LANGUAGES = CONVENTIONS[:4]
ROWS = 24 * len(LANGUAGES)
NUMBERS = [str(i) for i in range(ROWS)]
OF_TYPE = {
  "bitext": {"text": NUMBERS, "en": [f"en {i}" for i in range(ROWS)]},
  "retrieval": {"title": NUMBERS, "passage": [f"p {i}" for i in range(ROWS)]},
  "classification": {
    "intent": [("on", "off")[i // 3 % 2] for i in range(ROWS)],
    "text": NUMBERS,
    "split": [("support", "test")[i // 6 % 2] for i in range(ROWS)],
  },
  "clustering": {"label": [("a", "b", "c")[i % 8 % 3] for i in range(ROWS)], "text": NUMBERS},
  "scored_pairs": {
    "query": NUMBERS,
    "passage": [f"p {i}" for i in range(ROWS)],
    "score": [float(i * 7 % 24) for i in range(ROWS)],
  },
}


def tags_of(conventions):
  """Returns a tag per row: 24 rows of each language, its tags in turn."""
  return [tags[i % len(tags)] for tags in conventions for i in range(24)]


@pytest.mark.parametrize("task_type", OF_TYPE)
def test_tags_of_three_conventions_score_as_one_spelling(tmp_path, task_type, monkeypatch):
  monkeypatch.setattr(scores, "BOOTSTRAPS", 1)  # of clusterings, which take 0.2 s each
  columns = OF_TYPE[task_type]
  one = load(tmp_path, task_type, lang=tags_of([tags[:1] for tags in LANGUAGES]), **columns)
  three = load(tmp_path, task_type, lang=tags_of(LANGUAGES), **columns)
  written = load(tmp_path, task_type, "as-written", lang=tags_of(LANGUAGES), **columns)
  assert one.texts == three.texts
  found = unit(np.random.default_rng(0).normal(size=(len(one.texts), 4)).astype(np.float32))
  assert three.score(found, found) == one.score(found, found)
  assert len(one.score(found, found)) == len(LANGUAGES)
  assert len(written.score(found, found)) == 3 * len(LANGUAGES)
  assert three.digest != written.digest


def test_merged_pools_are_harder(tmp_path):
  """Each pool of a spelling holds a third of the rows, so that chance alone scores higher."""
  columns, tags = OF_TYPE["bitext"], tags_of(LANGUAGES)

  def mean(scheme):
    task = load(tmp_path, "bitext", scheme, lang=tags, **columns)
    rng = np.random.default_rng(0)
    found = task.score(*2 * [unit(rng.normal(size=(len(task.texts), 16)).astype(np.float32))])
    return np.mean([scores["accuracy"] for scores in found.values()])

  assert mean("as-written") > 2 * mean("language-script")


def test_texts_alone_have_no_score(tmp_path):
  with pytest.raises(DataError, match=r"t.parquet: task_type 'text' has no score; leave the file"):
    load(tmp_path, "text", text=["a", "b"])


def test_tags_of_no_known_language_are_spoken_of(tmp_path, capsys):
  columns = {"lang": ["de", "xx1", "xx1", "Swahili"], "text": list("abcd"), "en": list("efgh")}
  assert load(tmp_path, "bitext", **columns).unknown == "'xx1' 2, 'Swahili' 1"
  assert load(tmp_path, "bitext", scheme="as-written", **columns).unknown == ""
  known = columns | {"lang": ["de", "he", "iw", "zh_Hans"]}
  assert load(tmp_path, "bitext", **known).unknown == ""
  load(tmp_path, "bitext", **columns)
  manifest = {"t.parquet": {"task_type": "bitext", "instruction": ""}}
  (tmp_path / "manifest.json").write_text(json.dumps(manifest))
  scoring.read_tasks([tmp_path])
  assert "tags of no known language are scored as one each: 'xx1' 2" in capsys.readouterr().err


@pytest.mark.parametrize("english", ["en", "eng-Latn", "eng_Latn", "en-GB"])
def test_english_teaches_however_its_tag_is_written(tmp_path, english):
  columns = {"intent": ["on", "off", "on"], "text": ["a", "b", "c"]}
  columns |= {"lang": [english, english, "iw"], "split": ["support", "support", "test"]}
  task = load(tmp_path, "classification", **columns)
  assert main_scores(task, {"a": [1, 0], "b": [0, 1], "c": [0.9, 0.1]}) == {"heb-Hebr": 1.0}


def test_two_regions_with_one_translation_find_it(tmp_path):
  columns = {"text": ["um", "hum", "dois"], "en": ["one", "one", "two"]}
  task = load(tmp_path, "bitext", lang=["pt", "pt-BR", "pt"], **columns)
  east, north = [1.0, 0.0], [0.0, 1.0]
  known = {"one": east, "two": north, "um": east, "hum": east, "dois": north}
  assert main_scores(task, known) == {"por-Latn": 1.0}


def test_a_digest_without_merges_is_that_of_the_tags(tmp_path):
  """0.1.0 hashed them, so what it scored is not scored again."""
  columns = {"text": ["a", "b"], "en": ["x", "y"]}
  digests = [
    load(tmp_path, "bitext", scheme, lang=["iw", "de"], **columns).digest
    for scheme in ("as-written", "language-script")
  ]
  assert digests[0] == digests[1]
  assert load(tmp_path, "bitext", lang=["he", "de"], **columns).digest != digests[0]
