"""Kills of training; `--faults=long` makes 100 of them."""

from tests.faults import kills


def test_nothing_is_lost_by_kills(tmp_path, pytestconfig):
  count = 100 if pytestconfig.getoption("--faults") == "long" else 2
  table = kills.run(tmp_path, count, seed=0, per_run=2 if count == 2 else 5)
  assert sum(counts["kills"] for counts in table.values()) >= count
  assert not any(counts["lost"] for counts in table.values())
