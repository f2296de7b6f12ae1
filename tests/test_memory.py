"""The micro-batch is the largest that the compiler says fits."""

import pytest

from mlembed_jax import memory
from mlembed_jax.config import from_mapping
from mlembed_jax.config_fields import ConfigError
from mlembed_jax.data import sources
from mlembed_jax.sharding import make_mesh
from tests.material import config_dict, entry
from tests.test_train_step import on_mesh

SIZES = [2, 4, 8, 16, 32, 64]


@pytest.mark.parametrize("limit", range(20, 700, 40))
def test_the_largest_that_fits_is_found_in_few_tries(limit):
  tried = []

  def needed(size):
    tried.append(size)
    return None if size > 32 else 10 * size  # the compiler gives up on the largest

  assert memory.largest_micro_batch(SIZES, needed, limit) == max(
    size for size in SIZES if size <= 32 and 10 * size <= limit
  )
  assert len(tried) <= 5


def test_too_little_memory_is_refused():
  with pytest.raises(ConfigError, match=r"data.micro_batch: not even 2 rows at a time fit"):
    memory.largest_micro_batch(SIZES, lambda size: 10 * size, 19)


def test_sizes_divide_the_batch_and_split_over_devices():
  assert memory.sizes(48, 8) == [8, 16, 24, 48]


@pytest.fixture(scope="module")
def config_and_files(data):
  described = entry("bitext", 4, "Translate.")
  config = from_mapping(config_dict(data, **{"data.micro_batch": 0, "data.global_batch": 64}))
  return config, [sources.load(data, "train/bitext.parquet", described, 0.0)]


def test_a_real_step_is_compiled_for_the_choice(config_and_files, monkeypatch, capsys):
  config, files = config_and_files
  mesh = make_mesh(config)
  with on_mesh(mesh):
    sized = {n: memory._sized(config, n) for n in (16, 64)}
    small, whole = (memory._step_bytes(c, files[0], 20, mesh, None) for c in sized.values())
    assert small < whole
    monkeypatch.setattr(memory, "device_bytes", lambda: small)
    assert memory.with_micro_batch(config, 0, files, 20, mesh, None).data.micro_batch == 16
    monkeypatch.setattr(memory, "device_bytes", lambda: whole)
    assert memory.with_micro_batch(config, 0, files, 20, mesh, None).data.micro_batch == 64
  assert "data.micro_batch: 16 of 64 rows at a time" in capsys.readouterr().out


def test_the_choice_of_a_continued_run_stays(config_and_files, monkeypatch):
  config, files = config_and_files
  mesh = make_mesh(config)
  monkeypatch.setattr(memory, "_step_bytes", lambda *_: 10)  # everything fits
  for before, chosen in ((16, 16), (12, 64)):  # 12 rows do not split over 8 devices
    found = memory.with_micro_batch(config, before, files, 20, mesh, None)
    assert found.data.micro_batch == chosen


def test_a_given_micro_batch_is_kept(config_and_files):
  config, files = config_and_files
  kept = memory._sized(config, 32)
  assert memory.with_micro_batch(kept, 16, files, 20, None, None) is kept
