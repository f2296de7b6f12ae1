"""Rows of training files: what is read, what is dropped and why, and every refusal by file."""

import bz2
import gzip
import hashlib
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mlembed_jax.data import rows
from mlembed_jax.data.manifest import File
from mlembed_jax.errors import DataError
from tests.material import entry, pairs, with_positives, write_parquet

BITEXT = entry("bitext", 2, "Translate.")
FORMATS = ("a.parquet", "a.jsonl", "a.jsonl.gz", "a.json", "a.jsonl.bz2")


def write(folder, columns, name="a.parquet", described=BITEXT, **changes):
  """Writes the columns in the form that the name says; returns the file's description."""
  if not name.endswith(".parquet"):
    lines = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    return write_lines(folder, [json.dumps(line) for line in lines], name, described, **changes)
  write_parquet(folder / name, columns)
  return File(name, described | changes, str(folder))


def write_lines(folder, lines, name="a.jsonl", described=BITEXT, **changes):
  content = "".join(line + "\n" for line in lines).encode("utf-8", "surrogatepass")
  packed = {"gz": gzip.compress, "bz2": bz2.compress}.get(name.rsplit(".")[-1], bytes)
  (folder / name).write_bytes(packed(content))
  return File(name, described | changes, str(folder))


def read(file):
  """Returns the usable rows of a file as dictionaries, and its chunks."""
  chunks = list(rows.read_chunks(file))
  found = []
  for chunk in chunks:
    texts = chunk.texts["text"].to_pylist()
    for row in chunk.rows.to_pylist():
      found.append(row | {"documents": [texts[place] for place in row["documents"]]})
  return found, chunks


def dropped(chunks):
  return {
    reason: (of.rows, of.examples) for chunk in chunks for reason, of in chunk.dropped.items()
  }


def numbers(found):
  return [row["row"] for row in found]


@pytest.mark.parametrize("size", [3, 20, 21, 10**6])
@pytest.mark.parametrize("name", FORMATS)
def test_every_row_is_read_once_in_order_whatever_the_chunks(tmp_path, monkeypatch, name, size):
  monkeypatch.setattr(rows, "CHUNK", size)
  columns = pairs(20, 2)
  file = write(tmp_path, columns, name)
  found, chunks = read(file)
  assert [chunk.read for chunk in chunks] == [min(size, 20 - n) for n in range(0, 20, size)]
  assert numbers(found) == list(range(20))
  for i, row in enumerate(found):
    names = ("passage", "negative_1", "negative_2")
    assert (row["query"], row["language"], row["score"]) == (
      *(columns[key][i] for key in ("query", "lang")),
      0.0,
    )
    assert row["documents"] == [columns[key][i] for key in names]


def test_row_groups_do_not_matter(tmp_path, monkeypatch):
  file = write(tmp_path, pairs(20, 2))
  expected, _ = read(file)
  pq.write_table(pq.read_table(file.path), file.path, row_group_size=3)
  monkeypatch.setattr(rows, "CHUNK", 7)
  assert read(file)[0] == expected


def test_a_file_may_have_64_bit_offsets_and_columns_of_its_own(tmp_path):
  columns = {name: pa.array(values, pa.large_string()) for name, values in pairs(20, 2).items()}
  expected, _ = read(write(tmp_path, pairs(20, 2)))
  assert read(write(tmp_path, columns | {"id": [{"x": 1}] * 20}))[0] == expected


def test_texts_of_a_chunk_are_stored_once_by_ascending_hash(tmp_path):
  columns = pairs(20, 2)
  columns["negative_2"] = [columns["passage"][3]] * 3 + columns["negative_2"][3:]
  _, (chunk,) = read(write(tmp_path, columns))
  distinct = {text for name in ("passage", "negative_1", "negative_2") for text in columns[name]}
  texts, hashes = chunk.texts["text"].to_pylist(), chunk.texts["hash"].to_numpy()
  assert len(texts) == len(distinct) and set(texts) == distinct
  assert np.all(np.diff(hashes.astype(object)) > 0)
  for text, found in zip(texts, hashes.tolist(), strict=True):
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    assert found == int.from_bytes(digest, "little")


def test_several_positives_come_before_the_negatives(tmp_path):
  columns = with_positives(pairs(20, 2), 3)
  found, _ = read(write(tmp_path, columns, positives=3))
  names = ("passage", "passage_2", "passage_3", "negative_1", "negative_2")
  assert [row["documents"] for row in found] == [[columns[n][i] for n in names] for i in range(20)]


# Instructions and languages.


def test_instructions_in_the_file_are_taken_off_and_others_are_counted(tmp_path):
  columns = pairs(20, 2)
  bare = columns["query"]
  own = ["Instruct: Translate.\nQuery: ", "Instruct: Other.\nQuery: ", ""]
  columns["query"] = [own[i % 3] + text for i, text in enumerate(bare)]
  found, (chunk,) = read(write(tmp_path, columns, query_has_instruction=True))
  assert [row["query"] for row in found] == bare
  assert chunk.other_instructions == sum(i % 3 == 1 for i in range(20))
  assert chunk.against_manifest == sum(i % 3 == 2 for i in range(20))
  found, (chunk,) = read(write(tmp_path, columns))
  assert [row["query"] for row in found] == columns["query"] and chunk.other_instructions == 0
  assert chunk.against_manifest == sum(i % 3 < 2 for i in range(20))


def test_only_the_first_instruction_is_taken_off_over_line_breaks_too(tmp_path):
  columns = pairs(3, 2)
  columns["query"] = [
    "Instruct: two\nlines\nQuery: a\nQuery: b",
    "Instruct: x\nQuery: Instruct: y\nQuery: z",
    "one Instruct: x\nQuery: y",
  ]
  found, _ = read(write(tmp_path, columns, query_has_instruction=True))
  assert [row["query"] for row in found] == [
    "a\nQuery: b",
    "Instruct: y\nQuery: z",
    columns["query"][2],
  ]


def test_an_instruction_without_a_query_is_an_empty_row(tmp_path):
  columns = pairs(20, 2)
  columns["query"][4] = "Instruct: Other.\nQuery:  "
  found, chunks = read(write(tmp_path, columns, query_has_instruction=True))
  assert dropped(chunks) == {"empty": (1, [4])} and len(found) == 19
  assert chunks[0].other_instructions == 0
  assert chunks[0].against_manifest == 19  # of usable rows


@pytest.mark.parametrize("name", FORMATS[:2])
def test_a_row_without_a_language_has_that_of_the_file(tmp_path, name):
  columns = pairs(6, 2)
  columns["lang"] = ["de", None, "", " ", "ru", "hi"]
  found, _ = read(write(tmp_path, columns, name, lang="sw"))
  assert [row["language"] for row in found] == ["de", "sw", "sw", "sw", "ru", "hi"]
  del columns["lang"]
  for changes, expected in (({"lang": "sw"}, "sw"), ({}, "und")):
    found, _ = read(write(tmp_path, columns, name, **changes))
    assert [row["language"] for row in found] == [expected] * 6


# Rows that cannot be used.


@pytest.mark.parametrize("name", FORMATS[:2])
def test_unusable_rows_are_dropped_by_reason_with_examples(tmp_path, monkeypatch, name):
  monkeypatch.setattr(rows, "CHUNK", 25)
  columns = pairs(40, 2)
  columns["passage"][3], columns["negative_1"][5] = None, None
  columns["query"][7], columns["negative_2"][30], columns["query"][31] = "", " \n\u2003", "\t"
  columns["negative_2"][9] = columns["passage"][9]
  found, chunks = read(write(tmp_path, columns, name))
  assert [dropped([chunk]) for chunk in chunks] == [
    {"null": (2, [3, 5]), "empty": (1, [7]), "negative_equals_positive": (1, [9])},
    {"empty": (2, [30, 31])},
  ]
  assert numbers(found) == [i for i in range(40) if i not in (3, 5, 7, 9, 30, 31)]
  assert [row["query"] for row in found] == [columns["query"][i] for i in numbers(found)]
  texts = {text for chunk in chunks for text in chunk.texts["text"].to_pylist()}
  assert texts == {text for row in found for text in row["documents"]}


def test_a_row_counts_for_one_reason_and_few_examples_are_kept(tmp_path):
  columns = pairs(40, 2)
  columns["passage"][:9] = [None] * 9
  columns["query"][:10] = [""] * 10
  _, chunks = read(write(tmp_path, columns))
  assert dropped(chunks) == {"null": (9, [0, 1, 2, 3, 4]), "empty": (1, [9])}


def test_a_row_without_one_of_its_positives_is_dropped(tmp_path):
  columns = with_positives(pairs(40, 2), 3)
  columns["passage_2"][3], columns["passage_3"][5] = None, " "
  columns["negative_2"][8] = columns["passage_3"][8]
  _, chunks = read(write(tmp_path, columns, positives=3))
  assert dropped(chunks) == {
    "null": (1, [3]),
    "empty": (1, [5]),
    "negative_equals_positive": (1, [8]),
  }
  found, _ = read(write(tmp_path, columns))
  assert len(found) == 40


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()])
def test_bytes_that_are_no_utf_8_are_dropped(tmp_path, kind):
  columns = pairs(20, 2)
  for name, row in (("query", 3), ("passage", 5), ("negative_1", 11), ("lang", 13)):
    values = [text.encode() for text in columns[name]]
    values[row] = b"caf\xe9 " + values[row]
    binary = pa.large_binary() if pa.types.is_large_string(kind) else pa.binary()
    encoded = pa.array(values, binary)
    columns[name] = pa.Array.from_buffers(kind, 20, encoded.buffers())
  columns["negative_2"][5] = None
  write_parquet(tmp_path / "a.parquet", columns)
  with pytest.raises(UnicodeDecodeError):
    pq.read_table(tmp_path / "a.parquet")["passage"].to_pylist()
  found, chunks = read(File("a.parquet", BITEXT, str(tmp_path)))
  assert dropped(chunks) == {"invalid_utf8": (4, [3, 5, 11, 13])}
  expected, _ = read(write(tmp_path, pairs(20, 2)))
  assert found == [row for row in expected if row["row"] not in (3, 5, 11, 13)]


def line(**changes):
  return {"query": "eins", "passage": "one", "negative_1": "two", "negative_2": "tri"} | changes


def test_lines_that_are_no_rows_are_dropped_by_reason(tmp_path):
  lines = [
    json.dumps(line()),
    "{",
    "",  # no row
    "[1]",
    "7",
    json.dumps(line(query=3)),
    json.dumps(line(passage=["one"])),
    json.dumps(line(lang=7)),
    json.dumps({"query": "eins"}),
    json.dumps(line(passage="\ud800one")),
    json.dumps(line(lang="\udfff")),
    '{"query": "\ud800"}',  # bytes of a surrogate
    json.dumps(
      line(query="zwei \U0001f600"), ensure_ascii=True
    ),  # a pair of surrogates is a letter
    "[" * 100_000,
  ]
  found, chunks = read(write_lines(tmp_path, lines))
  assert numbers(found) == [0, 11] and found[-1]["query"] == "zwei 😀"
  assert dropped(chunks) == {
    "not_json": (4, [1, 2, 3, 12]),
    "wrong_type": (3, [4, 5, 6]),
    "invalid_utf8": (3, [8, 9, 10]),
    "null": (1, [7]),
  }


def test_a_row_beyond_the_first_lines_need_not_have_every_column(tmp_path):
  lines = [json.dumps(line())] + [json.dumps({"query": "a", "more": "b"})] * 2
  _, chunks = read(write_lines(tmp_path, lines))
  assert dropped(chunks) == {"null": (2, [1, 2])}


# Refusals.


@pytest.mark.parametrize("name", FORMATS)
def test_missing_files_are_named(tmp_path, name):
  with pytest.raises(DataError, match=rf"{tmp_path}/{name} does not exist"):
    rows.check_file(File(name, BITEXT, str(tmp_path)))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"negatives": 3}, "column negative_3 is missing; it has query, passage, negative_1"),
    ({"positives": 2}, "column passage_2 is missing; it has query, passage, negative_1"),
    ({"task_type": "scored_pairs", "negatives": 0}, "column score is missing; it has query"),
  ],
)
def test_a_missing_column_is_refused_at_once(tmp_path, name, changes, message):
  with pytest.raises(DataError) as error:
    rows.check_file(write(tmp_path, pairs(20, 2), name, **changes))
  assert f"{tmp_path}/{name}: {message}" in str(error.value)


@pytest.mark.parametrize(
  ("column", "values", "kind"),
  [
    ("passage", list(range(20)), "int64"),
    ("query", [b"bytes"] * 20, "binary"),
    ("negative_2", [["a"]] * 20, "list<element: string>"),
    ("lang", list(range(20)), "int64"),
  ],
)
def test_a_column_of_another_type_is_refused_at_once(tmp_path, column, values, kind):
  file = write(tmp_path, pairs(20, 2) | {column: values})
  with pytest.raises(DataError) as error:
    rows.check_file(file)
  assert f"a.parquet: column {column} holds {kind}, expected string" in str(error.value)


def test_a_parquet_file_cut_off_at_the_end_is_refused_at_once(tmp_path):
  file = write(tmp_path, pairs(20, 2))
  content = (tmp_path / "a.parquet").read_bytes()
  for size in (len(content) - 100, 3, 0):
    (tmp_path / "a.parquet").write_bytes(content[:size])
    with pytest.raises(DataError, match=r"a\.parquet: not a readable parquet file: "):
      rows.check_file(file)


@pytest.mark.parametrize("garbage", [b"\xff", b"\x00"])
def test_a_parquet_file_that_is_damaged_in_the_middle_is_named(tmp_path, garbage):
  file = write(tmp_path, pairs(500, 2))
  content = (tmp_path / "a.parquet").read_bytes()
  middle = len(content) // 4
  (tmp_path / "a.parquet").write_bytes(content[:middle] + garbage * 64 + content[middle + 64 :])
  rows.check_file(file)
  with pytest.raises(DataError, match=r"a\.parquet: damaged parquet file: "):
    read(file)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.bz2"])
def test_a_compressed_file_that_is_damaged_is_named(tmp_path, name):
  file = write(tmp_path, pairs(500, 2), name)
  content = (tmp_path / name).read_bytes()
  middle = len(content) // 2
  for damaged in (content[:middle], content[:middle] + b"\xff" * 64 + content[middle + 64 :], b"x"):
    (tmp_path / name).write_bytes(damaged)
    with pytest.raises(DataError, match=rf"{name}: damaged file: "):
      read(file)


def test_a_file_of_something_else_is_refused(tmp_path):
  with pytest.raises(DataError, match=r"a\.jsonl: its first 3 lines are no JSON objects"):
    rows.check_file(write_lines(tmp_path, ["a,b", "1,2", "3,4"]))
  (tmp_path / "a.parquet").write_text("a,b\n")
  with pytest.raises(DataError, match=r"a\.parquet: not a readable parquet file: "):
    rows.check_file(File("a.parquet", BITEXT, str(tmp_path)))


@pytest.mark.parametrize("name", FORMATS[:3])
def test_a_file_without_rows_is_refused(tmp_path, name):
  columns = {column: pa.array([], pa.string()) for column in pairs(1, 2)}
  with pytest.raises(DataError, match=rf"{name}: no (lines|rows)"):
    rows.check_file(write(tmp_path, columns, name))
