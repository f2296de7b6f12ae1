"""The micro-batch is the largest that the compiler says fits."""

import dataclasses
import functools

import jax
import pytest

from mlembed_jax.batch import Kind
from mlembed_jax.config import from_mapping
from mlembed_jax.config_fields import MeshConfig
from mlembed_jax.errors import ConfigError
from mlembed_jax.estimate.estimate import Target
from mlembed_jax.parallel.sharding import make_mesh
from mlembed_jax.training import lowering, micro_batch
from tests.material import config_dict
from tests.training.test_train_step import on_mesh

pytestmark = pytest.mark.usefixtures("fast_compile")
SIZES = [2, 4, 8, 16, 32, 64]


@pytest.mark.parametrize("limit", range(20, 700, 40))
def test_the_largest_that_fits_is_found_in_few_tries(limit):
  tried = []

  def needed(size):
    tried.append(size)
    return None if size > 32 else 10 * size  # the compiler gives up on the largest

  assert micro_batch.largest_micro_batch(SIZES, needed, limit) == max(
    size for size in SIZES if size <= 32 and 10 * size <= limit
  )
  assert len(tried) <= 5


def test_too_little_memory_is_refused():
  with pytest.raises(ConfigError, match=r"data.micro_batch: not even 2 tokens at a time fit"):
    micro_batch.largest_micro_batch(SIZES, lambda size: 10 * size, 19)


def test_sizes_start_at_a_sheet_per_device_and_end_where_padding_would_be_too_much():
  config = from_mapping(config_dict())  # widths 32 and 64
  mesh = make_mesh(config)
  assert micro_batch.sizes(config, 100_000, mesh) == [512, 1024, 1536]
  # 2 widths x 1,024 are 2 percent.
  assert micro_batch.sizes(config, 102_400, mesh) == [512, 1024, 1536, 2048]
  assert micro_batch.sizes(config, 100, mesh) == [512]


def test_chips_that_gather_weights_get_larger_blocks():
  config = from_mapping(config_dict(**{"mesh.data": 4, "data.lengths": (64,)}))
  split = make_mesh(config, Target.parse("v5e:4x4", 1).devices())
  copies = dataclasses.replace(config, mesh=MeshConfig(data=16, fsdp=1, tensor=1))
  whole = make_mesh(copies, list(split.devices.flat))
  assert micro_batch.sizes(config, 200_000, whole)[-1] == 6 * 1024  # of 16 sheets of 64; 2 percent
  # Groups of 4 chips gather over a link: 197e12 / 45e9 tokens take as long.
  for tokens in (40_000, 200_000, 3_200_000):
    best = min(tokens / 16, (197e12 / 45e9 * tokens / 16) ** 0.5)  # no more than there are
    assert 0.6 * best < micro_batch.sizes(config, tokens, split)[-1] / 16 <= best


BITEXT = Kind("bitext", 1, 4, 64, None)
SCORED = Kind("scored_pairs", 1, 0, 64, None)


@pytest.fixture(scope="module")
def config():
  one_axis = {"matryoshka.dims": (48,), "matryoshka.exits": (3,), "matryoshka.ranks": (24,)}
  return from_mapping(config_dict(**one_axis, **{"data.micro_batch": 0, "data.global_batch": 64}))


def test_a_real_step_is_compiled_for_the_choice(config, monkeypatch, capsys):
  mesh, kind = make_mesh(config, jax.devices()[:1]), dataclasses.replace(BITEXT, longest=32)

  def chosen(available):
    monkeypatch.setattr(micro_batch, "device_bytes", lambda: available)
    return micro_batch.with_micro_batch(config, 0, [kind], 6400, 20, mesh, None).data.micro_batch

  with on_mesh(mesh):
    small, large = (
      lowering.step_bytes(micro_batch.sized(config, n), kind, 20, mesh, None) for n in (64, 128)
    )
    assert small < large
    assert chosen(small) == 64
    assert chosen(large) == 128
  assert "data.micro_batch: 64 tokens at a time" in capsys.readouterr().out


def test_the_choice_of_a_continued_run_stays(config, monkeypatch):
  mesh = make_mesh(config)
  monkeypatch.setattr(lowering, "step_bytes", lambda *_: 10)  # everything fits
  # 256 tokens are no sheet for each of 8 devices.
  for before, chosen in ((512, 512), (4096, 4096), (256, 2048), (0, 2048)):
    found = micro_batch.with_micro_batch(config, before, [BITEXT], 102_400, 20, mesh, None)
    assert found.data.micro_batch == chosen


def test_a_choice_that_no_longer_fits_is_made_again(config, monkeypatch, capsys):
  mesh = make_mesh(config)
  monkeypatch.setattr(micro_batch, "has_own_memory", lambda _: True)
  monkeypatch.setattr(lowering, "step_bytes", lambda config, *_: config.data.micro_batch)
  for available, chosen in ((4096, 4096), (3900, 4096), (3000, 2048), (600, 512)):
    monkeypatch.setattr(micro_batch, "device_bytes", lambda n=available: n)
    found = micro_batch.with_micro_batch(config, 4096, [BITEXT], 102_400, 20, mesh, None)
    assert found.data.micro_batch == chosen
    said = capsys.readouterr().out
    assert ("4,096 of the checkpoint do not fit any more" in said) == (chosen != 4096)


def test_a_given_micro_batch_is_kept_where_it_fits(config, monkeypatch):
  mesh, given = make_mesh(config), micro_batch.sized(config, 1024)
  choose = functools.partial(
    micro_batch.with_micro_batch, given, 512, [BITEXT], 1e5, 20, mesh, None
  )
  monkeypatch.setattr(micro_batch, "device_bytes", lambda: 2**30)
  monkeypatch.setattr(lowering, "step_bytes", lambda *_: 3 * 2**30)
  assert choose() == given  # on CPU
  monkeypatch.setattr(micro_batch, "has_own_memory", lambda _: True)
  with pytest.raises(ConfigError, match=r"data\.micro_batch: with 1,024 tokens.* takes 3\.22 GB"):
    choose()
  monkeypatch.setattr(lowering, "step_bytes", lambda *_: 2**30)
  assert choose() == given


def test_the_widest_kind_decides_with_the_longest_texts_of_all(config):
  hard = dataclasses.replace(BITEXT, task_type="clustering", longest=20)
  vectors = dataclasses.replace(BITEXT, longest=30, vectors=(2, 64))
  assert micro_batch.widest(config, [SCORED, hard]) == dataclasses.replace(hard, longest=64)
  assert micro_batch.widest(config, [hard, BITEXT]) == BITEXT
  found = micro_batch.widest(config, [vectors, BITEXT, SCORED])
  assert found == dataclasses.replace(vectors, longest=64)
