"""What a path of a manifest names: shards by a pattern, and folders that `datasets` saved."""

import io
import json
import re
import struct
import zipfile

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mlembed_jax.data import rows
from mlembed_jax.data.manifest import File
from mlembed_jax.data.shards import paths_of
from mlembed_jax.data.texts import read_texts
from mlembed_jax.errors import DataError
from tests.material import entry, pairs, prepare_dataset, scored, write_files, write_parquet

BITEXT = entry("bitext", 2, "Translate.")
COLUMNS = pairs(50, 2)


def described(folder, path, **changes):
  return File("all", BITEXT | {"path": path} | changes, str(folder))


def read(file):
  """Returns the rows as they are read, and their numbers in the file."""
  rows.check_file(file)
  found, numbers = [], []
  for chunk in rows.read_chunks(file):
    texts = chunk.texts["text"].to_pylist()
    for row in chunk.rows.to_pylist():
      numbers.append(row.pop("row"))
      found.append(row | {"documents": [texts[place] for place in row["documents"]]})
  return found, numbers


@pytest.fixture
def expected(tmp_path):
  write_parquet(tmp_path / "whole.parquet", COLUMNS)
  return read(described(tmp_path, "whole.parquet"))


def cut(table, count):
  size = -(-len(table) // count)
  return [table.slice(start, size) for start in range(0, len(table), size)]


def test_shards_of_a_pattern_are_one_file_in_the_order_of_their_names(tmp_path, expected):
  (tmp_path / "data").mkdir()
  for k, part in enumerate(cut(pa.table(COLUMNS), 3)):
    pq.write_table(part, tmp_path / f"data/train-0000{k}-of-00003.parquet")
  assert read(described(tmp_path, "data/train-*.parquet")) == expected
  with pytest.raises(DataError, match=r"^all: .*/test-\*\.parquet matches no file; \* stands for"):
    rows.check_file(described(tmp_path, "data/test-*.parquet"))


@pytest.mark.parametrize("place", ["memory", "zip"])
def test_shards_may_lie_in_a_store_or_an_archive(tmp_path, expected, place):
  contents = {}
  for k, part in enumerate(cut(pa.table(COLUMNS), 3)):
    pq.write_table(part, sink := io.BytesIO())
    contents[f"data/train-{k}.parquet"] = sink.getvalue()
  with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
    for name, content in contents.items():
      archive.writestr(name, content)
      with fsspec.open(f"memory://shards/{name}", "wb") as opened:
        opened.write(content)
  path = {"memory": "memory://shards/data/*", "zip": f"zip://data/*::file://{tmp_path}/all.zip"}
  assert read(described(tmp_path, path[place])) == expected


def test_a_shard_without_rows_is_fine_unless_all_are(tmp_path, expected):
  table = pa.table(COLUMNS)
  pq.write_table(table.slice(0, 0), tmp_path / "a-0.parquet")
  with pytest.raises(DataError, match=r"a-0\.parquet: no rows"):
    rows.check_file(described(tmp_path, "a-*.parquet"))
  pq.write_table(table, tmp_path / "a-1.parquet")
  assert read(described(tmp_path, "a-*.parquet")) == expected


def test_a_shard_of_other_columns_is_refused_by_its_own_name(tmp_path):
  write_parquet(tmp_path / "a-0.parquet", COLUMNS)
  write_parquet(tmp_path / "a-1.parquet", {n: COLUMNS[n] for n in COLUMNS if n != "passage"})
  with pytest.raises(DataError, match=r"a-1\.parquet: column passage is missing"):
    rows.check_file(described(tmp_path, "a-*.parquet"))


def test_a_dataset_notices_that_a_shard_changed(tmp_path, data):
  (tmp_path / "tokenizer.json").write_bytes((data / "tokenizer.json").read_bytes())
  parts = [pa.table(pairs(150, 2)).slice(start, 75).to_pydict() for start in (0, 75)]
  write_files(tmp_path, {"whole.parquet": (pairs(150, 2), BITEXT)})
  whole = prepare_dataset(tmp_path, "whole.parquet", out="whole")
  for k, part in enumerate(parts):
    write_parquet(tmp_path / f"a-{k}.parquet", part)
  files = {"train/a": BITEXT | {"path": "a-*.parquet"}}
  (tmp_path / "manifest.json").write_text(json.dumps(files))
  sharded = prepare_dataset(tmp_path)
  counts = [json.loads((d / "prepare_report.json").read_text())["totals"] for d in (whole, sharded)]
  assert counts[0] == counts[1]
  write_parquet(tmp_path / "a-1.parquet", parts[0])
  with pytest.raises(DataError, match="of other input: size or number of train/a differ"):
    prepare_dataset(tmp_path)


# Arrow files.


def as_stream(table, batch=7, new=pa.ipc.new_stream, **options):
  sink = pa.BufferOutputStream()
  with new(sink, table.schema, **options) as writer:
    writer.write_table(table, max_chunksize=batch)
  return sink.getvalue().to_pybytes()


KINDS = {
  "stream": as_stream,
  "file": lambda table: as_stream(table, new=pa.ipc.new_file),
  "zstd": lambda table: as_stream(table, options=pa.ipc.IpcWriteOptions(compression="zstd")),
  "large": lambda table: as_stream(
    table.cast(pa.schema([(name, pa.large_string()) for name in table.column_names]))
  ),
  "views": lambda table: as_stream(
    table.cast(pa.schema([(name, pa.string_view()) for name in table.column_names]))
  ),
  "categories": lambda table: as_stream(
    pa.table({name: table[name].dictionary_encode() for name in table.column_names})
  ),
}


@pytest.mark.parametrize("size", [5, 7, 20, 1000])
@pytest.mark.parametrize("kind", KINDS)
def test_arrow_files_hold_the_same_rows(tmp_path, monkeypatch, expected, kind, size):
  monkeypatch.setattr(rows, "CHUNK", size)
  (tmp_path / "a.arrow").write_bytes(KINDS[kind](pa.table(COLUMNS)))
  file = described(tmp_path, "a.arrow")
  assert read(file) == expected
  reads = [chunk.read for chunk in rows.read_chunks(file)]
  assert reads == [min(size, 50 - start) for start in range(0, 50, size)]
  assert list(read_texts(file.path, "passage")) == COLUMNS["passage"]


@pytest.mark.parametrize("kind", ["stream", "file"])
def test_an_arrow_file_without_rows_is_an_empty_shard(tmp_path, expected, kind):
  new = pa.ipc.new_file if kind == "file" else pa.ipc.new_stream
  (tmp_path / "a-0.arrow").write_bytes(as_stream(pa.table(COLUMNS).slice(0, 0), new=new))
  (tmp_path / "a-1.arrow").write_bytes(as_stream(pa.table(COLUMNS)))
  assert read(described(tmp_path, "a-*.arrow")) == expected


@pytest.mark.parametrize("content", [None, b"no archive"])
def test_an_archive_that_cannot_be_opened_is_named(tmp_path, content):
  if content:
    (tmp_path / "a.zip").write_bytes(content)
  path = f"zip://a.parquet::{tmp_path}/a.zip"
  with pytest.raises(DataError, match=re.escape(path)):
    paths_of(described(tmp_path, path))
  with pytest.raises(DataError, match=r"\* may stand before the first :: alone"):
    paths_of(described(tmp_path, f"zip://a.parquet::{tmp_path}/*.zip"))


def test_a_score_is_named_by_shard_and_row(tmp_path):
  table = pa.table(scored(20))
  bad = table.set_column(table.column_names.index("score"), "score", [pa.array([0.5] * 19 + [2.0])])
  for k, part in enumerate((table, bad)):
    pq.write_table(part, tmp_path / f"a-{k}.parquet")
  file = File("all", entry("scored_pairs", 0, "Compare.") | {"path": "a-*.parquet"}, str(tmp_path))
  with pytest.raises(DataError, match=r"a-1\.parquet: row 19: score 2\.0 is not in \[0, 1\]"):
    list(rows.read_chunks(file))


def test_a_damaged_arrow_file_is_named(tmp_path):
  content, path = as_stream(pa.table(COLUMNS)), tmp_path / "a.arrow"
  file = described(tmp_path, "a.arrow")
  for damaged in (b"", b"query,passage\n", content[:9], content[: len(content) // 2], content[:-8]):
    path.write_bytes(damaged)
    with pytest.raises(DataError, match=r"a\.arrow: (not a readable|damaged) Arrow file: "):
      read(file)
  offsets = struct.pack("<2i", 0, len(COLUMNS["query"][0].encode()))
  place = content.index(offsets) + 4
  path.write_bytes(content[:place] + struct.pack("<i", 2**30) + content[place + 4 :])
  with pytest.raises(DataError, match=r"a\.arrow: damaged Arrow file: "):
    read(file)


def test_bytes_that_are_no_utf_8_leave_out_their_row(tmp_path):
  plain = pa.array([b"a", b"caf\xe9", b"b"], pa.binary())
  texts = pa.Array.from_buffers(pa.string(), 3, plain.buffers())
  columns = {"query": texts, "passage": ["x"] * 3, "lang": ["de"] * 3}
  (tmp_path / "a.arrow").write_bytes(as_stream(pa.table(columns)))
  (chunk,) = rows.read_chunks(described(tmp_path, "a.arrow", negatives=0))
  (why,) = chunk.dropped.items()
  assert why == ("invalid_utf8", rows.Dropped(1, [1], {"query": 1}))


# Folders of Hugging Face datasets, written by itself.


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  datasets = pytest.importorskip("datasets")
  folder = tmp_path_factory.mktemp("saved")
  made = datasets.Dataset.from_dict(COLUMNS)
  made.save_to_disk(folder / "one")
  made.save_to_disk(folder / "three", num_shards=3)
  made.shuffle(seed=0).save_to_disk(folder / "shuffled")
  datasets.DatasetDict(train=made, test=made).save_to_disk(folder / "both")
  return folder


@pytest.mark.parametrize("path", ["one", "three", "three/", "both/train"])
def test_what_datasets_saved_is_read(saved, expected, path):
  assert read(described(saved, path)) == expected


def test_rows_of_a_saved_dataset_are_in_its_order(saved):
  datasets = pytest.importorskip("datasets")
  wanted = datasets.load_from_disk(saved / "shuffled")["query"]
  assert [row["query"] for row in read(described(saved, "shuffled"))[0]] == list(wanted)
  assert list(wanted) != COLUMNS["query"]


def test_a_folder_of_splits_is_refused_with_their_paths(saved):
  with pytest.raises(DataError, match=r"several splits; give one as path: .*both/train or .*/test"):
    paths_of(described(saved, "both"))


def test_other_folders_are_refused(tmp_path):
  with pytest.raises(DataError, match=r"is a folder, and none of datasets.save_to_disk; name its"):
    paths_of(described(tmp_path, "."))
  for content, message in (
    ("{", r"state\.json is not JSON"),
    ("[]", r"state\.json holds no JSON object"),
    ("{}", r"state\.json names no files"),
    ('{"_data_files": [3]}', r"state\.json names no files"),
  ):
    (tmp_path / "state.json").write_text(content)
    with pytest.raises(DataError, match=message):
      paths_of(described(tmp_path, "."))
