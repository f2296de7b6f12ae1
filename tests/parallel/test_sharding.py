"""Where arrays live, and what is refused instead of being replicated in silence."""

import dataclasses

import flax.linen as nn
import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from mlembed_jax.batch import Arrays, Sheets
from mlembed_jax.config import from_mapping
from mlembed_jax.errors import ConfigError
from mlembed_jax.families import FAMILIES
from mlembed_jax.parallel import sharding
from mlembed_jax.training import optimizer, train_state
from tests.material import config_dict, padded, random_batch


def sized(**sizes):
  return from_mapping(config_dict(**{f"mesh.{axis}": size for axis, size in sizes.items()}))


def test_mesh_takes_what_is_left():
  assert sharding.mesh_shape(sized(data=1, fsdp=-1, tensor=2), 8) == {
    "data": 1,
    "fsdp": 4,
    "tensor": 2,
  }


@pytest.mark.parametrize(
  ("sizes", "message"),
  [
    ({"data": 3, "fsdp": 1, "tensor": 1}, "mesh: data 3 x"),
    ({"data": 3, "fsdp": -1, "tensor": 1}, "does not cover 8 devices"),
    ({"data": -1, "fsdp": -1, "tensor": 1}, "at most one -1"),
    ({"data": 1, "fsdp": 2, "tensor": 4}, "model.kv_heads: 2 is not a multiple of mesh.tensor = 4"),
  ],
)
def test_impossible_meshes_are_refused(sizes, message):
  with pytest.raises(ConfigError) as error:
    sharding.mesh_shape(sized(**sizes), 8)
  assert message in str(error.value)


def test_an_adapter_that_the_mesh_cannot_split_is_refused():
  lora = {"model.lora.rank": 4, "model.lora.targets": ("v_proj",), "train.init_from": "a/folder"}
  split = {"mesh.data": 1, "mesh.fsdp": 12, "model.rank": 0, "matryoshka.ranks": ()}
  sizes = {"data.global_batch": 24, "data.micro_batch": 0, "eval.batch_size": 24}
  config = from_mapping(config_dict(**lora | split | sizes))
  with pytest.raises(ConfigError, match=r"factors of v_proj have a side of 32, not a multiple of"):
    sharding.mesh_shape(config, 12)


def test_a_batch_that_the_mesh_cannot_split_is_refused():
  config = from_mapping(config_dict(**{"data.global_batch": 12, "data.micro_batch": 12}))
  with pytest.raises(ConfigError, match=r"data.global_batch: 12 is not a multiple"):
    sharding.mesh_shape(config, 8)


def test_a_micro_batch_without_a_sheet_for_each_device_is_refused():
  config = from_mapping(config_dict(**{"data.micro_batch": 511}))  # sheets of up to 64 tokens
  with pytest.raises(ConfigError, match=r"data.micro_batch: 511 tokens .* parts, 512"):
    sharding.mesh_shape(config, 8)
  assert sharding.mesh_shape(config, 4)["fsdp"] == 4


@pytest.fixture(scope="module")
def mesh():
  return sharding.make_mesh(from_mapping(config_dict(**{"mesh.tensor": 2})))


def test_mesh_axes(mesh):
  assert dict(mesh.shape) == {"data": 1, "fsdp": 4, "tensor": 2}


@pytest.mark.parametrize(
  ("shape", "axes", "message"),
  [
    ((8, 8), ("embed", "weird"), r"x: no rule for logical axes \['weird'\]"),
    ((8, 8), ("embed", "rank"), "x: .* puts two dimensions on one mesh axis"),
    ((6, 8), ("embed", "ffn"), "x: 6 is not a multiple of mesh axes"),
  ],
)
def test_impossible_shardings_are_refused(mesh, shape, axes, message):
  with pytest.raises(ValueError, match=message):
    sharding.partition_spec("x", shape, axes, mesh)


def test_state_is_created_where_it_lives(tiny, mesh):
  tx = optimizer.make(tiny.optimizer, 10)
  state = train_state.create(tiny, tx, mesh)
  assert state.params["layers"]["mlp"]["gate"].sharding.spec == P(None, "fsdp", "tensor")
  assert state.params["table"].sharding.spec == P(None, "fsdp")
  moments = state.opt_state[1][0]
  for tree in (moments.mu["params"], moments.nu["params"]):
    assert jax.tree.map(lambda x: x.sharding, tree) == jax.tree.map(
      lambda x: x.sharding, state.params
    )


# How the mesh splits the dimensions of each weight; the first of "layers" counts them.
SPLIT = {
  "table": P(None, "fsdp"),
  "up": P("fsdp", None),
  "layers.attention.q": P(None, "fsdp", "tensor", None),
  "layers.attention.k": P(None, "fsdp", "tensor", None),
  "layers.attention.v": P(None, "fsdp", "tensor", None),
  "layers.attention.q_bias": P(None, "tensor", None),
  "layers.attention.k_bias": P(None, "tensor", None),
  "layers.attention.v_bias": P(None, "tensor", None),
  "layers.attention.o": P(None, "tensor", None, "fsdp"),
  "layers.mlp.gate": P(None, "fsdp", "tensor"),
  "layers.mlp.up": P(None, "fsdp", "tensor"),
  "layers.mlp.down": P(None, "tensor", "fsdp"),
}
# Norm scales alone may stay whole: they are vectors of one width or head.
WHOLE = {
  "layers.attention_norm.scale",
  "layers.attention.q_norm.scale",
  "layers.attention.k_norm.scale",
  "layers.mlp_norm.scale",
  "final_norm.scale",
}


def named(tree):
  """Returns the arrays of a tree by their names."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {jax.tree_util.keystr(path, simple=True, separator="."): x for path, x in leaves}


def test_weights_are_split_and_only_norm_scales_stay_whole(tiny, mesh):
  """A weight that no rule splits would cost every device its full size."""
  specs = {}
  for family in FAMILIES:  # together they have all weights that there are
    config = dataclasses.replace(tiny, model=dataclasses.replace(tiny.model, family=family))
    state = train_state.abstract(config, optimizer.make(config.optimizer, 10), mesh)
    found = {name: x.sharding.spec for name, x in named(state.params).items()}
    assert found == {name: specs.get(name, spec) for name, spec in found.items()}
    specs |= found
  whole = {name for name, spec in specs.items() if not any(spec)}
  assert whole == WHOLE
  assert {name: spec for name, spec in specs.items() if name not in whole} == SPLIT


def test_all_else_that_stays_whole_is_a_number(tiny, mesh):
  """The moments follow their parameters; steps and temperatures are one number each."""
  state = train_state.abstract(tiny, optimizer.make(tiny.optimizer, 10), mesh)
  whole = {name: x.shape for name, x in named(state).items() if x.sharding.is_fully_replicated}
  scales = {name for name in whole if name.endswith(tuple(f"params.{norm}" for norm in WHOLE))}
  assert len(scales) == 3 * len(WHOLE)  # parameters and two moments
  assert {whole[name] for name in set(whole) - scales} == {()}


def test_initial_state_does_not_depend_on_the_mesh(tiny, mesh):
  one = sharding.make_mesh(tiny, jax.devices()[:1])
  tx = optimizer.make(tiny.optimizer, 10)
  states = [train_state.create(tiny, tx, m) for m in (one, mesh)]
  for a, b in zip(*(jax.tree.leaves(jax.device_get(s)) for s in states), strict=True):
    assert (a == b).all()


def test_sheets_are_split_within_their_blocks_and_all_else_by_rows(mesh):
  width = Sheets(*(np.zeros((3, 8, size), np.int32) for size in (4, 4, 32)))
  hashes, by_row = np.zeros((16, 2, 2), np.uint32), P(("data", "fsdp"))
  arrays = Arrays(hashes, np.zeros(16), (width,), np.zeros((16, 2, 8)))
  abstract = sharding.abstract_batch(arrays, mesh)
  for batch in (sharding.put_batch(arrays, mesh), abstract):
    assert {x.sharding.spec for x in batch.sheets[0]} == {P(None, *by_row)}
    assert {x.sharding.spec for x in (batch.hashes, batch.scores, batch.teacher)} == {by_row}
  assert jax.tree.map(np.shape, abstract) == jax.tree.map(np.shape, arrays)


def test_the_residual_stream_is_constrained(tiny, mesh, params):
  """Without mesh and rules in the context Flax drops the constraint without a word."""

  batch = random_batch(tiny.model.vocab, 8, 32)
  with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.logical_rules()):
    text = jax.jit(padded(tiny.model)).lower({"params": params}, *batch).as_text()
  assert "sharding_constraint" in text


def test_a_large_array_without_a_split_is_refused(mesh):
  whole = nn.LogicallyPartitioned(jax.ShapeDtypeStruct((2048, 1024), "float32"), (None, None))
  with pytest.raises(
    ValueError, match=r"'table'\]: 8,388,608 bytes would be whole on every device"
  ):
    sharding.shardings({"table": whole}, mesh)
  split = nn.LogicallyPartitioned(whole.value, ("embed", None))
  assert sharding.shardings({"table": split}, mesh)["table"].spec == P("fsdp", None)
