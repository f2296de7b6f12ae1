"""Reading the release layout: instructions, unusable rows, and every refusal by file and column."""

import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest

from mlembed_jax.data import sources
from mlembed_jax.data.tokenizer import DataError
from tests.material import entry, pairs, with_positives, write_parquet

BITEXT = entry("bitext", 2, "Translate.")


def write(folder, columns, **changes):
  write_parquet(folder / "a.parquet", columns)
  return sources.load(folder, "a.parquet", BITEXT | changes, 0.1)


def test_reads_rows_in_the_asked_order(tmp_path):
  columns = pairs(20, 2)
  dataset = write(tmp_path, columns)
  queries, bare, documents = dataset.read([7, 3, 7], [1])
  assert bare == [columns["query"][i] for i in (7, 3, 7)]
  assert queries == [f"Instruct: Translate.\nQuery: {text}" for text in bare]
  assert documents == [[columns["passage"][i], columns["negative_2"][i]] for i in (7, 3, 7)]


def test_an_instruction_in_the_file_is_kept_once_and_left_out_of_the_hashed_text(tmp_path):
  columns = pairs(20, 2)
  texts = columns["query"]
  columns["query"] = [f"Instruct: Other.\nQuery: {text}" for text in texts]
  queries, bare, _ = write(tmp_path, columns, query_has_instruction=True).read([0, 1], [])
  assert queries == columns["query"][:2] and bare == texts[:2]


def test_several_positives_are_read_before_the_negatives(tmp_path):
  columns = with_positives(pairs(20, 2), 3)
  dataset = write(tmp_path, columns, positives=3)
  assert dataset.positives == 3
  names = ("passage", "passage_2", "passage_3", "negative_2", "negative_1")
  _, _, documents = dataset.read([7, 3], [1, 0])
  assert documents == [[columns[name][i] for name in names] for i in (7, 3)]
  assert write(tmp_path, columns).positives == 1


def test_a_row_without_one_of_its_positives_is_dropped(tmp_path):
  columns = with_positives(pairs(40, 2), 3)
  columns["passage_2"][3], columns["passage_3"][5] = None, " "
  dataset = write(tmp_path, columns, positives=3)
  assert dataset.dropped == 2 and len(write(tmp_path, columns)) == 40
  np.testing.assert_array_equal(dataset.rows, [i for i in range(40) if i not in (3, 5)])
  with pytest.raises(DataError, match=r"a\.parquet: column passage_4 is missing"):
    write(tmp_path, columns, positives=4)


def test_unusable_rows_are_dropped_and_counted(tmp_path):
  columns = pairs(40, 2)
  columns["passage"][3], columns["query"][5], columns["negative_2"][7] = None, "", " \n"
  dataset = write(tmp_path, columns)
  assert (len(dataset), dataset.dropped) == (37, 3)
  _, bare, _ = dataset.read(range(37), [])
  assert bare == [q for i, q in enumerate(columns["query"]) if i not in (3, 5, 7)]
  assert [columns["query"][row] for row in dataset.rows] == bare and dataset.rows.dtype == np.int64


def test_too_many_unusable_rows_are_refused_with_counts(tmp_path):
  columns = pairs(40, 2)
  columns["passage"][:5] = [None] * 5
  columns["query"][39] = ""
  with pytest.raises(DataError, match=r"6 of 40 rows .*\(query: 1, passage: 5\)"):
    write(tmp_path, columns)


def test_missing_file(tmp_path):
  with pytest.raises(DataError, match=r"a\.parquet: this file of the manifest does not exist"):
    sources.load(tmp_path, "a.parquet", BITEXT, 0.1)


def test_truncated_file(tmp_path):
  write(tmp_path, pairs(20, 2))
  path = tmp_path / "a.parquet"
  path.write_bytes(path.read_bytes()[:-100])
  with pytest.raises(DataError, match=r"a\.parquet: not a readable parquet file"):
    sources.load(tmp_path, "a.parquet", BITEXT, 0.1)


def test_missing_column(tmp_path):
  with pytest.raises(DataError, match=r"column negative_3 is missing; it has query, passage"):
    write(tmp_path, pairs(20, 2), negatives=3)


def test_column_that_is_no_text(tmp_path):
  columns = pairs(20, 2)
  columns["passage"] = list(range(20))
  with pytest.raises(DataError, match=r"a\.parquet: column passage holds int64, expected string"):
    write(tmp_path, columns)


@pytest.fixture
def manifest(data, tmp_path):
  shutil.copytree(data, tmp_path, dirs_exist_ok=True)

  def change(**entries):
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))
    return path

  return change


def test_patterns_choose_files_in_manifest_order(manifest):
  chosen = sources.select(manifest(), ("train/[bt]*",), "data.train")
  assert list(chosen) == ["train/bitext.parquet", "train/topics.parquet"]


def test_a_pattern_without_a_file_is_refused(manifest):
  with pytest.raises(DataError, match=r"data.train: 'trian/\*' matches no file of .* lists tr"):
    sources.select(manifest(), ("trian/*",), "data.train")


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"postives": 2}, "postives: unknown field; did you mean positives?"),
    ({"task_type": "sts"}, "task_type: 'sts' is unknown; known: retrieval, bitext"),
    ({"negatives": -1}, "negatives: must not be negative"),
    ({"negatives": "4"}, "negatives: expected int, found '4'"),
    ({"query_has_instruction": None}, "query_has_instruction: expected bool, found None"),
    ({"positives": 0}, "positives: must be at least 1, found 0"),
    ({"positives": True}, "positives: expected int, found True"),
    ({"positives": None}, "positives: expected int, found None"),
    ({"task_type": "scored_pairs"}, r"negatives: must be 0 for scored_pairs .*, found 4"),
    (
      {"task_type": "scored_pairs", "negatives": 0, "positives": 2},
      r"positives: must be 1 for scored_pairs .*, found 2",
    ),
    ({"teacher_vectors": "a.npy"}, r"teacher_vectors: expected dict, found 'a\.npy'"),
    ({"teacher_vectors": {"passage": "p.npy"}}, r"teacher_vectors\.query: expected .* nothing"),
    ({"teacher_vectors": {"query": "q.npy"}}, r"teacher_vectors\.passage: expected .* nothing"),
    ({"teacher_vectors": {"query": 1, "passage": "p"}}, r"teacher_vectors\.query: .* found 1"),
    (
      {"teacher_vectors": {"query": "q", "passage": "p", "negatives": None}},
      r"teacher_vectors\.negatives: expected the path of an \.npy file, found None",
    ),
    (
      {"teacher_vectors": {"query": "q", "passage": "p", "negative": "n"}},
      "teacher_vectors: 'negative' is unknown; known: query, passage, negatives",
    ),
  ],
)
def test_bad_entries_are_refused_by_file_and_field(manifest, changes, message):
  path = manifest(**{"train/bitext.parquet": entry("bitext", 4, "") | changes})
  with pytest.raises(DataError, match=message) as error:
    sources.select(path, ("train/*",), "data.train")
  assert "train/bitext.parquet" in str(error.value)


def test_an_undeclared_field_is_refused(manifest):
  path = manifest(**{"train/bitext.parquet": {"task_type": "bitext"}})
  with pytest.raises(DataError, match=r"bitext.parquet: instruction: expected str, found nothing"):
    sources.select(path, ("train/*",), "data.train")


def test_a_manifest_that_is_no_json(tmp_path):
  (tmp_path / "manifest.json").write_text("{")
  with pytest.raises(DataError, match=r"manifest.json is not JSON"):
    sources.read_manifest(tmp_path / "manifest.json")


def test_fingerprint_follows_what_the_order_depends_on(tmp_path):
  def fingerprint(columns, *parts, **changes):
    return sources.fingerprint([write(tmp_path, columns, **changes)], *parts)

  columns = with_positives(pairs(20, 2), 2)
  same = fingerprint(columns, "tokenizer")
  assert fingerprint(columns, "tokenizer") == same
  others = [
    fingerprint(pairs(21, 2), "tokenizer"),
    fingerprint(columns, "other"),
    fingerprint(columns, "tokenizer", instruction="Other."),
    fingerprint(columns, "tokenizer", negatives=1),
    fingerprint(columns, "tokenizer", positives=2),
  ]
  assert len({same, *others}) == 6


def test_reads_what_pyarrow_wrote_in_several_row_groups(tmp_path):
  columns = pairs(20, 2)
  write(tmp_path, columns)
  table = pq.read_table(tmp_path / "a.parquet")
  pq.write_table(table, tmp_path / "a.parquet", row_group_size=3)
  _, bare, _ = sources.load(tmp_path, "a.parquet", BITEXT, 0.1).read([19, 0], [])
  assert bare == [columns["query"][19], columns["query"][0]]
