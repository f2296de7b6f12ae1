"""Damaged files of a prepared dataset and of an encoding: noticed, or without any effect.

--faults=long makes twenty flips of each kind of file, and prints the table with -s.
"""

import collections
import contextlib
import io
import pathlib
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest

from mlembed_jax.data import catalog, records
from mlembed_jax.errors import MlembedError
from tests.data.test_loader import same
from tests.faults import damage, encode_run
from tests.faults.damage import DETECTED, HARMLESS, SILENT
from tests.material import (
  batches_of,
  entry,
  pairs,
  prepare_dataset,
  write_files,
  write_vectors,
)

KINDS = {
  "records of rows": "mlembed-train.array_record-00000-of-00002",
  "records of documents": "mlembed-documents.array_record-00003-of-00008",
  "lengths": "mlembed-train.array_record-00000-of-00002.lengths.npy",
  "vectors": "mlembed-train.array_record-00000-of-00002.vectors.npy",
  "checksums": "mlembed-train.array_record-00000-of-00002.vectors.npy.crc32.npy",
  "catalog.json": "catalog.json",
  "tokenizer.json": "tokenizer.json",
  "features.json": "features.json",
}
STEPS = 20  # of 8 rows: every row of both files comes at least once


@pytest.fixture(scope="module")
def flips(request):
  return 20 if request.config.getoption("--faults") == "long" else 3


@pytest.fixture(scope="module")
def table():
  """What came of each damage; printed at the end."""
  found = collections.Counter()
  yield found
  print("\n" + "\n".join(damage.lines(found)))


@pytest.fixture(scope="module")
def folder(data, tmp_path_factory):
  """Two files, one with a teacher's vectors, and their dataset."""
  folder = tmp_path_factory.mktemp("damage")
  shapes = {"query": (80, 8), "passage": (80, 8)}
  taught = {"teacher_vectors": write_vectors(folder, "a", shapes)}
  described = entry("retrieval", 2, "Find.")
  files = {
    "train/a.parquet": (pairs(80, 2), described | taught),
    "train/b.parquet": (pairs(40, 1), entry("classification", 1, "Sort.")),
  }
  write_files(folder, files)
  shutil.copyfile(data / "tokenizer.json", folder / "tokenizer.json")
  prepare_dataset(folder)
  return folder


def read(dataset):
  """Returns all batches of some epochs, on two devices and with the teacher's vectors."""
  options = {"shards": 2, "steps": STEPS, "batch_size": 8, "teacher_vectors": True}
  batches = batches_of(dataset, ["train/a.parquet"], **options)
  plain = batches_of(dataset, **options | {"teacher_vectors": False})
  return [found[step] for found in (batches, plain) for step in range(STEPS)]


@pytest.fixture(scope="module")
def expected(folder):
  return read(folder / "dataset")


@pytest.fixture(scope="module")
def content(folder):
  return {path.name: path.read_bytes() for path in (folder / "dataset").iterdir()}


@pytest.fixture
def whole(folder, content):
  """Makes the dataset whole again after a test."""
  yield folder / "dataset"
  restore(folder / "dataset", content)


def restore(dataset, content):
  shutil.rmtree(dataset / ".work", ignore_errors=True)
  for name, value in content.items():
    if not (dataset / name).is_file() or (dataset / name).read_bytes() != value:
      (dataset / name).write_bytes(value)


def trained(dataset, expected):
  """Returns what reading batches makes of a damage."""
  try:
    found = read(dataset)
  except MlembedError:
    return DETECTED
  return HARMLESS if all(map(same, found, expected)) else SILENT


def prepared(folder, content, quick):
  """Returns what preparing again makes of a damage: it is mended with a sentence, or refused."""
  said = io.StringIO()
  try:
    with contextlib.redirect_stdout(said):
      prepare_dataset(folder, quick=quick)
  except MlembedError:
    return DETECTED
  now = {path.name: path.read_bytes() for path in (folder / "dataset").iterdir()}
  if now == content:
    return DETECTED if "is written again" in said.getvalue() else HARMLESS
  return SILENT


@pytest.mark.parametrize("kind", KINDS)
def test_no_damage_changes_a_batch_silently(whole, content, expected, table, flips, kind):
  path = whole / KINDS[kind]
  for way, seed in damage.ways(flips):
    done = damage.damage(path, way, seed)
    outcome = trained(whole, expected)
    table[kind, way, "batches", outcome] += 1
    assert outcome != SILENT, done
    restore(whole, content)


@pytest.mark.parametrize("kind", KINDS)
def test_preparing_again_mends_or_refuses_every_damage(folder, whole, content, table, flips, kind):
  path = whole / KINDS[kind]
  for way, seed in damage.ways(max(1, flips // 3) if flips < 20 else flips):
    done = damage.damage(path, way, seed)
    outcome = prepared(folder, content, quick=False)
    table[kind, way, "prepare", outcome] += 1
    assert outcome == DETECTED or (kind == "catalog.json" and outcome == HARMLESS), done
    restore(whole, content)


@pytest.mark.parametrize("kind", KINDS)
def test_a_quick_check_notices_all_but_flips(folder, whole, content, table, kind):
  path = whole / KINDS[kind]
  for way, seed in damage.ways(0):
    damage.damage(path, way, seed)
    outcome = prepared(folder, content, quick=True)
    table[kind, way, "prepare --quick", outcome] += 1
    assert outcome == DETECTED, way
    restore(whole, content)


def test_a_digit_of_the_catalog_that_is_another_is_noticed(folder, whole, content, expected):
  """It is JSON as before, and most of its numbers decide which rows a step has."""
  path = whole / "catalog.json"
  text = path.read_text()
  digits = [match.start() for match in re.finditer(r"[0-9]", text)]
  for place in digits[:: len(digits) // 12]:
    path.write_text(text[:place] + str(9 - int(text[place])) + text[place + 1 :])
    assert trained(whole, expected) == prepared(folder, content, quick=True) == DETECTED


def test_only_what_is_damaged_is_written_again(folder, whole, content):
  """Both a partition of documents and what stands beside rows, in a folder of many files."""
  times = {path.name: path.stat().st_mtime_ns for path in whole.iterdir()}
  for kind in ("records of documents", "vectors"):
    damage.flip(whole / KINDS[kind], 1)
  assert prepared(folder, content, quick=False) == DETECTED
  now = {path.name: path.stat().st_mtime_ns for path in whole.iterdir()}
  written = {name for name in now if now[name] != times[name] and "mlembed" in name}
  rows = KINDS["records of rows"]
  shard = {
    rows + suffix for suffix in ("", ".lengths.npy", ".vectors.npy", ".vectors.npy.crc32.npy")
  }
  shard |= {name.replace("train", "validation") for name in shard}
  assert written == shard | {KINDS["records of documents"]}


def test_a_folder_of_an_earlier_version_is_read_and_said_to_be_unchecked(
  folder, whole, expected, capsys
):
  path = whole / "catalog.json"
  value = catalog.read_catalog(whole)
  assert value is not None
  first = {name: value[name] for name in ("plan", "shards", "documents", "fingerprint")}
  path.write_text(catalog.json.dumps(first))
  assert all(map(same, read(whole), expected))
  assert "was prepared by an earlier version, which kept no digests" in capsys.readouterr().err
  prepare_dataset(folder)
  assert "kept no digests" in capsys.readouterr().out
  (whole / KINDS["lengths"]).unlink()
  prepare_dataset(folder)
  assert f"{KINDS['lengths']} is missing; it is written again" in capsys.readouterr().out
  assert all(map(same, read(whole), expected))


def test_a_batch_reads_its_own_rows_of_vectors_alone(whole, expected):
  """A batch of training touches nearly all files, which it cannot read whole."""
  path = whole / KINDS["vectors"]
  batches = batches_of(whole, ["train/a.parquet"], batch_size=8, shards=2, teacher_vectors=True)
  offset, size = np.load(path, mmap_mode="r").offset, np.load(path)[0].nbytes
  order = np.concatenate([batches._split.rows.place(*_chosen(batches, n)) for n in range(2)])
  first, later = order[:8], np.setdiff1d(order[8:], order[:8])[0]
  content = bytearray(path.read_bytes())
  content[offset + later * size] ^= 1
  path.write_bytes(content)
  assert same(batches[0], expected[0]) and later not in first
  with pytest.raises(MlembedError, match=rf"vectors.npy: row {later} is damaged; restore it"):
    batches[1]


def _chosen(batches, step):
  return batches._order[step].units, batches._order[step].rows


def test_the_header_of_vectors_has_a_checksum(whole):
  """Another type of the same size would give other numbers from the same bytes."""
  path = whole / KINDS["vectors"]
  path.write_bytes(path.read_bytes().replace(b"'<f4'", b"'<i4'", 1))
  with pytest.raises(MlembedError, match=r"vectors.npy: its header is damaged; restore it"):
    read(whole)


def test_vectors_without_checksums_are_read_with_a_note_and_get_them_by_preparing_again(
  folder, whole, content, expected, capsys
):
  path = whole / "catalog.json"
  value = catalog.read_catalog(whole)
  assert value is not None
  value["files"] = {n: v for n, v in value["files"].items() if not n.endswith(".crc32.npy")}
  catalog.write_object(path, value)
  for sums in whole.glob("*.crc32.npy"):
    sums.unlink()
  assert all(map(same, read(whole), expected))
  assert "which kept no checksums of a teacher's vectors" in capsys.readouterr().err
  assert prepared(folder, content, quick=True) == DETECTED
  read(whole)
  assert "checksums" not in capsys.readouterr().err


def test_a_file_that_vanishes_while_it_is_used_is_said_to_be_missing(whole):
  found = catalog.load_catalog(whole).records(records.TRAIN)
  (whole / KINDS["records of rows"]).unlink()
  with pytest.raises(MlembedError, match="record 0 cannot be read: the file is missing; restore"):
    found[0]


# Encoding.


@pytest.mark.parametrize("kind", ["encode part", "encode ranges"])
def test_a_damaged_part_is_encoded_again(tmp_path, monkeypatch, table, flips, capsys, kind):
  out = tmp_path / "v.npy"
  encode_run.run(out)
  vectors, ranges = encode_run.content(out)
  monkeypatch.setattr(encode_run.encode, "finish", lambda *_: None)  # as if killed before the end
  encode_run.run(out)
  parts = tmp_path / "v.npy.parts"
  saved = {path: path.read_bytes() for path in parts.iterdir()}
  (path,) = parts.glob({"encode part": "00000001-*", "encode ranges": "ranges-*"}[kind])
  monkeypatch.undo()
  for way, seed in damage.ways(flips):
    done = damage.damage(path, way, seed)
    encode_run.run(out)
    right = encode_run.same(encode_run.content(out), (vectors, ranges))
    said = "is damaged; its texts are encoded again" in capsys.readouterr().err
    outcome = (DETECTED if said or way == "deleted" else HARMLESS) if right else SILENT
    table[kind, way, "encode", outcome] += 1
    assert outcome == DETECTED, done
    parts.mkdir()
    for name, value in saved.items():
      name.write_bytes(value)


def test_an_encoding_that_is_killed_at_any_operation_ends_right(tmp_path):
  """Over vectors whose ranges differ, or are there before or after alone."""
  root = pathlib.Path(__file__).parents[2]
  arguments = [sys.executable, "-m", "tests.faults.encode_run", tmp_path / "run/v.npy"]
  found = subprocess.run(arguments, cwd=root, capture_output=True, text=True, check=True)
  outcomes = [line.split() for line in found.stdout.splitlines()]
  for ends in ("int8-int8", "int8-float32", "float32-int8"):
    states = [state for name, state, *_ in outcomes if name.startswith(ends)]
    assert len(states) > 20 and set(states) == {"none", "old", "new"}, ends
  assert [rest for _, _, *rest in outcomes] == [["whole", "right"]] * len(outcomes), found.stdout


def test_parts_that_were_rounded_by_other_ranges_are_not_taken(tmp_path):
  out, other = tmp_path / "v.npy", tmp_path / "other/v.npy"
  other.parent.mkdir()
  encode_run.run(other)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(encode_run.encode, "finish", lambda *_: None)  # as if killed before the end
    encode_run.run(out, np.array([[-9.0] * encode_run.DIM, [9.0] * encode_run.DIM], np.float32))
  assert len(list((tmp_path / "v.npy.parts").glob("0*.npy"))) == encode_run.PARTS
  encode_run.run(out)
  assert encode_run.same(encode_run.content(out), encode_run.content(other))


def test_ranges_of_a_file_are_used_for_every_part(tmp_path):
  ranges = np.array([[-9.0] * encode_run.DIM, [9.0] * encode_run.DIM], np.float32)
  out = tmp_path / "v.npy"
  encode_run.run(out, ranges, encode_run.TEXTS[:7])
  vectors, found = encode_run.content(out)
  wanted = encode_run.quantize(encode_run.model(encode_run.TEXTS[:7]), "int8", ranges)
  np.testing.assert_array_equal(vectors, wanted)
  np.testing.assert_array_equal(found, ranges)
  with pytest.raises(MlembedError, match=r"int8 needs ranges of at least 100 texts, .* has 7"):
    encode_run.run(out, texts=encode_run.TEXTS[:7])
