"""What a run will read: the table, what changed since, and a picture."""

import numpy as np
import pytest

from mlembed_jax.data import plan, plan_report
from mlembed_jax.data.manifest import File
from mlembed_jax.data.mixture import Unit
from mlembed_jax.data.plan import Plan
from tests.material import entry

FILES = [File(name, entry("retrieval", 4, ""), "") for name in ("a", "b")]
UNITS = [
  Unit("a", "de", 100, 50.0, 40.0),
  Unit("a", "en", 60, 30.0, 20.0),
  Unit("b", "en", 40, 8.0, 0.0),
]


def plan_of(*per_epoch, units=UNITS, dataset="print", batch_size=10):
  return Plan(FILES, units, np.array(per_epoch), batch_size, 0, dataset)


PLAN = plan_of(50, 60, 80)
USED = {"a": 0.5, "b": 1.0}  # of the stored negatives


def test_lines_sum_units_over_the_run():
  """Rows a: 110 of an epoch with 50 - 20 and 30 - 10 tokens each, twice."""
  first, second = plan_report.lines(PLAN, lambda unit: unit.file, 2.0, USED)
  assert (first.name, first.rows, first.per_epoch) == ("a", 160, 110)
  assert first.share == pytest.approx(110 / 190) and first.repeats == pytest.approx(220 / 160)
  assert first.tokens == 2 * (50 * 30 + 60 * 20)
  assert (second.name, second.rows, second.per_epoch, second.repeats) == ("b", 40, 80, 4.0)
  assert second.tokens == 2 * 80 * 8
  languages = plan_report.lines(PLAN, lambda unit: unit.language, 2.0, USED)
  assert [(line.name, line.rows, line.per_epoch) for line in languages] == [
    ("en", 100, 140),
    ("de", 100, 50),
  ]
  assert sum(line.tokens for line in languages) == first.tokens + second.tokens


def test_the_table_shows_a_line_each():
  lines = plan_report.lines(PLAN, lambda unit: unit.file, 2.0, USED)
  table = plan_report.table("file", lines).splitlines()
  assert table[0].split() == ["file", "rows", "per", "epoch", "share", "passes", "M", "tokens"]
  assert table[1].split() == ["a", "160", "110", "57.89%", "1.38", "0.0"]
  assert table[2].split() == ["b", "40", "80", "42.11%", "4.00", "0.0"]
  assert len({len(line) for line in table}) == 1
  large = plan_report.Line("a", 12_345_678, 80_000, 0.25, 1.5, 1.5e9)
  assert "12,345,678     80,000" in plan_report.table("file", [large])
  assert plan_report.table("file", [large]).endswith("25.00%    1.50   1,500.0")


@pytest.mark.parametrize(("count", "shown"), [(25, 25), (26, 25), (400, 25)])
def test_of_many_lines_the_first_and_the_last_are_shown(count, shown):
  lines = [plan_report.Line(f"l{i}", 1, 1, 0.1, 1.0, 1.0) for i in range(count)]
  table = plan_report.table("language", lines).splitlines()[1:]
  assert len(table) == shown
  names = [line.split()[0] for line in table]
  assert names[:12] == [f"l{i}" for i in range(12)]
  assert names[-12:] == [f"l{i}" for i in range(count - 12, count)]
  assert (table[12].strip() == f"... {count - 24} more") == (count > 25)


def test_a_file_below_one_batch_is_found():
  assert PLAN.small_files() == []
  assert plan_of(50, 60, 9).small_files() == ["b"]
  assert plan_of(4, 5, 10).small_files() == ["a"]
  assert plan_of(50, 60, 0).small_files() == ["b"]


def test_the_order_is_of_these_units():
  order = PLAN.order()
  assert order.steps_per_epoch == 11 + 8
  drawn = [order[step] for step in range(19)]
  units = np.concatenate([chosen.units for chosen in drawn])
  assert np.bincount(units).tolist() == [50, 60, 80]
  assert all((chosen.file == 1) == set(chosen.units).issubset({2}) for chosen in drawn)


def test_the_same_plan_has_no_difference():
  assert plan.difference(PLAN.as_json(), plan_of(50, 60, 80).as_json()) == []


def test_each_difference_is_a_line():
  more = [*UNITS[:2], Unit("b", "en", 41, 8.0, 0.0)]
  assert plan.difference(
    PLAN.as_json(), plan_of(50, 61, 80, units=more, dataset="x").as_json()
  ) == [
    "dataset: print in the workdir, x now",
    "a en: 60 rows, 60 per epoch in the workdir, 60 rows, 61 per epoch now",
    "b en: 40 rows, 80 per epoch in the workdir, 41 rows, 80 per epoch now",
  ]
  fewer = plan_of(50, 60, units=UNITS[:2])
  assert plan.difference(PLAN.as_json(), fewer.as_json()) == [
    "b en: 40 rows, 80 per epoch in the workdir, absent now"
  ]
  assert plan.difference(fewer.as_json(), PLAN.as_json()) == [
    "b en: absent in the workdir, 40 rows, 80 per epoch now"
  ]
  assert plan.difference({}, PLAN.as_json())[0] == "dataset: None in the workdir, print now"


def test_of_many_differences_the_first_are_shown():
  units = [Unit("a", f"l{i:02d}", 10, 1.0, 0.0) for i in range(40)]
  before, now = plan_of(*[10] * 40, units=units), plan_of(*[11] * 40, units=units)
  lines = plan.difference(before.as_json(), now.as_json())
  assert len(lines) == 13 and lines[-1] == "... and 28 more units"


@pytest.mark.parametrize("count", [1, 3, 60])
def test_the_picture_is_an_image_of_some_size(tmp_path, count):
  lines = [plan_report.Line(f"file {i}", i + 1, i + 1, 1 / count, 1.0, 1.0) for i in range(count)]
  plan_report.picture(tmp_path / "plan.png", lines, lines)
  content = (tmp_path / "plan.png").read_bytes()
  assert content.startswith(b"\x89PNG\r\n\x1a\n") and b"IEND" in content[-12:]
  width, height = (int.from_bytes(content[i : i + 4], "big") for i in (16, 20))
  assert width == 1200 and 300 <= height < 1300
