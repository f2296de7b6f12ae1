"""Prepared datasets, read back by TensorFlow Datasets: all that the input says, and no more."""

import hashlib
import json
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest
import tensorflow_datasets as tfds
import tokenizers

from mlembed_jax.data import rows
from mlembed_jax.data.tokenizer import Tokenizer
from mlembed_jax.errors import DataError
from tests.material import (
  OTHERS,
  entry,
  pairs,
  prepare_dataset,
  scored,
  sentences,
  with_positives,
  write_files,
)

INSTRUCTIONS = ("Find.", "Frage?", "Say which:", "用中文。", "two\nlines", "blank ", "7")
STRANGE = (
  "12 345 6.7",
  "?!… «a»",
  "  two leading",
  "\tone\ttwo",
  "\none\n\ntwo\r\nthree ",
  "👩‍🚀 one 🇩🇪",
  "Query: one",
  "Instruct: a\nQuery: b",
  "<|endoftext|> one<|im_end|>",
  "é e\u0301 \u200b ﷽",
  "one",
  "O",
  "एक दो\u00a0तीन",
  "二月亮一",
  "\U0010ffff\x00\x7f",
  "night " * 40,
)


def fold(columns):
  """Returns the columns with the strange texts put in, queries first."""
  for i, text in enumerate(STRANGE):
    columns["query"][3 * i], columns["passage"][3 * i + 1] = text, text
    columns["negative_1"][3 * i + 2] = text
  return columns


FILES = {
  "train/search.parquet": (fold(pairs(200, 3)), entry("retrieval", 3, "Find.")),
  "train/bitext.parquet": (
    fold(with_positives(pairs(120, 2), 3)),
    entry("bitext", 2, "Translate.") | {"positives": 3},
  ),
  "train/scored.parquet": (scored(80), entry("scored_pairs", 0, "Compare.")),
  "train/plain.parquet": (
    {name: values for name, values in pairs(60, 1).items() if name != "lang"},
    entry("classification", 1, "") | {"lang": "sw"},
  ),
}
DROPPED = {"train/search.parquet": {"null": [3, 4], "empty": [20]}}


@pytest.fixture(scope="module")
def folder(data, tmp_path_factory):
  """Files with three unusable rows, prepared in several chunks."""
  folder = tmp_path_factory.mktemp("prepared")
  write_files(folder, FILES)
  columns = dict(FILES["train/search.parquet"][0])
  columns["passage"] = [None if i in (3, 4) else text for i, text in enumerate(columns["passage"])]
  columns["query"] = [" " if i == 20 else text for i, text in enumerate(columns["query"])]
  described = FILES["train/search.parquet"][1]
  write_files(folder, FILES | {"train/search.parquet": (columns, described)})
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(rows, "CHUNK", 50)
    prepare_dataset(folder, tokenizer=data / "tokenizer.json")
  return folder


@pytest.fixture(scope="module")
def tokenizer(data):
  return tokenizers.Tokenizer.from_file(str(data / "tokenizer.json"))


@pytest.fixture(scope="module")
def splits(folder):
  builder = tfds.builder_from_directory(str(folder / "dataset"))
  return {name: list(builder.as_data_source(name)) for name in builder.info.splits}


@pytest.fixture(scope="module")
def queries(splits):
  """Every row by file and number."""
  found = {}
  for record in splits["train"] + splits["validation"]:
    key = record["dataset"].decode(), int(record["row"])
    assert key not in found
    found[key] = record
  return found


def stored(folder):
  """Yields (file, row number, columns) of every row that should be there."""
  for name in FILES:
    dropped = {row for rows_ in DROPPED.get(name, {}).values() for row in rows_}
    for i, row in enumerate(pq.read_table(folder / name).to_pylist()):
      if i not in dropped:
        yield name, i, row


def ids(tokenizer, text):
  return tokenizer.encode(text, add_special_tokens=False).ids


def as_query(tokenizer, instruction, record):
  """Returns the ids of a stored text as a query."""
  prefix = ids(tokenizer, f"Instruct: {instruction}\n")
  return [*prefix, *record["head"].tolist(), *record["tokens"][record["skip"] :].tolist()]


def hash_of(text):
  return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def test_tensorflow_is_not_needed():
  assert "tensorflow" not in sys.modules


def test_every_usable_row_is_there_once_with_what_it_says(folder, queries):
  expected = {(name, i): row for name, i, row in stored(folder)}
  assert queries.keys() == expected.keys()
  for (name, i), row in expected.items():
    record, described = queries[name, i], FILES[name][1]
    assert record["language"].decode() == row.get("lang", described.get("lang"))
    assert record["score"] == np.float32(row.get("score", 0.0))
    assert record["hash"].tobytes() == hash_of(row["query"]).to_bytes(8, "little")
    assert len(record["positives"]) == described.get("positives", 1)
    assert len(record["negatives"]) == described["negatives"]


def test_stored_tokens_are_those_of_the_bare_text(folder, queries, tokenizer):
  for name, i, row in stored(folder):
    assert queries[name, i]["tokens"].tolist() == ids(tokenizer, row["query"]), row["query"]


@pytest.mark.parametrize("instruction", INSTRUCTIONS)
def test_instruction_head_and_rest_are_the_tokens_of_the_whole(
  folder, queries, tokenizer, instruction
):
  for name, i, row in stored(folder):
    whole = ids(tokenizer, f"Instruct: {instruction}\nQuery: {row['query']}")
    assert as_query(tokenizer, instruction, queries[name, i]) == whole, row["query"]


def test_positives_and_negatives_are_the_documents_of_their_columns(
  folder, queries, splits, tokenizer
):
  documents = splits["documents"]
  for name, i, row in stored(folder):
    record, described = queries[name, i], FILES[name][1]
    columns = ["passage", *(f"passage_{k + 2}" for k in range(described.get("positives", 1) - 1))]
    columns += [f"negative_{k + 1}" for k in range(described["negatives"])]
    for column, place in zip(columns, [*record["positives"], *record["negatives"]], strict=True):
      document = documents[place]
      assert document["tokens"].tolist() == ids(tokenizer, row[column])
      assert document["hash"].tobytes() == hash_of(row[column]).to_bytes(8, "little")
      if described["task_type"] in ("bitext", "scored_pairs"):
        whole = ids(tokenizer, f"Instruct: Do.\nQuery: {row[column]}")
        assert as_query(tokenizer, "Do.", document) == whole


def test_each_document_is_stored_once_and_only_those_of_symmetric_files_as_queries(folder, splits):
  texts, symmetric = set(), set()
  for name, _, row in stored(folder):
    mine = {v for k, v in row.items() if k.startswith(("passage", "negative"))}
    texts |= mine
    if FILES[name][1]["task_type"] in ("bitext", "scored_pairs"):
      symmetric |= mine
  found = [int.from_bytes(d["hash"].tobytes(), "little") for d in splits["documents"]]
  assert found == sorted(map(hash_of, texts))  # over all shards
  with_head = {h for h, d in zip(found, splits["documents"], strict=True) if d["head"].size}
  assert with_head == set(map(hash_of, symmetric)) != set(found)


def test_validation_is_a_hundredth_by_the_text_of_the_query(folder, splits, queries):
  held = {(r["dataset"].decode(), int(r["row"])) for r in splits["validation"]}
  texts = {(name, i): row["query"] for name, i, row in stored(folder)}
  assert held == {key for key, text in texts.items() if hash_of(text) % 100 == 0}
  assert held and not {texts[key] for key in held} & {texts[k] for k in texts.keys() - held}


def test_rows_of_a_shard_stand_by_language_and_catalog_json_says_where(folder, splits):
  catalog = json.loads((folder / "dataset/catalog.json").read_text())
  for split in ("train", "validation"):
    start = 0
    for shard in catalog["shards"][split]:
      records = splits[split][start : start + shard["written"]["records"]]
      start += len(records)
      keys = [(r["language"].decode(), int(r["row"])) for r in records]
      assert keys == sorted(keys) and {r["dataset"].decode() for r in records} <= {shard["file"]}
      runs = [(run["language"], run["rows"]) for run in shard["runs"]]
      languages = [language for language, _ in keys]
      assert runs == [(lang, languages.count(lang)) for lang in sorted(set(languages))]
    assert start == len(splits[split])


def test_lengths_are_those_of_the_longer_form_and_sums_are_right(folder, splits, tokenizer):
  columns = {(name, i): row for name, i, row in stored(folder)}
  catalog = json.loads((folder / "dataset/catalog.json").read_text())
  shards, start = catalog["shards"]["train"], 0
  for n, shard in enumerate(shards):
    path = folder / f"dataset/mlembed-train.array_record-{n:05d}-of-{len(shards):05d}.lengths.npy"
    lengths, described = np.load(path), FILES[shard["file"]][1]
    assert lengths.dtype == np.uint16
    expected = []
    for record in splits["train"][start : start + len(lengths)]:
      row = columns[record["dataset"].decode(), int(record["row"])]
      names = [c for c in row if c.startswith(("passage", "negative"))]
      names = sorted(names, key=lambda c: c.startswith("negative"))
      forms = {c: [len(ids(tokenizer, row[c]))] for c in ("query", *names)}
      for column in ("query", *names):
        if column == "query" or any(
          row[column] in (r.get(c) for c in r)
          for (other, _), r in columns.items()
          if FILES[other][1]["task_type"] in ("bitext", "scored_pairs")
        ):
          forms[column].append(len(ids(tokenizer, f"Query: {row[column]}")))
      expected.append([max(forms[c]) for c in ("query", *names)])
    start += len(lengths)
    assert lengths.tolist() == expected
    assert shard["longest"] == max(max(row) for row in expected)
    sums = np.array(
      [[r["query_tokens"], r["positive_tokens"], r["negative_tokens"]] for r in shard["runs"]]
    )
    positives = 1 + described.get("positives", 1)
    parts = np.split(np.array(expected), [1, positives], axis=1)
    np.testing.assert_array_equal(sums.sum(axis=0), [part.sum() for part in parts])


def test_the_report_counts_every_row(folder, splits):
  report = json.loads((folder / "dataset/prepare_report.json").read_text())
  for name, counts in report["files"].items():
    dropped = DROPPED.get(name, {})
    assert counts["read"] == len(FILES[name][0]["query"])
    by_reason = counts["dropped_by_reason"]
    assert {reason: of["examples"] for reason, of in by_reason.items()} == dropped
    assert all(of["rows"] == len(of["examples"]) for of in by_reason.values())
    for split in ("train", "validation"):
      mine = [r for r in splits[split] if r["dataset"].decode() == name]
      assert counts[split] == len(mine) == sum(counts[f"{split}_languages"].values())
    assert set(counts["train_languages"]) == ({"sw"} if "plain" in name else set(OTHERS))
  totals = report["totals"]
  assert totals["read"] == totals["dropped"] + totals["train"] + totals["validation"] == 460
  assert totals["dropped"] == 3 and totals["documents"] == len(splits["documents"])


@pytest.mark.parametrize("most", [2, 3, 4, 5, 7, 20])
def test_long_texts_are_cut_and_still_begin_as_the_whole(data, tokenizer, tmp_path, most):
  columns = {name: values[:60] for name, values in FILES["train/bitext.parquet"][0].items()}
  write_files(tmp_path, {"train/a.parquet": (columns, entry("bitext", 2, "Do."))})
  out = prepare_dataset(tmp_path, tokenizer=data / "tokenizer.json", max_tokens=most)
  source = tfds.builder_from_directory(str(out)).as_data_source("train")
  for record in source:
    text = columns["query"][record["row"]]
    assert record["tokens"].tolist() == ids(tokenizer, text)[:most]
    whole = ids(tokenizer, f"Instruct: Do.\nQuery: {text}")
    found = as_query(tokenizer, "Do.", record)
    assert found == whole[: len(found)], text
    assert len(found) >= min(len(whole), len(ids(tokenizer, "Instruct: Do.\n")) + most), text
  texts = {hash_of(text): text for values in columns.values() for text in values}
  builder, cut = tfds.builder_from_directory(str(out)), 0
  for record in (
    record for split in builder.info.splits for record in builder.as_data_source(split)
  ):
    text = texts[int.from_bytes(record["hash"].tobytes(), "little")]
    whole = ids(tokenizer, f"Instruct: Do.\nQuery: {text}")
    bare = record["tokens"].tolist() == ids(tokenizer, text)
    cut += not (bare and as_query(tokenizer, "Do.", record) == whole)
  report = json.loads((out / "prepare_report.json").read_text())
  assert report["totals"]["cut_texts"] == cut and (most > 7 or cut)


def test_a_tokenizer_that_merges_long_stretches_is_cut_right_too(tmp_path):
  """Without splits at spaces a head may stand for all of the text."""
  joined = tokenizers.Tokenizer(tokenizers.models.BPE())
  joined.pre_tokenizer = tokenizers.pre_tokenizers.Split("\n", "isolated")
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=500, special_tokens=["<|endoftext|>"], show_progress=False
  )
  texts = sentences("en")
  queries = [f"Instruct: Do.\nQuery: {text}" for text in texts[:40]]
  joined.train_from_iterator([*texts, *queries] * 2, trainer)
  joined.save(str(tmp_path / "tokenizer.json"))
  write_files(tmp_path, {"train/a.parquet": (pairs(60, 2), entry("bitext", 2, "Do."))})
  for most in (3, 2047):
    out = prepare_dataset(tmp_path, max_tokens=most, out=f"out{most}")
    for record in tfds.builder_from_directory(str(out)).as_data_source("documents"):
      found = as_query(joined, "Do.", record)
      text = next(t for t in texts if hash_of(t).to_bytes(8, "little") == record["hash"].tobytes())
      assert found == ids(joined, f"Instruct: Do.\nQuery: {text}")[: len(found)], text


def test_a_tokenizer_that_joins_across_the_line_break_is_refused(tmp_path):
  joined = tokenizers.Tokenizer(tokenizers.models.BPE())
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=500, special_tokens=["<|endoftext|>"], show_progress=False
  )
  joined.train_from_iterator(["Instruct: Do.\nQuery: a"] * 9 + sentences("en"), trainer)
  joined.save(str(tmp_path / "tokenizer.json"))
  with pytest.raises(DataError, match=r"tokenizer\.json: joins the end of an instruction with the"):
    Tokenizer(tmp_path / "tokenizer.json", "<|endoftext|>").prefix("Do.")
  write_files(tmp_path, {"train/a.parquet": (pairs(20, 2), entry("bitext", 2, "Do."))})
  with pytest.raises(DataError, match="give a tokenizer that splits at line breaks"):
    prepare_dataset(tmp_path)
  assert not (tmp_path / "dataset").exists()
  # Where there is no instruction, there is nothing to join.
  write_files(tmp_path, {"train/a.parquet": (pairs(20, 2), entry("bitext", 2, ""))})
  prepare_dataset(tmp_path)
