import dataclasses

import flax.linen as nn
import flax.traverse_util
import numpy as np
import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from mlembed_jax.config_fields import Config
from mlembed_jax.families import FAMILIES
from mlembed_jax.hf import param_mapping
from mlembed_jax.models.encoder import abstract_params


@pytest.fixture(scope="module")
def table(tiny: Config) -> list[param_mapping.Tensor]:
  return param_mapping.tensors(dataclasses.replace(tiny.model, rank=0))


@pytest.mark.parametrize("rank", [0, 24])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_table_covers_the_parameter_tree_exactly(tiny: Config, family: str, rank: int):
  model = dataclasses.replace(tiny.model, family=family, rank=rank)
  tree = nn.unbox(abstract_params(model))
  shapes = {k: v.shape for k, v in flax.traverse_util.flatten_dict(tree, sep="/").items()}
  stacked = {
    t.path: t.our_shape if t.layer is None else (model.layers, *t.our_shape)
    for t in param_mapping.tensors(model)
  }
  assert stacked == shapes


def test_the_table_covers_the_tensors_of_transformers_exactly(
  tiny: Config, table: list[param_mapping.Tensor]
):
  m = tiny.model
  sizes = {key: getattr(m, field) for field, key in param_mapping.CONFIG_KEYS.items()}
  with torch.device("meta"):
    state = Qwen3ForCausalLM(Qwen3Config(**sizes, tie_word_embeddings=True)).state_dict()
  theirs = {k.removeprefix("model."): tuple(v.shape) for k, v in state.items()}
  theirs.pop("lm_head.weight")
  assert {t.name: t.shape for t in table} == theirs
  assert len(table) == 11 * m.layers + 2


def test_every_layout_change_can_be_undone(table: list[param_mapping.Tensor]):
  for t in table:
    array = np.random.default_rng(0).normal(size=t.our_shape)
    tensor = t.to_hf(array)
    assert tensor.shape == t.shape, t.name
    np.testing.assert_array_equal(t.from_hf(tensor), array, err_msg=t.name)


def test_heads_are_rows_of_the_projection(tiny: Config, table: list[param_mapping.Tensor]):
  q = next(t for t in table if t.path == "layers/attention/q")
  o = next(t for t in table if t.path == "layers/attention/o")
  head, k = 1, tiny.model.head_dim
  q_DNK = np.random.default_rng(0).normal(size=q.our_shape)
  o_NKD = np.random.default_rng(1).normal(size=o.our_shape)
  rows = slice(head * k, (head + 1) * k)
  np.testing.assert_array_equal(q.to_hf(q_DNK)[rows], q_DNK[:, head].T)
  np.testing.assert_array_equal(o.to_hf(o_NKD)[:, rows], o_NKD[head].T)
