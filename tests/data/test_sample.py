"""Some training texts, as a step would read them."""

import collections

import pyarrow.parquet as pq
import pytest

from mlembed_jax.data import catalog, store
from mlembed_jax.data.sample import sample_ids
from mlembed_jax.data.tokenizer import Tokenizer, with_instruction

FILES = ("train/bitext.parquet", "train/topics.parquet", "train/colours.parquet")


@pytest.fixture(scope="module")
def opened(data):
  return catalog.load_catalog(data / "dataset")


@pytest.fixture(scope="module")
def tokenizer(data):
  return Tokenizer(data / "tokenizer.json", "<|endoftext|>")


@pytest.mark.parametrize("limit", [8, 64])
def test_texts_are_queries_with_their_instruction_and_positives(data, opened, tokenizer, limit):
  split = store.open_split(opened, "train", list(FILES))
  found = sample_ids(split, tokenizer, 200, limit)
  of_query = collections.defaultdict(set)
  for name in FILES:
    instruction = opened.files[name].entry["instruction"]
    for row in pq.read_table(data / name).to_pylist():
      texts = [with_instruction(instruction, row["query"]), row["passage"]]
      query, passage = map(tuple, tokenizer.encode(texts, limit))
      of_query[query].add(passage)
  assert len(found) == 200
  pairs = zip(found[::2], found[1::2], strict=True)
  assert all(tuple(passage) in of_query[tuple(query)] for query, passage in pairs)


def test_rows_of_all_files_and_languages_come_by_their_shares(opened, tokenizer):
  split = store.open_split(opened, "train", [FILES[0], FILES[2]])
  rows = {file: sum(u.rows for u in split.units if u.file == file) for file in (FILES[0], FILES[2])}
  found = sample_ids(split, tokenizer, 60, 64)
  first = tokenizer.prefix(opened.files[FILES[0]].entry["instruction"])
  share = sum(ids[: len(first)] == first for ids in found[::2]) / 30
  assert share == pytest.approx(rows[FILES[0]] / sum(rows.values()), abs=0.05)


def test_each_row_comes_once_where_there_are_fewer(opened, tokenizer):
  split = store.open_split(opened, "train", list(FILES))
  rows = sum(unit.rows for unit in split.units)
  assert len(sample_ids(split, tokenizer, 10_000, 64)) == 2 * rows
