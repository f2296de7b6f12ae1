"""Columns by the names that others give them: what is said of a file that lacks ours."""

import pytest

from mlembed_jax.data.near_names import columns_for, missing_columns

CASES = [  # what is missing, what is there, what is to be renamed
  (["query", "passage"], ["anchor", "positive"], {"query": "anchor", "passage": "positive"}),
  (["query", "passage"], ["question", "answer"], {"query": "question", "passage": "answer"}),
  (["query", "passage"], ["text1", "text2"], {"query": "text1", "passage": "text2"}),
  (
    ["query", "passage"],
    ["sentence1", "sentence2"],
    {"query": "sentence1", "passage": "sentence2"},
  ),
  (["score"], ["query", "passage", "label"], {"score": "label"}),
  (["negative_1"], ["query", "passage", "neg"], {"negative_1": "neg"}),
  (["negative_1"], ["anchor", "positive", "negative"], {"negative_1": "negative"}),
  (["lang", "text", "en"], ["language", "sentence1", "sentence2"], None),
  (["query"], ["Query", "passage"], {"query": "Query"}),
  (["passage"], ["query", "pasage"], {"passage": "pasage"}),
  (["negative_2"], ["negative_1", "negative_3"], {}),  # which is one of several on purpose
  (["query"], ["id", "lang"], {}),
]


@pytest.mark.parametrize(("missing", "there", "expected"), CASES)
def test_others_names_are_known(missing, there, expected):
  expected = dict(zip(missing, there, strict=True)) if expected is None else expected
  assert columns_for(missing, there) == expected


def test_all_that_is_missing_is_said_in_one_sentence():
  assert missing_columns(["query", "passage"], ["id", "anchor", "positive"]) == (
    "columns query, passage are missing; it has id, anchor, positive; rename anchor to query, "
    "positive to passage"
  )
  assert missing_columns(["score"], ["a"]) == "column score is missing; it has a"
