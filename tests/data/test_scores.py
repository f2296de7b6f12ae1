"""Scored pairs: the scores follow their rows into the batch, and what is no score is refused."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mlembed_jax.data import loader, sources
from mlembed_jax.data.tokenizer import DataError
from tests.material import entry, make_batches, scored, write_parquet

SCORED = entry("scored_pairs", 0, "Find similar texts.")


def write(folder, columns):
  write_parquet(folder / "sts.parquet", columns)
  return sources.load(folder, "sts.parquet", SCORED, 0.1)


def replaced(rows, changes):
  columns = scored(rows)
  for row, score in changes.items():
    columns["score"][row] = score
  return columns


def test_a_batch_holds_the_scores_of_its_rows(data, tmp_path):
  columns = replaced(40, {i: i / 40 for i in range(40)} | {2: None, 17: None})
  columns["query"][9], columns["passage"][30] = "", None
  dataset = write(tmp_path, columns)
  assert (len(dataset), dataset.dropped) == (36, 4)
  stored = pq.read_table(tmp_path / "sts.parquet").to_pylist()
  batches = make_batches(data, [dataset])
  for batch in (batches[step] for step in range(4)):
    assert not {2, 9, 17, 30} & set(batch.rows)
    assert batch.scores.dtype == np.float32 and batch.lengths.shape == (16, 2)
    np.testing.assert_allclose(batch.scores, [stored[r]["score"] for r in batch.rows], rtol=1e-6)
    texts = [[loader.hash64(stored[r][c]) for c in ("query", "passage")] for r in batch.rows]
    np.testing.assert_array_equal(batch.hashes.copy().view(np.uint64)[..., 0], texts)
    assert batch.arrays()["scores"] is batch.scores and batch.teacher is None
  parts = [make_batches(data, [dataset], host=host, hosts=4)[0].scores for host in range(4)]
  np.testing.assert_array_equal(np.concatenate(parts), batches[0].scores)


def test_other_tasks_have_no_scores(data, tmp_path):
  write_parquet(tmp_path / "a.parquet", scored(40))
  dataset = sources.load(tmp_path, "a.parquet", entry("bitext", 0, ""), 0.0)
  batch = make_batches(data, [dataset])[0]
  assert dataset.scores is None and batch.scores is None and "scores" not in batch.arrays()


@pytest.mark.parametrize("kind", ["halffloat", "float", "double", "int8", "int64", "uint64"])
def test_any_numbers_are_scores(tmp_path, kind):
  values = pa.array(np.arange(20) % 3 == 0).cast("int8").cast(kind)
  dataset = write(tmp_path, scored(20) | {"score": values})
  assert pq.read_schema(tmp_path / "sts.parquet").field("score").type == values.type
  np.testing.assert_array_equal(dataset.scores, np.arange(20) % 3 == 0)
  assert dataset.scores.dtype == np.float32


@pytest.mark.parametrize("value", [4.5, -0.25, 1.0000001, float("nan"), float("inf")])
def test_a_score_outside_0_to_1_is_refused_with_its_row(tmp_path, value):
  columns = replaced(20, {2: None, 13: value})
  message = (
    rf"sts\.parquet: row 13: score {value} is not in \[0, 1\]; .* divide STS scores 0-5 by 5"
  )
  with pytest.raises(DataError, match=message):
    write(tmp_path, columns)


def test_a_whole_number_outside_0_to_1_is_refused(tmp_path):
  columns = scored(20) | {"score": pa.array([0, 2**63] * 10, pa.uint64())}
  with pytest.raises(DataError, match=r"row 1: score 9\.2.*e\+18 is not in \[0, 1\]"):
    write(tmp_path, columns)


def test_too_many_null_scores_are_refused_with_counts(tmp_path):
  with pytest.raises(DataError, match=r"3 of 20 rows have a null or empty field \(score: 3\)"):
    write(tmp_path, replaced(20, dict.fromkeys((1, 5, 8))))


@pytest.mark.parametrize(
  ("values", "message"),
  [(["0.5"] * 20, "holds string, expected number"), ([True] * 20, "holds bool, expected number")],
)
def test_a_score_that_is_no_number_is_refused(tmp_path, values, message):
  with pytest.raises(DataError, match=rf"sts\.parquet: column score {message}"):
    write(tmp_path, scored(20) | {"score": values})


def test_a_missing_score_column_is_refused(tmp_path):
  columns = {name: values for name, values in scored(20).items() if name != "score"}
  with pytest.raises(DataError, match=r"column score is missing; it has query, passage, lang"):
    write(tmp_path, columns)
