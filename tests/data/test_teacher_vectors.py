"""A teacher's vectors stored beside the data: the right ones reach the batch, misfits are named."""

import json
import re

import numpy as np
import pyarrow.parquet as pq
import pytest

from mlembed_jax.data import batching, rows, vectors
from mlembed_jax.errors import DataError
from tests.material import (
  batches_of,
  entry,
  pairs,
  prepare_dataset,
  scored,
  with_positives,
  write_files,
  write_vectors,
)

ROWS, WIDTH = 50, 8
UNUSABLE = (0, 7, 31)
SHAPES = {"query": (ROWS, WIDTH), "passage": (ROWS, WIDTH), "negatives": (ROWS, 4, WIDTH)}


@pytest.fixture(autouse=True)
def opened_anew():
  """Tests write other files under the same names."""
  vectors._open.cache_clear()


@pytest.fixture
def prepare(data, tmp_path):
  """Returns what writes and prepares a file of 50 rows, three of them unusable."""

  def write(shapes, *, name="a", dtype=np.float32, seed=0, more=None, out="dataset", **changes):
    columns = with_positives(pairs(ROWS, 4), 3)
    for row in UNUSABLE:
      columns["query"][row] = " "
    if shapes:
      paths = write_vectors(tmp_path, name, shapes, dtype, seed)
    else:
      paths = {key: f"{name}.{key}.npy" for key in SHAPES}
    fields = {"task_type": "retrieval", "teacher_vectors": paths} | changes
    described = entry("retrieval", 4, "Find.") | fields
    write_files(tmp_path, {f"{name}.parquet": (columns, described)} | (more or {}))
    return prepare_dataset(tmp_path, "*", data / "tokenizer.json", out=out)

  return write


def without(key):
  return {name: shape for name, shape in SHAPES.items() if name != key}


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("positives", [1, 3])
@pytest.mark.parametrize("stored", [True, False])
@pytest.mark.parametrize("chunk", [10**6, 11])
def test_a_batch_holds_the_vectors_of_its_texts(
  tmp_path, monkeypatch, prepare, dtype, positives, stored, chunk
):
  monkeypatch.setattr(rows, "CHUNK", chunk)
  shapes = SHAPES if stored else without("negatives")
  if positives > 1:
    shapes = shapes | {"passage": (ROWS, positives, WIDTH)}
  dataset = prepare(shapes, dtype=dtype, positives=positives)
  files = {key: np.load(tmp_path / f"a.{key}.npy") for key in shapes}
  texts = pq.read_table(tmp_path / "a.parquet")["query"].to_pylist()
  options = {"negatives": {"retrieval": 2}, "seed": 1, "teacher_vectors": True}
  batches = batches_of(dataset, **options)
  for step in range(6):
    batch = batches[step]
    chosen = batching.negative_columns(4, 2, 1, step)
    assert batch.teacher.shape == (16, 1 + positives + 2 * stored, WIDTH)
    assert batch.teacher.dtype == np.float32 and batch.arrays().teacher is batch.teacher
    assert not set(UNUSABLE) & set(batch.rows)
    for row, hashes, found in zip(batch.rows, batch.hashes, batch.teacher, strict=True):
      assert hashes[0].tobytes() == rows.hash64([texts[row]]).tobytes()
      np.testing.assert_array_equal(found[0], files["query"][row])
      passages = files["passage"][row].reshape(positives, WIDTH)
      np.testing.assert_array_equal(found[1 : 1 + positives], passages)
      if stored:
        np.testing.assert_array_equal(found[1 + positives :], files["negatives"][row][chosen])


def test_stored_vectors_keep_their_type_and_the_order_of_the_rows(tmp_path, prepare):
  dataset = prepare(SHAPES, dtype=np.float16)
  (path,) = dataset.glob("mlembed-train*.vectors.npy")
  found = np.load(path)
  assert found.dtype == np.float16 and found.shape[1:] == (1 + 1 + 4, WIDTH)
  lengths = np.load(path.with_name(path.name.replace("vectors", "lengths")))
  assert len(lengths) == len(found)


def test_hosts_hold_the_parts_of_one_global_batch(prepare):
  dataset = prepare(SHAPES)
  options = {"shards": 4, "teacher_vectors": True}
  parts = [batches_of(dataset, process=p, processes=4, **options)[3].teacher for p in range(4)]
  whole = batches_of(dataset, **options)[3].teacher
  np.testing.assert_array_equal(np.concatenate(parts), whole)


def test_scored_pairs_have_vectors_too(data, tmp_path):
  paths = write_vectors(tmp_path, "sts", without("negatives"))
  described = entry("scored_pairs", 0, "") | {"teacher_vectors": paths}
  write_files(tmp_path, {"sts.parquet": (scored(ROWS), described)})
  dataset = prepare_dataset(tmp_path, "*", data / "tokenizer.json")
  batch = batches_of(dataset, teacher_vectors=True)[0]
  passages = np.load(tmp_path / "sts.passage.npy")[batch.rows]
  np.testing.assert_array_equal(batch.teacher[:, 1], passages)
  assert batch.arrays().scores is batch.scores and batch.arrays().teacher is batch.teacher


def test_files_may_hold_columns_first(tmp_path, prepare):
  first = prepare(SHAPES)
  for key in SHAPES:
    np.save(tmp_path / f"a.{key}.npy", np.asfortranarray(np.load(tmp_path / f"a.{key}.npy")))
  vectors._open.cache_clear()
  assert not vectors._open(str(tmp_path / "a.negatives.npy")).flags.c_contiguous
  second = prepare({}, out="second")
  for path in first.glob("*.vectors.npy"):
    assert path.read_bytes() == (second / path.name).read_bytes()


def test_vectors_are_read_only_when_asked_for(prepare):
  dataset = prepare(SHAPES)
  batch = batches_of(dataset)[0]
  assert batch.teacher is None and batch.arrays().teacher is None
  for path in dataset.glob("*train*.vectors.npy"):
    path.unlink()
  with pytest.raises(DataError, match=r"vectors\.npy is missing; copy the whole folder"):
    batches_of(dataset, teacher_vectors=True)


def test_a_file_without_a_teacher_is_trained_beside_one_with(prepare):
  plain = {"plain.parquet": (pairs(ROWS, 0), entry("bitext", 0, ""))}
  batches = batches_of(prepare(SHAPES, more=plain), teacher_vectors=True)
  found = {(batches[n].dataset, batches[n].teacher is None) for n in range(12)}
  assert found == {("a.parquet", False), ("plain.parquet", True)}


def test_each_file_of_vectors_counts_in_the_fingerprint(tmp_path, prepare):
  def fingerprint(out):
    return json.loads((prepare({}, out=out) / "catalog.json").read_text())["fingerprint"]

  write_vectors(tmp_path, "a", SHAPES)
  prints = {fingerprint("same"), fingerprint("again")}
  assert len(prints) == 1
  for key in SHAPES:
    path = tmp_path / f"a.{key}.npy"
    values = np.load(path)
    values[-1] = 1
    np.save(path, values)
    vectors._open.cache_clear()
    prints.add(fingerprint(key))
  assert len(prints) == 4


# Refusals.


@pytest.mark.parametrize(
  ("key", "shape", "positives", "message"),
  [
    ("query", (47, 8), 1, "a.query.npy: expected [50, D], found [47, 8]"),
    ("query", (51, 8), 1, "a.query.npy: expected [50, D], found [51, 8]"),
    ("query", (50,), 1, "a.query.npy: expected [50, D], found [50]"),
    ("query", (50, 1, 8), 1, "a.query.npy: expected [50, D], found [50, 1, 8]"),
    ("passage", (51, 8), 1, "a.passage.npy: expected [50, D], found [51, 8]"),
    ("passage", (0, 8), 1, "a.passage.npy: expected [50, D], found [0, 8]"),
    ("passage", (50, 9), 1, "a.passage.npy: its vectors are 9 numbers wide, but"),
    ("passage", (50, 3, 8), 1, "a.passage.npy: expected [50, D], found [50, 3, 8]"),
    ("passage", (50, 8), 3, "a.passage.npy: expected [50, 3, D], found [50, 8]"),
    ("passage", (50, 2, 8), 3, "a.passage.npy: expected [50, 3, D], found [50, 2, 8]"),
    ("negatives", (50, 8), 1, "a.negatives.npy: expected [50, 4, D], found [50, 8]"),
    ("negatives", (50, 3, 8), 1, "a.negatives.npy: expected [50, 4, D], found [50, 3, 8]"),
    ("negatives", (50, 4, 4), 1, "a.negatives.npy: its vectors are 4 numbers wide, but"),
  ],
)
def test_a_shape_that_does_not_fit_is_refused(prepare, key, shape, positives, message):
  fitting = {"passage": (ROWS, positives, WIDTH)} if positives > 1 else {}
  with pytest.raises(DataError) as error:
    prepare(SHAPES | fitting | {key: shape}, positives=positives)
  assert message.replace("[50,", f"[{ROWS},") in str(error.value)
  advice = "write the vectors of every row of a.parquet, unusable ones too, in order"
  assert (advice in str(error.value)) == ("expected" in message)


@pytest.mark.parametrize("dtype", [np.float64, np.int8, ">f4"])
def test_another_type_is_refused(prepare, dtype):
  message = rf"a\.query\.npy: expected float16 or float32, found {np.dtype(dtype)}"
  with pytest.raises(DataError, match=message):
    prepare(SHAPES, dtype=dtype)


def test_a_missing_file_is_refused(prepare):
  absent = {"query": "a.query.npy", "passage": "gone/a.npy"}
  with pytest.raises(DataError, match=r"gone/a\.npy: this file of teacher_vectors does not exist"):
    prepare(SHAPES, teacher_vectors=absent)


@pytest.mark.parametrize("name", ["packed.npz", "cut.npy", "text.npy", "empty.npy", "a.parquet"])
def test_a_file_that_is_no_npy_is_refused(tmp_path, prepare, name):
  prepare(SHAPES)
  np.savez(tmp_path / "packed.npz", np.zeros((ROWS, WIDTH), np.float32))
  (tmp_path / "cut.npy").write_bytes((tmp_path / "a.query.npy").read_bytes()[:-9])
  (tmp_path / "text.npy").write_text("no vectors")
  (tmp_path / "empty.npy").write_bytes(b"")
  with pytest.raises(DataError, match=rf"{re.escape(name)}: not a readable \.npy file: "):
    prepare(SHAPES, teacher_vectors={"query": name, "passage": "a.passage.npy"})


def test_a_file_of_one_number_is_refused(tmp_path, prepare):
  np.save(tmp_path / "one.npy", np.float32(1))
  with pytest.raises(DataError, match=r"one\.npy: holds one number, expected \[rows, D\]"):
    prepare(SHAPES, teacher_vectors={"query": "one.npy", "passage": "a.passage.npy"})


@pytest.mark.parametrize("key", SHAPES)
@pytest.mark.parametrize(
  ("value", "message"),
  [(np.nan, "holds NaN or inf"), (np.inf, "holds NaN or inf"), (0, "holds a vector of zeros")],
)
def test_a_useless_vector_is_refused_with_its_row(tmp_path, prepare, key, value, message):
  write_vectors(tmp_path, "a", SHAPES, np.float16)
  path = tmp_path / f"a.{key}.npy"
  stored = np.load(path)
  stored[list(UNUSABLE)] = np.nan  # never read
  np.save(path, stored)
  prepare({}, out="first")
  stored[ROWS - 1] *= value
  np.save(path, stored)
  vectors._open.cache_clear()
  with pytest.raises(DataError, match=rf"a\.{key}\.npy: row {ROWS - 1} {message}"):
    prepare({})


def test_a_chunk_without_a_usable_row_has_no_vectors_to_look_at(monkeypatch, prepare):
  monkeypatch.setattr(rows, "CHUNK", 1)
  dataset = prepare(SHAPES)
  found = [np.load(path) for path in sorted(dataset.glob("mlembed-*.vectors.npy"))]
  assert sum(map(len, found)) == ROWS - len(UNUSABLE)


def test_teachers_of_two_widths_are_refused(tmp_path, prepare):
  narrow = {key: (*shape[:-1], 4) for key, shape in SHAPES.items()}
  paths = write_vectors(tmp_path, "b", narrow)
  other = entry("retrieval", 4, "") | {"teacher_vectors": paths}
  dataset = prepare(SHAPES, more={"b.parquet": (pairs(ROWS, 4), other)})
  message = (
    r"b\.parquet: its teacher_vectors are 4 numbers wide, but those of a\.parquet 8; one teacher"
  )
  with pytest.raises(DataError, match=message):
    batches_of(dataset, teacher_vectors=True)
