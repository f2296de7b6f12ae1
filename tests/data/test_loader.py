"""Batches: content, shapes, hosts, and that no data module imports jax."""

import ast
import functools
import pathlib

import numpy as np
import pyarrow.parquet as pq
import pytest

import mlembed_jax.data
from mlembed_jax.data import batching, loader, sources
from mlembed_jax.data.tokenizer import DataError, Tokenizer
from tests.material import entry, make_batches, pairs, with_positives, write_parquet


@pytest.fixture(scope="module")
def make(data):
  entries = sources.select(data / "manifest.json", ("train/*",), "data.train")
  datasets = [sources.load(data, name, entry, 0.0) for name, entry in entries.items()]
  return functools.partial(make_batches, data, datasets)


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
  np.testing.assert_array_equal(np.concatenate([p.rows for p in parts]), whole.rows)


def test_iteration_from_any_step_equals_random_access(make):
  batches = make()
  for n, batch in zip(range(17, 40), loader.iterate(batches, 17), strict=True):
    assert batch.step == n and same(batch, batches[n])


def test_tokens_are_counted_without_padding(make):
  batch = make()[0]
  assert batch.real_tokens == batch.lengths.sum() < batch.tokens.size


def test_a_file_without_anything_to_learn_from_is_refused(make):
  none = {"retrieval": 0, "bitext": 0, "clustering": 0, "classification": 1}
  message = (
    r"topics\.parquet: clustering learns from .* 9 are stored and losses\.clustering\..* = 0;"
  )
  with pytest.raises(DataError, match=message):
    make(negatives=none)


def test_a_task_needs_hard_negatives_or_the_candidates_of_the_batch(make):
  none = {"retrieval": 0, "bitext": 0, "clustering": 0, "classification": 0}
  everywhere = dict.fromkeys(none, True)
  assert {make(negatives=none, inbatch=everywhere)[n].lengths.shape for n in range(20)} == {(16, 2)}
  with pytest.raises(DataError, match=r"train/bitext\.parquet: bitext learns from hard negatives"):
    make(negatives=none, inbatch=everywhere | {"bitext": False})


def test_rows_are_those_of_the_file_and_positives_come_before_negatives(data, tmp_path):
  columns = with_positives(pairs(60, 4), 3)
  columns["passage_3"][0], columns["query"][7], columns["negative_4"][30] = None, " ", ""
  write_parquet(tmp_path / "a.parquet", columns)
  dataset = sources.load(
    tmp_path, "a.parquet", entry("bitext", 4, "Translate.") | {"positives": 3}, 0.1
  )
  batches = make_batches(data, [dataset], negatives={"bitext": 2}, seed=3)
  stored = pq.read_table(tmp_path / "a.parquet").to_pylist()
  for step in range(6):
    batch = batches[step]
    negatives = batching.negative_columns(4, 2, 3, step) + 1
    names = ["query", "passage", "passage_2", "passage_3", *(f"negative_{k}" for k in negatives)]
    expected = [[loader.hash64(stored[row][name]) for name in names] for row in batch.rows]
    np.testing.assert_array_equal(batch.hashes.copy().view(np.uint64)[..., 0], expected)
    assert batch.positives == 3 and batch.lengths.shape == (16, 6)
    assert batch.rows.dtype == np.int64 and not {0, 7, 30} & set(batch.rows)
  assert list(batch.arrays()) == ["tokens", "lengths", "hashes"]


def test_data_modules_do_not_import_jax():
  for path in pathlib.Path(mlembed_jax.data.__file__).parent.glob("*.py"):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
      names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
      names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
      assert not [n for n in names if n.split(".")[0] in ("jax", "flax", "optax")], path
