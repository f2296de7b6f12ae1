"""Batches: content, shapes, hosts, and that no data module imports jax."""

import ast
import dataclasses
import pathlib

import numpy as np
import pytest

import mlembed_jax.data
from mlembed_jax.data import loader, sources
from mlembed_jax.data.tokenizer import DataError, Tokenizer
from tests.material import pairs


@pytest.fixture(scope="module")
def make(data, tiny):
  entries = sources.select(data / "manifest.json", ("train/*",), "data.train")
  datasets = [sources.load(data, name, entry, 0.0) for name, entry in entries.items()]
  tokenizer = Tokenizer(data / "tokenizer.json", "<|endoftext|>")

  def build(**changes):
    options = {
      "negatives": dataclasses.asdict(tiny.losses.negatives),
      "lengths": (32, 64),
      "batch_size": 16,
      "seed": 0,
      "steps": 40,
    }
    return loader.Batches(datasets, tokenizer, **(options | changes))

  return build


def same(a, b):
  return a.dataset == b.dataset and all(
    np.array_equal(x, y) for x, y in zip(a.arrays().values(), b.arrays().values(), strict=True)
  )


def test_texts_per_row_follow_the_task(make):
  shapes = {(b.task_type, b.tokens.shape[:2]) for b in (make()[n] for n in range(20))}
  assert shapes == {
    ("bitext", (16, 2 + 4)),  # 4 stored, 7 wanted
    ("clustering", (16, 2 + 9)),
    ("classification", (16, 2 + 1)),
  }


def test_a_batch_holds_its_texts(make, data):
  batch = next(b for b in (make()[n] for n in range(20)) if b.task_type == "bitext")
  tokenizer = Tokenizer(data / "tokenizer.json", "<|endoftext|>")
  columns = pairs(160, 4)
  positive_of = dict(zip(columns["passage"], columns["query"], strict=True))
  hash_of = {loader.hash64(text): text for name in columns for text in columns[name]}
  for tokens, lengths, hashes in zip(batch.tokens, batch.lengths, batch.hashes, strict=True):
    query, positive, *negatives = (hash_of[int(h)] for h in hashes.copy().view(np.uint64)[:, 0])
    assert positive_of[positive] == query and positive not in negatives
    instructed = f"Instruct: Retrieve translations of the text.\nQuery: {query}"
    expected = tokenizer.encode([instructed, positive, *negatives], 64)
    assert [list(t[:n]) for t, n in zip(tokens, lengths, strict=True)] == expected
    assert all(t[n - 1] == tokenizer.pooled_id for t, n in zip(tokens, lengths, strict=True))


def test_shapes_come_from_the_configured_lengths(make):
  sizes = {make()[n].tokens.shape[2] for n in range(20)}
  assert sizes <= {32, 64}
  assert {make(lengths=(48,))[n].tokens.shape[2] for n in range(20)} == {48}


def test_hosts_hold_the_parts_of_one_global_batch(make):
  whole = make()[3]
  parts = [make(host=host, hosts=4)[3] for host in range(4)]
  for name, array in whole.arrays().items():
    np.testing.assert_array_equal(np.concatenate([p.arrays()[name] for p in parts]), array)


def test_iteration_from_any_step_equals_random_access(make):
  batches = make()
  for n, batch in zip(range(17, 40), loader.iterate(batches, 17), strict=True):
    assert batch.step == n and same(batch, batches[n])


def test_tokens_are_counted_without_padding(make):
  batch = make()[0]
  assert batch.real_tokens == batch.lengths.sum() < batch.tokens.size


def test_a_file_without_anything_to_learn_from_is_refused(make):
  none = {"retrieval": 0, "bitext": 0, "clustering": 0, "classification": 1}
  with pytest.raises(DataError, match=r"train/topics\.parquet: clustering learns from hard"):
    make(negatives=none)


def test_data_modules_do_not_import_jax():
  for path in pathlib.Path(mlembed_jax.data.__file__).parent.glob("*.py"):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
      names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
      names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
      assert not [n for n in names if n.split(".")[0] in ("jax", "flax", "optax")], path
