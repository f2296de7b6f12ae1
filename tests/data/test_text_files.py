"""Files of texts: every form reads the same rows, and what contradicts its name is refused."""

import bz2
import csv
import gzip
import io
import json
import lzma

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mlembed_jax.data import rows, text_files
from mlembed_jax.data.manifest import File
from mlembed_jax.data.parquet_files import Columns, cast
from mlembed_jax.data.tables import read_tables
from mlembed_jax.errors import DataError
from tests.material import entry

ROWS = [
  {"text": "The ferry leaves at nine.", "lang": "en"},
  {"text": 'Die "Fähre", sie\nfährt\tab', "lang": "de"},
  {"text": "船は九時に出る 😀", "lang": "ja"},
]
LINES = [json.dumps(row, ensure_ascii=False).encode() for row in ROWS]
MARK = b"\xef\xbb\xbf"


def parquet():
  sink = io.BytesIO()
  pq.write_table(pa.table({"text": ["a"]}), sink)
  return sink.getvalue()


PARQUET = parquet()


def table(separator):
  """Returns the rows as Python's own writer has them, from outside of the code under test."""
  text = io.StringIO(newline="")
  writer = csv.DictWriter(text, ["text", "lang"], delimiter=separator)
  writer.writeheader()
  writer.writerows(ROWS)
  return text.getvalue().encode()


FORMS = {
  "a.jsonl": b"\n".join(LINES),
  "a.ndjson": b"\r\n".join(LINES) + b"\r\n",
  "A.JSONL": b"\n".join(LINES) + b"\n",
  "blank.jsonl": b"\n" + b"\n \n".join(LINES) + b"\n\n",
  "mark.jsonl": MARK + b"\n".join(LINES),
  "lines.json": b"\n".join(LINES),
  "array.json": json.dumps(ROWS, indent=1).encode(),
  "mark.Json": MARK + json.dumps(ROWS).encode(),
  "a.csv": table(","),
  "mark.csv": MARK + table(","),
  "a.tsv": table("\t"),
  "a.jsonl.gz": gzip.compress(b"\n".join(LINES)),
  "A.NDJSON.GZ": gzip.compress(b"\n".join(LINES)),
  "a.csv.bz2": bz2.compress(table(",")),
  "a.json.xz": lzma.compress(json.dumps(ROWS).encode()),
  "a.jsonl.zst": pa.compress(b"\n".join(LINES), codec="zstd", asbytes=True),
}


@pytest.mark.parametrize("name", FORMS)
def test_every_form_holds_the_same_rows(tmp_path, name):
  path = tmp_path / name
  path.write_bytes(FORMS[name])
  assert [record.value for record in text_files.read_records(str(path))] == ROWS
  (found, reasons), *more = read_tables(str(path), Columns(["text", "lang"]), 100)
  assert found.to_pylist() == ROWS and not more
  assert not any(mask.any() for masks in reasons.values() for mask in masks.values())


def test_each_line_of_a_text_file_is_a_text_blank_ones_too(tmp_path):
  texts = ["PAR1 and BZh are one", "", "two\rthree", " ", "  four"]
  for name, pack in (("a.txt", bytes), ("a.TXT.gz", gzip.compress)):
    (tmp_path / name).write_bytes(pack(MARK + "\r\n".join(texts).encode()))
    found = list(text_files.read_records(str(tmp_path / name)))
    assert [record.value for record in found] == texts
    assert found[2].where == "line 3"


PACKS = {
  "gz": gzip.compress,
  "bz2": bz2.compress,
  "xz": lzma.compress,
  "zst": lambda content: pa.compress(content, codec="zstd", asbytes=True),
}


@pytest.mark.parametrize("suffix", PACKS)
def test_streams_after_the_first_are_read_or_refused(tmp_path, suffix):
  """Large corpora are packed in many streams, as by pbzip2, pixz or `cat`."""
  path, pack = tmp_path / f"a.txt.{suffix}", PACKS[suffix]
  lines = [f"line {i} of many\n".encode() * 100 for i in range(1000)]
  first, second = (pack(b"".join(part)) for part in (lines[:500], lines[500:]))
  path.write_bytes(first + second)
  read = [record.value for record in text_files.read_records(str(path))]
  assert "\n".join(read) + "\n" == b"".join(lines).decode()
  for damaged in (b"\x01" + second[1:], second[: len(second) // 2], second[:2], b"hello"):
    path.write_bytes(first + damaged)
    with pytest.raises(DataError, match="damaged file: "):
      list(text_files.read_records(str(path)))


def test_streams_of_xz_may_be_padded(tmp_path):
  content = lzma.compress(b"one\n") + bytes(8) + lzma.compress(b"two\n") + bytes(4)
  (tmp_path / "a.txt.xz").write_bytes(content)
  found = text_files.read_records(str(tmp_path / "a.txt.xz"))
  assert [record.value for record in found] == ["one", "two"]


def test_places_are_lines_of_the_file(tmp_path):
  (tmp_path / "a.csv").write_bytes(b'text,lang\n\n"a\nb",x\nc,d,e\n')
  found = list(text_files.read_records(str(tmp_path / "a.csv")))
  assert [record.where for record in found] == ["line 3", "line 5"]
  assert found[1].problem == "it has 3 fields, the header 2"
  (tmp_path / "a.jsonl").write_bytes(b'\n{"text": "a"}\n{\n{"text": "a", "text": "b"}')
  found = list(text_files.read_records(str(tmp_path / "a.jsonl")))
  assert [record.where for record in found] == ["line 2", "line 3", "line 4"]
  assert "Expecting property name" in found[1].problem
  assert found[2].problem == "'text' stands there twice; keep one"


@pytest.mark.parametrize(
  ("name", "content", "message"),
  [
    (
      "a.docx",
      b"text",
      r"a\.docx: its name does not say what it holds; it should end in \.parquet",
    ),
    ("text", b"text", "its name does not say what it holds"),
    ("a.jsonl", b'[{"text": "a"}]', "line 1 begins an array; name a file of one array .json"),
    ("a.txt", b'{"text": "a"}\n', "line 1 is a JSON object; name a file of such lines .jsonl"),
    ("a.txt", "a".encode("utf-16"), "begins as UTF-16; convert it: iconv -f UTF-16 -t UTF-8"),
    ("a.csv", "a".encode("utf-16-be"), "begins with a zero byte; it is no text in UTF-8"),
    ("a.txt", gzip.compress(b"a", mtime=0), "begins as compressed by gzip; add .gz to its name"),
    ("a.txt", bz2.compress(b"a"), "begins as compressed by bzip2; add .bz2 to its name"),
    ("a.jsonl", lzma.compress(b"a"), "begins as compressed by xz; add .xz to its name"),
    ("a.csv", pa.compress(b"a", "zstd", asbytes=True), "begins as compressed by zstd; add .zst"),
    ("a.txt", PARQUET, "begins as a parquet file; name it .parquet"),
    ("a.jsonl.gz", b"{}", "damaged file: Not a gzipped file"),
    ("a.jsonl.zst", b"{}" * 40, "damaged file: "),
    ("a.json", b'[{"text": "a"},', "is not JSON: "),
    ("a.json", b'[{"text": "a", "text": "b"}]', "is not JSON: 'text' stands there twice; keep one"),
    ("a.csv", b"text,text\na,b\n", "its header has the column 'text' twice; rename one"),
    ("a.csv", b'text\n"a\n', r"a\.csv: line 2: a quote that opens there is never closed"),
  ],
)
def test_what_contradicts_the_name_is_one_sentence(tmp_path, name, content, message):
  (tmp_path / name).write_bytes(content)
  with pytest.raises(DataError, match=message) as error:
    list(text_files.read_records(str(tmp_path / name)))
  assert str(tmp_path / name) in str(error.value)


def test_folders_and_files_that_are_not_there_are_named(tmp_path):
  (tmp_path / "a.txt").mkdir()
  for name in ("a.txt", "b.jsonl"):
    with pytest.raises(DataError, match=rf"{tmp_path}/{name} (cannot be read|does not exist)"):
      list(text_files.read_records(str(tmp_path / name)))


def test_a_file_without_a_known_name_may_be_parquet(tmp_path):
  pq.write_table(pa.table({"text": ["a"]}), tmp_path / "part-0001")
  assert text_files.form_of(str(tmp_path / "part-0001")).kind == text_files.PARQUET


@pytest.mark.parametrize("value", ["cut emoji \ud83d", 3, None, b"bytes"])
def test_what_is_no_text_is_refused_by_place(value):
  with pytest.raises(DataError, match=r"^texts\[3\] is no text: "):
    text_files.check_text(value, "texts[3] is no text")


# Parquet.

TEXTS = ["a", None, "ü", "a"]


@pytest.mark.parametrize(
  "column",
  [
    pa.array(TEXTS),
    pa.array(TEXTS, pa.large_string()),
    pa.array(TEXTS).cast(pa.string_view()),
    pa.array(TEXTS).dictionary_encode(),
    pa.array(TEXTS, pa.large_string()).dictionary_encode(),
  ],
  ids=lambda column: str(column.type),
)
def test_texts_of_every_type_are_read(tmp_path, column):
  pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
  ((found, _),) = read_tables(str(tmp_path / "a.parquet"), Columns(["text"]), 10)
  assert found["text"].type == pa.large_string() and found["text"].to_pylist() == TEXTS


def test_labels_numbers_and_absent_languages_are_cast_as_arrow_does(tmp_path):
  columns = {
    "label": pa.array([3, 1, None], pa.int8()),
    "score": pa.array([0.25, 0.5, None]).cast(pa.decimal128(10, 4)),
    "lang": pa.nulls(3),
  }
  pq.write_table(pa.table(columns), tmp_path / "a.parquet")
  wanted = Columns([], optional=["lang"], labels=["label"], numbers=["score"])
  ((found, _),) = read_tables(str(tmp_path / "a.parquet"), wanted, 10)
  assert found.to_pydict() == {
    "label": ["3", "1", None],
    "score": [0.25, 0.5, None],
    "lang": [None] * 3,
  }
  with pytest.raises(DataError, match=r"column label holds int8, expected string"):
    list(read_tables(str(tmp_path / "a.parquet"), Columns(["label"]), 10))


def test_bytes_that_are_no_utf_8_are_found_in_every_type():
  good = pa.array([b"a", b"caf\xe9", None], pa.binary())
  plain = pa.Array.from_buffers(pa.string(), 3, good.buffers())
  for column in (plain, plain.cast(pa.string_view()), plain.dictionary_encode()):
    table_, invalid = cast(pa.table({"text": column}))
    assert table_["text"].to_pylist() == ["a", None, None]
    np.testing.assert_array_equal(invalid["text"], [False, True, False])


# Training rows of such files.


def test_training_rows_are_those_of_any_form(tmp_path):
  described = entry("scored_pairs", 0, "Compare.")
  (tmp_path / "a.csv").write_text("query,passage,score\na,b,0.5\nc,d,\ne,f,x\ng,h\n")
  (chunk,) = rows.read_chunks(File("a.csv", described, str(tmp_path)))
  assert chunk.rows.select(["row", "query", "score"]).to_pylist() == [
    {"row": 0, "query": "a", "score": 0.5}
  ]
  assert {reason: of.examples for reason, of in chunk.dropped.items()} == {
    "null": [1],
    "wrong_type": [2],
    "wrong_fields": [3],
  }
  (tmp_path / "a.txt").write_text("query\n")
  with pytest.raises(DataError, match=r"a file of texts has no columns; write \.jsonl, \.csv"):
    rows.check_file(File("a.txt", described, str(tmp_path)))


@pytest.mark.parametrize(
  ("name", "separator", "said"),
  [
    ("a.csv", ";", "its header has ';' between its fields, expected ','; write the file with"),
    ("a.csv", "\t", r"its header has '\\t' between its fields, expected ','; write the file with"),
    ("a.tsv", ",", r"its header has ',' between its fields, expected '\\t'; write the file with"),
    ("a.tsv", ";", r"its header has ';' between its fields, expected '\\t'; write the file with"),
    ("a.csv", "; ", "columns query, passage are missing"),
  ],
)
def test_another_separator_is_named(tmp_path, name, separator, said):
  (tmp_path / name).write_text(separator.join(["query", "passage"]) + "\na\n")
  with pytest.raises(DataError, match=said):
    rows.check_file(File(name, entry("bitext", 0, "Translate."), str(tmp_path)))
