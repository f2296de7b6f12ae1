"""Scored pairs: the scores follow their rows, and what is no score is refused."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mlembed_jax.data import rows
from mlembed_jax.errors import DataError
from tests.data.test_rows import dropped, read, write
from tests.material import entry, scored

SCORED = entry("scored_pairs", 0, "Compare.")
FORMATS = ("a.parquet", "a.jsonl")


@pytest.mark.parametrize("name", FORMATS)
def test_scores_follow_their_rows(tmp_path, name):
  columns = scored(40)
  columns["score"] = [i / 40 for i in range(40)]
  columns["score"][2], columns["query"][9], columns["passage"][30] = None, "", None
  found, chunks = read(write(tmp_path, columns, name, SCORED))
  assert dropped(chunks) == {"null": (2, [2, 30]), "empty": (1, [9])}
  assert {row["row"]: row["score"] for row in found} == {
    i: float(np.float32(i / 40)) for i in range(40) if i not in (2, 9, 30)
  }


@pytest.mark.parametrize("kind", ["halffloat", "float", "double", "int8", "int64", "uint64"])
def test_any_numbers_are_scores(tmp_path, kind):
  values = pa.array(np.arange(20) % 3 == 0).cast("int8").cast(kind)
  found, _ = read(write(tmp_path, scored(20) | {"score": values}, described=SCORED))
  assert pq.read_schema(tmp_path / "a.parquet").field("score").type == values.type
  assert [row["score"] for row in found] == [float(i % 3 == 0) for i in range(20)]


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("value", [4.5, -0.25, 1.0000001, float("nan"), float("inf"), 2.0**63])
def test_a_score_outside_0_to_1_is_refused_with_its_row(tmp_path, monkeypatch, name, value):
  monkeypatch.setattr(rows, "CHUNK", 10)
  columns = scored(20)
  columns["score"][2], columns["score"][13] = None, value
  with pytest.raises(DataError) as error:
    read(write(tmp_path, columns, name, SCORED))
  message = f"{name}: row 13: score {value} is not in [0, 1]; rescale the column, e.g. divide STS"
  assert message in str(error.value)


@pytest.mark.parametrize("value", [2**63, 10**400, True, "0.5"], ids=lambda v: str(v)[:9])
def test_json_scores_are_numbers_of_any_size(tmp_path, value):
  columns = scored(20)
  columns["score"][13] = value
  file = write(tmp_path, columns, "a.jsonl", SCORED)
  if type(value) is int:
    with pytest.raises(DataError, match=r"a\.jsonl: row 13: score .* is not in \[0, 1\]"):
      read(file)
  else:
    assert dropped(read(file)[1]) == {"wrong_type": (1, [13])}


@pytest.mark.parametrize(
  ("values", "message"),
  [(["0.5"] * 20, "holds string, expected number"), ([True] * 20, "holds bool, expected number")],
)
def test_a_score_that_is_no_number_is_refused(tmp_path, values, message):
  file = write(tmp_path, scored(20) | {"score": values}, described=SCORED)
  with pytest.raises(DataError, match=rf"a\.parquet: column score {message}"):
    rows.check_file(file)
