"""Batches: content, instructions, processes, kinds, and that no data module imports jax."""

import ast
import collections
import pathlib

import jax
import numpy as np
import pyarrow.parquet as pq
import pytest
import tokenizers

import mlembed_jax.data
from mlembed_jax.data import batching, records
from mlembed_jax.errors import DataError
from tests.material import (
  batches_of,
  entry,
  labels,
  pairs,
  prepare_dataset,
  scored,
  with_positives,
  write_files,
)

PAIRS = pairs(120, 3)
FILES = {
  "train/search.parquet": (PAIRS, entry("retrieval", 3, "Find.")),
  "train/bitext.parquet": (
    with_positives(pairs(100, 4), 3),
    entry("bitext", 4, "Translate.") | {"positives": 3},
  ),
  "train/topics.parquet": (pairs(60, 2), entry("clustering", 2, "Say which:")),
  "train/scored.parquet": (scored(70), entry("scored_pairs", 0, "Compare.")),
  "train/colours.parquet": (labels(60), entry("classification", 1, "")),
}
SYMMETRIC = {f"train/{name}.parquet" for name in ("bitext", "topics", "scored")}


@pytest.fixture(scope="module")
def folder(data, tmp_path_factory):
  folder = tmp_path_factory.mktemp("loader")
  write_files(folder, FILES)
  prepare_dataset(folder, tokenizer=data / "tokenizer.json")
  return folder


@pytest.fixture(scope="module")
def dataset(folder):
  return folder / "dataset"


@pytest.fixture(scope="module")
def tables(folder):
  return {name: pq.read_table(folder / name).to_pylist() for name in FILES}


@pytest.fixture(scope="module")
def tokenizer(data):
  return tokenizers.Tokenizer.from_file(str(data / "tokenizer.json"))


def texts_of(batch):
  """Returns the token ids of each text of each row, read from the sheets alone."""
  layout, found = batch.layout, {}
  for sheets, width in zip(batch.sheets, layout.widths, strict=True):
    per_shard = sheets.tokens.shape[1] // layout.batch_shards
    for block, sheet in np.ndindex(sheets.tokens.shape[:2]):
      start = 0
      for end, text in zip(sheets.ends[block, sheet], sheets.texts[block, sheet], strict=True):
        if text < layout.texts:
          assert end < width
          place = sheet // per_shard * layout.texts + int(text)
          assert place not in found
          found[place] = sheets.tokens[block, sheet, start : end + 1].tolist()
          start = end + 1
  rows = len(batch.rows)
  assert sorted(found) == list(range(rows * (len(found) // rows)))
  flat = [found[i] for i in range(len(found))]
  return [flat[i : i + len(found) // rows] for i in range(0, len(found), len(found) // rows)]


def names_of(dataset, step, used, seed=0):
  """Returns the columns that a step reads of a file."""
  described = FILES[dataset][1]
  positives = ["passage", *(f"passage_{k + 2}" for k in range(described.get("positives", 1) - 1))]
  drawn = batching.negative_columns(described["negatives"], used, seed, step)
  return ["query", *positives, *(f"negative_{k + 1}" for k in drawn)]


def encoded(tokenizer, text, instruction=None, longest=64):
  """Returns the ids of the whole text, cut, with the end token."""
  whole = text if instruction is None else f"Instruct: {instruction}\nQuery: {text}"
  found = tokenizer.encode(whole, add_special_tokens=False).ids
  return [*found[: longest - 1], tokenizer.token_to_id("<|endoftext|>")]


def same(a, b):
  assert (a.step, a.dataset, a.languages) == (b.step, b.dataset, b.languages)
  np.testing.assert_array_equal(a.rows, b.rows)
  jax.tree.map(np.testing.assert_array_equal, a.arrays(), b.arrays())
  return True


@pytest.mark.parametrize(("shards", "packing", "lengths"), [(1, True, (32, 64)), (4, False, (24,))])
def test_a_batch_holds_its_texts_each_tokenised_as_a_whole(
  dataset, tables, tokenizer, shards, packing, lengths
):
  options = {"negatives": dict.fromkeys(("retrieval", "bitext", "clustering"), 2), "seed": 5}
  options["negatives"]["classification"] = 1
  batches = batches_of(dataset, shards=shards, packing=packing, lengths=lengths, **options)
  seen, instructed = set(), collections.Counter()
  for step in range(24):
    batch = batches[step]
    seen.add(batch.dataset)
    described = FILES[batch.dataset][1]
    names = names_of(batch.dataset, step, 2, seed=5)
    assert batch.kind.positives == described.get("positives", 1) and batch.rows.dtype == np.int64
    assert (batch.kind.task_type, batch.step) == (described["task_type"], step)
    for n, (number, texts) in enumerate(zip(batch.rows, texts_of(batch), strict=True)):
      row = tables[batch.dataset][number]
      assert batch.languages[n] == row["lang"]
      for k, (name, found) in enumerate(zip(names, texts, strict=True)):
        bare = encoded(tokenizer, row[name], longest=lengths[-1])
        asked = encoded(tokenizer, row[name], described["instruction"], lengths[-1])
        if k == 0:
          assert found == (asked if described["instruction"] else bare)
        elif batch.dataset in SYMMETRIC:
          assert found in (bare, asked)
          instructed[found == asked] += 1
        else:
          assert found == bare
      hashes = [np.frombuffer(h.tobytes(), "<u8")[0] for h in batch.hashes[n]]
      assert hashes == [loader_hash(row[name]) for name in names]
    assert batch.real_tokens == sum(len(text) for row in texts_of(batch) for text in row)
    assert batch.computed_tokens == sum(s.tokens.size for s in batch.sheets) >= batch.real_tokens
  assert seen == set(FILES)
  share = instructed[True] / instructed.total()
  assert abs(share - 0.3) < 5 * np.sqrt(0.21 / instructed.total())


def loader_hash(text):
  import hashlib

  return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_documents_have_instructions_by_the_share_that_is_asked(dataset, tables, tokenizer, share):
  batches = batches_of(dataset, ["train/topics.parquet"], document_instructions=share)
  for step in range(4):
    names = names_of("train/topics.parquet", step, 9)
    for number, texts in zip(batches[step].rows, texts_of(batches[step]), strict=True):
      row = tables["train/topics.parquet"][number]
      instruction = "Say which:" if share else None
      assert texts[0] == encoded(tokenizer, row["query"], "Say which:")
      assert texts[1:] == [encoded(tokenizer, row[name], instruction) for name in names[1:]]


def test_without_query_instructions_nothing_has_one(dataset, tables, tokenizer):
  batches = batches_of(dataset, query_instructions=False, document_instructions=0.0)
  for step in range(12):
    batch = batches[step]
    names = names_of(batch.dataset, step, 9)
    for number, texts in zip(batch.rows, texts_of(batch), strict=True):
      row = tables[batch.dataset][number]
      assert texts == [encoded(tokenizer, row[name]) for name in names]


def test_scores_are_those_of_the_rows_and_of_scored_pairs_alone(dataset, tables):
  for step in range(20):
    batch = batches_of(dataset)[step]
    if batch.dataset != "train/scored.parquet":
      assert batch.scores is None and batch.arrays().scores is None
      continue
    expected = [tables[batch.dataset][row]["score"] for row in batch.rows]
    assert batch.scores.dtype == np.float32 and batch.arrays().scores is batch.scores
    np.testing.assert_allclose(batch.scores, expected, rtol=1e-6)


def test_an_epoch_reads_every_row_once_but_for_those_of_the_validation_split(dataset, tables):
  options = {"batch_size": 1, "negatives": dict.fromkeys(("clustering", "classification"), 1)}
  batches = batches_of(dataset, ["train/scored.parquet", "train/colours.parquet"], **options)
  seen = collections.Counter()
  held = {"train/scored.parquet": 0, "train/colours.parquet": 0}
  for name in held:
    held[name] = sum(loader_hash(row["query"]) % 100 == 0 for row in tables[name])
  for step in range(130 - sum(held.values())):
    seen[batches[step].dataset, int(batches[step].rows[0])] += 1
  assert set(seen.values()) == {1} and len(seen) == 130 - sum(held.values())


# Processes.


def test_any_number_of_processes_reads_the_same_rows_in_the_same_order(dataset):
  generator = np.random.default_rng(0)
  for step in generator.integers(0, 10**5, 50).tolist():
    whole = batches_of(dataset, shards=4)[step]
    expected = texts_of(whole)
    for count in (2, 4):
      parts = [
        batches_of(dataset, shards=4, process=p, processes=count)[step] for p in range(count)
      ]
      np.testing.assert_array_equal(np.concatenate([p.rows for p in parts]), whole.rows)
      np.testing.assert_array_equal(np.concatenate([p.hashes for p in parts]), whole.hashes)
      assert [row for part in parts for row in texts_of(part)] == expected
      assert {p.layout.batch_shards for p in parts} == {4 // count}
      assert sum(part.real_tokens for part in parts) == whole.real_tokens


def test_a_process_reads_the_records_of_its_own_rows_alone(dataset, monkeypatch):
  read, original = collections.Counter(), records.Records.__getitem__

  def counted(self, index):
    read["documents" if "documents" in self._paths[0].name else "queries"] += 1
    return original(self, index)

  monkeypatch.setattr(records.Records, "__getitem__", counted)
  for count in (1, 2, 4):
    read.clear()
    batch = batches_of(dataset, shards=4, process=count - 1, processes=count)[3]
    texts = batch.hashes.shape[1]
    assert read == {"queries": 16 // count, "documents": 16 // count * (texts - 1)}


def test_shards_have_about_the_same_number_of_tokens(data, tmp_path):
  """Of texts of 1 to 40 words; in the drawn order, shards differ by more than half."""
  columns = pairs(120, 1) | {"passage": ["one " * (1 + i % 40) for i in range(120)]}
  write_files(tmp_path, {"train/a.parquet": (columns, entry("retrieval", 1, "Find."))})
  dataset = prepare_dataset(tmp_path, tokenizer=data / "tokenizer.json")
  for step in range(7):
    batch = batches_of(dataset, shards=4)[step]
    tokens = [sum(map(len, row)) for row in texts_of(batch)]
    sums = np.sum(np.reshape(tokens, (4, 4)), axis=1)
    assert sums.max() - sums.min() <= 0.15 * sums.mean()


# Kinds and refusals.


def test_texts_per_row_follow_the_task_and_what_is_stored(dataset):
  found = {(b.kind.task_type, b.hashes.shape) for b in (batches_of(dataset)[n] for n in range(24))}
  assert found == {
    ("retrieval", (16, 2 + 3, 2)),  # 3 stored, 7 wanted
    ("bitext", (16, 4 + 4, 2)),
    ("clustering", (16, 2 + 2, 2)),
    ("classification", (16, 2 + 1, 2)),
    ("scored_pairs", (16, 2, 2)),
  }


def test_batches_of_a_kind_have_one_shape_with_the_longest_text_in_mind(dataset, tokenizer):
  batches = batches_of(dataset, lengths=(16, 32, 64))
  shapes = collections.defaultdict(set)
  for step in range(40):
    batch = batches[step]
    arrays = [array.shape for width in batch.arrays().sheets for array in width]
    shapes[batch.kind.task_type].add(tuple(arrays))
  assert len(shapes) == 5 and all(len(found) == 1 for found in shapes.values())


def test_files_of_one_kind_share_the_longest_text(data, tmp_path):
  long = pairs(40, 1) | {"passage": ["one two three " * 14] * 40}
  files = {
    "train/a.parquet": (pairs(40, 1), entry("retrieval", 1, "Find.")),
    "train/b.parquet": (long, entry("retrieval", 1, "Search for it.")),
    "train/c.parquet": (pairs(40, 1), entry("bitext", 1, "")),
  }
  write_files(tmp_path, files)
  batches = batches_of(prepare_dataset(tmp_path, tokenizer=data / "tokenizer.json"))
  kinds = batches.kinds
  assert kinds["train/a.parquet"] == kinds["train/b.parquet"] != kinds["train/c.parquet"]
  assert kinds["train/a.parquet"].longest == 64 > kinds["train/c.parquet"].longest


def test_a_file_without_anything_to_learn_from_is_refused(dataset):
  none = {"retrieval": 0, "bitext": 0, "clustering": 0, "classification": 1}
  message = (
    r"topics\.parquet: clustering learns from .* 2 are stored and losses\.clustering\..* = 0; raise"
  )
  with pytest.raises(DataError, match=message):
    batches_of(dataset, negatives=none)


def test_a_task_needs_hard_negatives_or_the_candidates_of_the_batch(dataset):
  none = dict.fromkeys(("retrieval", "bitext", "clustering", "classification"), 0)
  everywhere = dict.fromkeys(none, True)
  batches = batches_of(dataset, negatives=none, inbatch=everywhere)
  assert {batches[n].hashes.shape[1] for n in range(24)} == {2, 4}
  with pytest.raises(DataError, match=r"train/bitext\.parquet: bitext learns from hard negatives"):
    batches_of(dataset, negatives=none, inbatch=everywhere | {"bitext": False})


def test_data_modules_do_not_import_jax():
  for path in pathlib.Path(mlembed_jax.data.__file__).parent.glob("*.py"):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
      names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
      names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
      assert not [n for n in names if n.split(".")[0] in ("jax", "flax", "optax")], path
