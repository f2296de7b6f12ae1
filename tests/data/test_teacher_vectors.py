"""A teacher's vectors stored beside the data: the right ones reach the batch, misfits are named."""

import mmap
import re

import numpy as np
import pyarrow.parquet as pq
import pytest

from mlembed_jax.data import batching, loader, sources
from mlembed_jax.data.tokenizer import DataError
from tests.material import (
  entry,
  make_batches,
  pairs,
  scored,
  with_positives,
  write_parquet,
  write_vectors,
)

ROWS, WIDTH = 50, 8
UNUSABLE = (0, 7, 31)
SHAPES = {"query": (ROWS, WIDTH), "passage": (ROWS, WIDTH), "negatives": (ROWS, 4, WIDTH)}


@pytest.fixture
def load(tmp_path):
  """Returns what writes and loads a file of 50 rows, three of them unusable."""

  def write(shapes, *, name="a", dtype=np.float32, seed=0, vectors=True, **changes):
    columns = with_positives(pairs(ROWS, 4), 3)
    for row in UNUSABLE:
      columns["query"][row] = " "
    write_parquet(tmp_path / f"{name}.parquet", columns)
    paths = write_vectors(tmp_path, name, shapes, dtype, seed)
    fields = {"task_type": "retrieval", "teacher_vectors": paths} | changes
    described = entry("retrieval", 4, "Find.") | fields
    return sources.load(tmp_path, f"{name}.parquet", described, 0.1, vectors=vectors)

  return write


def without(key):
  return {name: shape for name, shape in SHAPES.items() if name != key}


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("positives", [1, 3])
@pytest.mark.parametrize("stored", [True, False])
def test_a_batch_holds_the_vectors_of_its_texts(data, tmp_path, load, dtype, positives, stored):
  shapes = SHAPES if stored else without("negatives")
  if positives > 1:
    shapes = shapes | {"passage": (ROWS, positives, WIDTH)}
  dataset = load(shapes, dtype=dtype, positives=positives)
  files = {key: np.load(tmp_path / f"a.{key}.npy") for key in shapes}
  texts = pq.read_table(tmp_path / "a.parquet")["query"].to_pylist()
  batches = make_batches(data, [dataset], negatives={"retrieval": 2}, seed=1)
  for step in range(6):
    batch = batches[step]
    chosen = batching.negative_columns(4, 2, 1, step)
    assert batch.teacher.shape == (16, 1 + positives + 2 * stored, WIDTH)
    assert batch.teacher.dtype == np.float32 and batch.arrays()["teacher"] is batch.teacher
    assert not set(UNUSABLE) & set(batch.rows)
    for row, hashes, vectors in zip(batch.rows, batch.hashes, batch.teacher, strict=True):
      assert hashes[0].copy().view(np.uint64)[0] == loader.hash64(texts[row])
      np.testing.assert_array_equal(vectors[0], files["query"][row])
      passages = files["passage"][row].reshape(positives, WIDTH)
      np.testing.assert_array_equal(vectors[1 : 1 + positives], passages)
      if stored:
        np.testing.assert_array_equal(vectors[1 + positives :], files["negatives"][row][chosen])


def test_hosts_hold_the_parts_of_one_global_batch(data, load):
  dataset = load(SHAPES)
  parts = [make_batches(data, [dataset], host=host, hosts=4)[3].teacher for host in range(4)]
  np.testing.assert_array_equal(np.concatenate(parts), make_batches(data, [dataset])[3].teacher)


def test_scored_pairs_have_vectors_too(data, tmp_path):
  write_parquet(tmp_path / "sts.parquet", scored(ROWS))
  paths = write_vectors(tmp_path, "sts", without("negatives"))
  described = entry("scored_pairs", 0, "") | {"teacher_vectors": paths}
  batch = make_batches(data, [sources.load(tmp_path, "sts.parquet", described, 0, vectors=True)])[0]
  passages = np.load(tmp_path / "sts.passage.npy")[batch.rows]
  np.testing.assert_array_equal(batch.teacher[:, 1], passages)
  assert list(batch.arrays()) == ["tokens", "lengths", "hashes", "scores", "teacher"]


def test_files_stay_on_disk_and_may_hold_columns_first(tmp_path, load):
  dataset = load(SHAPES)
  for file in dataset.vectors.values():
    root = file.vectors
    while isinstance(root, np.ndarray):
      root = root.base
    assert isinstance(root, mmap.mmap)
  expected = dataset.read_vectors([5, 2], [3])
  for key in SHAPES:
    np.save(tmp_path / f"a.{key}.npy", np.asfortranarray(np.load(tmp_path / f"a.{key}.npy")))
  paths = {key: f"a.{key}.npy" for key in SHAPES}
  described = entry("retrieval", 4, "") | {"teacher_vectors": paths}
  again = sources.load(tmp_path, "a.parquet", described, 0.1, vectors=True)
  assert not again.vectors["negatives"].vectors.flags.c_contiguous
  np.testing.assert_array_equal(again.read_vectors([5, 2], [3]), expected)


def test_vectors_are_opened_only_when_asked_for(data, load):
  dataset = load({"query": (1, 1), "passage": (1,)}, vectors=False)  # would not fit
  batch = make_batches(data, [dataset])[0]
  assert dataset.vectors is None and batch.teacher is None and "teacher" not in batch.arrays()


def test_a_file_without_a_teacher_is_trained_beside_one_with(data, tmp_path, load):
  write_parquet(tmp_path / "plain.parquet", pairs(ROWS, 0))
  plain = sources.load(tmp_path, "plain.parquet", entry("bitext", 0, ""), 0, vectors=True)
  batches = make_batches(data, [load(SHAPES), plain])
  found = {(batches[n].dataset, batches[n].teacher is None) for n in range(12)}
  assert found == {("a.parquet", False), ("plain.parquet", True)}


def test_a_changed_teacher_is_a_changed_run(load):
  def fingerprint(**changes):
    return sources.fingerprint([load(SHAPES, **changes)])

  assert fingerprint() == fingerprint() and fingerprint() != fingerprint(seed=1)
  assert fingerprint(vectors=False) == fingerprint(vectors=False, seed=1) != fingerprint()


def test_each_file_counts_in_the_fingerprint(tmp_path, load):
  dataset = load(SHAPES)
  prints = {sources.fingerprint([dataset])}
  for key in SHAPES:
    path = tmp_path / f"a.{key}.npy"
    values = np.load(path)
    values[-1] = 1
    np.save(path, values)
    paths = {key: f"a.{key}.npy" for key in SHAPES}
    described = entry("retrieval", 4, "Find.") | {"teacher_vectors": paths}
    again = sources.load(tmp_path, "a.parquet", described, 0.1, vectors=True)
    prints.add(sources.fingerprint([again]))
  assert len(prints) == 4


# Refusals.


@pytest.mark.parametrize(
  ("key", "shape", "positives", "message"),
  [
    ("query", (47, 8), 1, "a.query.npy: expected [50, D], found [47, 8]"),
    ("query", (50,), 1, "a.query.npy: expected [50, D], found [50]"),
    ("query", (50, 1, 8), 1, "a.query.npy: expected [50, D], found [50, 1, 8]"),
    ("passage", (51, 8), 1, "a.passage.npy: expected [50, D], found [51, 8]"),
    ("passage", (50, 9), 1, "a.passage.npy: its vectors are 9 numbers wide, but"),
    ("passage", (50, 3, 8), 1, "a.passage.npy: expected [50, D], found [50, 3, 8]"),
    ("passage", (50, 8), 3, "a.passage.npy: expected [50, 3, D], found [50, 8]"),
    ("passage", (50, 2, 8), 3, "a.passage.npy: expected [50, 3, D], found [50, 2, 8]"),
    ("negatives", (50, 8), 1, "a.negatives.npy: expected [50, 4, D], found [50, 8]"),
    ("negatives", (50, 3, 8), 1, "a.negatives.npy: expected [50, 4, D], found [50, 3, 8]"),
    ("negatives", (50, 4, 4), 1, "a.negatives.npy: its vectors are 4 numbers wide, but"),
  ],
)
def test_a_shape_that_does_not_fit_is_refused(load, key, shape, positives, message):
  fitting = {"passage": (ROWS, positives, WIDTH)} if positives > 1 else {}
  with pytest.raises(DataError, match=re.escape(message)) as error:
    load(SHAPES | fitting | {key: shape}, positives=positives)
  advice = "write the vectors of every row of a.parquet, unusable ones too, in order"
  assert (advice in str(error.value)) == ("expected" in message)


@pytest.mark.parametrize("dtype", [np.float64, np.int8, ">f4"])
def test_another_type_is_refused(load, dtype):
  message = rf"a\.query\.npy: expected float16 or float32, found {np.dtype(dtype)}"
  with pytest.raises(DataError, match=message):
    load(SHAPES, dtype=dtype)


def test_a_missing_file_is_refused(load):
  absent = {"query": "a.query.npy", "passage": "gone/a.npy"}
  with pytest.raises(DataError, match=r"gone/a\.npy: this file of teacher_vectors does not exist"):
    load(SHAPES, teacher_vectors=absent)


def test_a_file_that_is_no_npy_is_refused(tmp_path, load):
  load(SHAPES)
  np.savez(tmp_path / "packed.npz", np.zeros((ROWS, WIDTH), np.float32))
  (tmp_path / "cut.npy").write_bytes((tmp_path / "a.query.npy").read_bytes()[:-9])
  (tmp_path / "text.npy").write_text("no vectors")
  (tmp_path / "empty.npy").write_bytes(b"")
  for name in ("packed.npz", "cut.npy", "text.npy", "empty.npy", "a.parquet"):
    with pytest.raises(DataError, match=rf"{re.escape(name)}: not a readable \.npy file: "):
      load(SHAPES, teacher_vectors={"query": name, "passage": "a.passage.npy"})


@pytest.mark.parametrize("key", SHAPES)
@pytest.mark.parametrize(
  ("value", "message"),
  [(np.nan, "holds NaN or inf"), (np.inf, "holds NaN or inf"), (0, "holds a vector of zeros")],
)
def test_a_useless_vector_is_refused_with_its_row(tmp_path, load, key, value, message):
  dataset = load(SHAPES, dtype=np.float16)
  files = {name: f"a.{name}.npy" for name in SHAPES}
  path = tmp_path / files[key]
  stored = np.load(path)
  stored[list(UNUSABLE)] = np.nan  # never read
  np.save(path, stored)
  described = entry("retrieval", 4, "Find.") | {"teacher_vectors": files}
  reopen = lambda: sources.load(tmp_path, "a.parquet", described, 0.1, vectors=True)  # noqa: E731
  reopen()
  row = dataset.rows[-1]  # no position among the usable rows
  stored[row] *= value
  np.save(path, stored)
  with pytest.raises(DataError, match=rf"a\.{key}\.npy: row {row} {message}"):
    reopen()


def test_teachers_of_two_widths_are_refused(data, load):
  narrow = {key: (*shape[:-1], 4) for key, shape in SHAPES.items()}
  message = (
    r"b\.parquet: its teacher_vectors are 4 numbers wide, but those of a\.parquet 8; one teacher"
  )
  with pytest.raises(DataError, match=message):
    make_batches(data, [load(SHAPES), load(narrow, name="b")])
