"""Speed and MFU of a line, recomputed from the token ids of real batches."""

import dataclasses

import jax
import numpy as np
import pytest

from mlembed_jax.devices.chips import Chip
from mlembed_jax.parallel.sharding import batch_shards, make_mesh, put_batch
from mlembed_jax.training import gradcache, metrics
from tests.data.test_loader import texts_of
from tests.material import batches_of
from tests.training.test_train_step import on_mesh

CHIP = Chip(bf16_flops=1e12, hbm_bytes=1)
OTHERS = dict.fromkeys(("loss", "learning_rate", "temperature", "rank", "empty_rows"), 0.0)
LENGTHS = (16, 64)


@pytest.fixture(scope="module", params=[512, 10**6], ids=["blocks", "one block"])
def steps(request, tiny, data):
  """Returns batches with sheets of two widths, and the work that eight devices see in each."""
  mesh = make_mesh(tiny)
  shards, work = batch_shards(mesh.shape), jax.jit(gradcache.work)
  options = {"shards": shards, "lengths": LENGTHS, "block_tokens": request.param}
  batches = list(map(batches_of(data / "dataset", **options).__getitem__, range(4)))
  with on_mesh(mesh):
    sheets = [put_batch(batch.arrays(), mesh).sheets for batch in batches]
    return [(batch, jax.device_get(work(s))) for batch, s in zip(batches, sheets, strict=True)]


def by_hand(batch):
  lengths = np.array([len(text) for row in texts_of(batch) for text in row])
  return len(lengths), lengths.sum(), (lengths * (lengths + 1)).sum()


def test_work_is_that_of_the_token_ids(steps):
  for batch, work in steps:
    assert (work["texts"], work["tokens"], work["squares"]) == by_hand(batch)
    assert work["tokens"] == batch.real_tokens
    places = sum(s.tokens.size for s in batch.sheets)
    if all(blocks == 1 for blocks in batch.layout.blocks):  # all of them are encoded at once
      assert work["computed_tokens"] >= places
    else:
      assert work["computed_tokens"] == places


def line_of(config, steps, devices, chip, monkeypatch):
  """Returns the line of these steps, of which each took two seconds."""
  now = iter([0.0, 2.0 * len(steps), 0.0])
  monkeypatch.setattr(metrics.time, "perf_counter", lambda: next(now))
  window = metrics.Window(config, devices, chip)
  for batch, work in steps:
    window.add(batch, OTHERS | {name: value.item() for name, value in work.items()}, 0.5)
  return window.summary(len(steps))


def in_bfloat16(config):
  return dataclasses.replace(config, model=dataclasses.replace(config.model, dtype="bfloat16"))


def test_a_line_gives_speed_and_mfu(steps, tiny, monkeypatch):
  line = line_of(in_bfloat16(tiny), steps, 4, CHIP, monkeypatch)
  texts, tokens, squares = np.sum([by_hand(batch) for batch, _ in steps], axis=0)
  # Width 48, ffn 64, 4 and 2 heads of 16, rank 24, 3 layers.
  products = 3 * (2 * 48 * 16 * (4 + 4) + 2 * 4 * 16 * 48 + 6 * 48 * 64) + 2 * 24 * 48
  flops = 3 * (tokens * products + squares * 3 * 2 * 4 * 16) / 8
  assert line["sequences_per_second"] == texts / 8
  assert line["tokens_per_second"] == tokens / 8
  assert line["tokens_per_second_per_chip"] == tokens / 8 / 4
  assert line["model_flops_per_second"] == pytest.approx(flops, rel=1e-6)
  assert line["mfu"] == pytest.approx(flops / 4e12, rel=1e-6)
  computed = sum(work["computed_tokens"] for _, work in steps)
  assert line["padding_share"] == pytest.approx(1 - tokens / computed)
  assert line["data_wait_share"] == 4 * 0.5 / 8


def test_no_mfu_on_an_unknown_chip_or_in_float32(steps, tiny, monkeypatch):
  for config, chip in ((in_bfloat16(tiny), None), (tiny, CHIP)):
    line = line_of(config, steps, 4, chip, monkeypatch)
    assert "mfu" not in line and line["model_flops_per_second"] > 0


def test_the_progress_bar_shows_mfu_where_it_is_known(steps, tiny, monkeypatch):
  line = line_of(tiny, steps, 4, None, monkeypatch)
  assert "MFU" not in metrics._postfix(line)
  assert "tokens/s, MFU 41.2%, padding" in metrics._postfix(line | {"mfu": 0.412})


@pytest.mark.parametrize(
  ("steps", "start", "every", "holes"),
  [
    ([10, 20, 30, 33, 36, 39], 40, 3, []),  # written every 10 steps before
    ([3, 6, 9, 10, 20, 30], 33, 10, []),
    ([10, 20], 33, 3, ["21 to 30"]),
    ([], 25, 10, ["1 to 20"]),
    ([10, 40, 50], 50, 10, ["11 to 30"]),
    ([30, 40], 45, 10, ["1 to 20"]),
  ],
)
def test_missing_lines_are_told_from_lines_that_were_rarer(tmp_path, steps, start, every, holes):
  path = tmp_path / "metrics.jsonl"
  path.write_text("".join(f'{{"step": {step}}}\n' for step in steps))
  said = [f"there are no lines of steps {', '.join(holes)}"] if holes else []
  assert metrics.faults(path, start, every) == said
