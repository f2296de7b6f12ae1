"""The shapes that the update is compiled for are those of real batches."""

import dataclasses

import jax
import numpy as np
import pytest

from mlembed_jax.batch import Arrays, Kind
from mlembed_jax.config import from_mapping
from mlembed_jax.training import lowering, micro_batch
from tests.material import config_dict, packed
from tests.training.test_train_step import random_rows

BITEXT = Kind("bitext", 1, 4, 64, None)
SCORED = Kind("scored_pairs", 1, 0, 64, None)


@pytest.fixture
def config():
  return from_mapping(config_dict(**{"data.micro_batch": 0, "data.global_batch": 64}))


@pytest.mark.parametrize("kind", [BITEXT, SCORED, dataclasses.replace(BITEXT, vectors=(2, 64))])
def test_shapes_are_those_of_a_batch(config, kind):
  sized = micro_batch.sized(config, 512)
  rows = random_rows(64, kind.texts, 64)
  expected = Arrays(
    hashes=np.zeros((64, kind.texts, 2), np.uint32),
    scores=np.zeros(64, np.float32) if kind is SCORED else None,
    sheets=packed(*rows, 8, block_tokens=512),
    teacher=np.zeros((64, 2, 64), np.float32) if kind.vectors else None,
  )
  describe = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)  # noqa: E731
  assert describe(lowering.batch_shapes(sized, kind, 8)) == describe(expected)
