"""Blocks change memory, not the update: every combination equals the full batch in one block."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlembed_jax.batch import Kind, Sheets
from mlembed_jax.config import from_mapping
from mlembed_jax.models.encoder import abstract_params, parameter_shapes
from mlembed_jax.parallel.sharding import batch_shards, make_mesh, put_batch, shardings
from mlembed_jax.training import frozen, gradcache, lowering, train_state, train_step
from mlembed_jax.training.train_step import BatchLoss, TeacherShape
from tests.material import FAST_COMPILE, config_dict, kind_of, random_params
from tests.training.test_train_step import batch_of, batch_on, on_mesh

TEACHER = dataclasses.replace(
  from_mapping(config_dict()).model, layers=4, width=64, rank=0, remat="none"
)


# Two of the four blocks of 512 tokens are kept.
EIGHT = {"mesh.data": 2, "data.micro_batch": 512, "data.kept_tokens": 1024}


def value_and_grad(config, kind, mesh, change=lambda arrays: arrays, **options):
  boxed = abstract_params(config.model)
  scored = kind.task_type == "scored_pairs"
  texts = 2 if scored else 4
  arrays = batch_of(texts=texts, shards=batch_shards(mesh.shape), **options)
  if scored:
    scores = np.random.default_rng(0).choice([0.0, 0.25, 1.0], 16).astype(np.float32)
    arrays = arrays._replace(scores=scores)
  if config.kd.teacher == "stored":
    vectors = np.random.default_rng(1).normal(size=(16, 2 + kind.positives, 64))
    arrays = arrays._replace(teacher=vectors.astype(np.float32))
  online = TeacherShape(TEACHER, (1, 3, 4)) if config.kd.teacher == "online" else None

  def run(params, fixed, head, batch, rank, teacher_params):
    loss = BatchLoss(config, kind, online)
    return loss.value_and_grad(params, head, batch, rank, 0.25, teacher_params, fixed)

  with on_mesh(mesh):
    params = jax.device_put(random_params(config.model), shardings(boxed, mesh))
    logs = jax.tree.map(jnp.asarray, train_state.initial_log_temperature(config))
    size, draw = (config.model.width, config.kd.projection), np.random.default_rng(2)
    head = train_state.Head(logs, draw.normal(size=size).astype(np.float32) if size[1] else None)
    rank = np.int32(16) if config.model.rank else None
    teacher_params = random_params(TEACHER, 3) if online else None
    return jax.device_get(
      jax.jit(run, compiler_options=FAST_COMPILE)(
        *frozen.split(config, params), head, put_batch(change(arrays), mesh), rank, teacher_params
      )
    )


def assert_equal(found, expected, loss_tolerance=1e-6, grad_tolerance=1e-5):
  (result, grads), (full, full_grads) = found, expected
  assert result.loss == pytest.approx(full.loss, rel=loss_tolerance)
  assert jax.tree.structure(grads) == jax.tree.structure(full_grads)
  for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(full_grads), strict=True):
    assert np.abs(a - b).max() <= grad_tolerance * np.abs(b).max()


ONE_AXIS = {"matryoshka.dims": (48,), "matryoshka.exits": (3,), "matryoshka.ranks": (24,)}
LORA = {"model.lora.rank": 4, "train.init_from": "a/folder"}
FROZEN = {"train.trainable": ("table", "up", "final_norm/*"), "train.frozen": ("layers/*",)}
COMBINATIONS = {
  "retrieval": ("retrieval", {}),
  "nothing nested": ("retrieval", ONE_AXIS),
  "full table": ("retrieval", {"model.rank": 0, "matryoshka.ranks": ()}),
  "remat": ("clustering", {"model.remat": "full"}),
  "bitext, joint, all negatives": (
    "bitext",
    {"losses.softmax": "joint", "losses.inbatch_negatives": True},
  ),
  "online teacher": ("retrieval", {"kd.teacher": "online", "kd.space": "unit"}),
  "online teacher judges": (
    "retrieval",
    {
      "kd.teacher": "online",
      "losses.false_negative_score": "teacher",
      "losses.false_negative_margin": 0.0,
    },
  ),
  "stored vectors": ("bitext", {"kd.teacher": "stored", "kd.projection": 64}),
  "self-distillation": ("retrieval", {"losses.self_distillation": 0.5}),
  "spread out": ("retrieval", {"losses.spread_out": 0.5}),
  "an adapter": ("clustering", LORA),
  "frozen layers": ("retrieval", FROZEN | {"train.init_from": "a/folder"}),
  "learned temperature": ("bitext", {"losses.learn_temperature": True}),
  "scored pairs": ("scored_pairs", {"losses.learn_temperature": True}),
}


@pytest.mark.parametrize("name", COMBINATIONS)
def test_blocks_on_eight_devices_equal_the_full_batch_on_one(name):
  kind, fields = COMBINATIONS[name]
  config = from_mapping(config_dict(**fields))
  full = value_and_grad(config, kind_of(kind), one_device(config))
  split = from_mapping(config_dict(**fields, **EIGHT))
  # Per device 8 texts of 32 tokens at most, in 4 blocks of 2 sheets.
  found = value_and_grad(split, kind_of(kind), make_mesh(split), block_tokens=512)
  assert_equal(found, full)


def test_int8_on_eight_devices_equals_one():
  """A coordinate at the edge of a level falls to another one when sums have another order."""
  fields = {"losses.int8": 0.5}
  config = from_mapping(config_dict(**fields))
  full = value_and_grad(config, kind_of("retrieval"), one_device(config))
  split = from_mapping(config_dict(**fields, **EIGHT))
  found = value_and_grad(split, kind_of("retrieval"), make_mesh(split), block_tokens=512)
  assert_equal(found, full, loss_tolerance=1e-4, grad_tolerance=1e-2)


def test_two_positives_and_two_widths_on_eight_devices_equal_one_block_on_one():
  fields = {"kd.teacher": "online", "losses.self_distillation": 0.5, "losses.binary": 0.1}
  config = from_mapping(config_dict(**fields))
  kind = kind_of("bitext", positives=2)
  full = value_and_grad(config, kind, one_device(config), size=64, widths=(64,))
  split = from_mapping(config_dict(**fields, **EIGHT))
  found = value_and_grad(split, kind, make_mesh(split), size=64, block_tokens=1024)
  assert_equal(found, full)


TINY = from_mapping(config_dict())
BLOCKS = {"size": 64, "block_tokens": 512}


@functools.cache
def blocks_of_one_width():
  options = BLOCKS | {"widths": (64,)}
  return value_and_grad(TINY, kind_of("retrieval"), one_device(TINY), **options)


def one_device(config):
  return make_mesh(config, jax.devices()[:1])


OTHERWISE = {
  "one block": {"block_tokens": 10**6, "widths": (64,)},
  "one block per width": {"block_tokens": 10**6},
  "two widths": {},
  "one text per sheet": {"share": False},
}


@pytest.mark.parametrize("name", OTHERWISE)
def test_how_texts_are_packed_changes_nothing(name):
  options = BLOCKS | OTHERWISE[name]
  found = value_and_grad(TINY, kind_of("retrieval"), one_device(TINY), **options)
  assert_equal(found, blocks_of_one_width())


def with_empty_block(arrays):
  """Adds to each width a block without a text; its tokens would change the states."""

  def longer(sheets):
    filled = Sheets(ends=sheets.tokens.shape[-1], texts=64, tokens=7)
    return jax.tree.map(lambda x, y: np.concatenate([x, np.full_like(x[:1], y)]), sheets, filled)

  return arrays._replace(sheets=tuple(map(longer, arrays.sheets)))


def test_an_empty_block_changes_not_a_bit():
  options = BLOCKS | {"widths": (64,)}
  found = value_and_grad(TINY, kind_of("retrieval"), one_device(TINY), with_empty_block, **options)
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(blocks_of_one_width()), strict=True):
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(("share", "times"), [(0, 2), (1, 1)])
def test_blocks_with_a_text_are_encoded_twice_or_kept(share, times):
  arrays = with_empty_block(batch_of(**BLOCKS))
  # All but a token: the block that holds the last one is kept whole.
  kept_tokens = share * (max(s.tokens.size for s in arrays.sheets) - 1)
  used = sum(int(np.any(s.texts < 64, axis=(1, 2)).sum()) for s in arrays.sheets)
  encoded = []

  def encode(scale, block):
    jax.debug.callback(lambda: encoded.append(1))
    return (scale * block.texts)[None, ..., None]

  def run(scale, batch):
    loss = lambda states, _, head: (jnp.sum(states) + head, states)  # noqa: E731
    nothing = lambda _: None  # noqa: E731
    return gradcache.value_and_grad(encode, nothing, loss, scale, scale, batch, kept_tokens)

  with on_mesh(one_device(TINY)):
    (_, states), grads = jax.jit(run)(jnp.float32(2), arrays)
  jax.effects_barrier()
  np.testing.assert_array_equal(states.reshape(-1), 2 * np.arange(64))
  assert grads == (np.sum(np.arange(64)), 1)
  assert used < sum(len(s.texts) for s in arrays.sheets) - 2
  assert len(encoded) == times * used


def test_what_is_kept_is_split_over_the_devices():
  """The temporary memory of a device grows by its share of all that is kept."""

  def temporaries(kept_tokens):
    config = from_mapping(config_dict(**EIGHT | {"data.kept_tokens": kept_tokens}))
    mesh = make_mesh(config)
    kind = Kind("retrieval", 1, 2, 64, None)
    with on_mesh(mesh):
      compiled = lowering.lowered_step(config, kind, 10, mesh).compile(FAST_COMPILE)
      sheets = lowering.batch_shapes(config, kind, batch_shards(mesh.shape)).sheets
      params = parameter_shapes(config.model)
      kept = train_step.kept_bytes(config, params, None, sheets)
    return compiled.memory_analysis().temp_size_in_bytes, kept // batch_shards(mesh.shape)

  (none, nothing), (all_, kept) = temporaries(0), temporaries(10**6)
  assert nothing == 0 and kept > none / 2
  assert 0.8 * kept < all_ - none < 1.2 * kept


COLLECTIVE = re.compile(
  r"= (.*?) (?:all-gather|all-reduce|all-to-all|reduce-scatter|collective-permute)(?:-start)?\("
)


def test_states_never_leave_their_device():
  """Of clustering: in-batch terms gather the states of other rows for themselves."""
  config = from_mapping(config_dict(**EIGHT))
  mesh = make_mesh(config)

  def run(params, batch):
    loss = BatchLoss(config, kind_of("clustering"))
    return loss.value_and_grad(params, train_state.Head({}), batch, np.int32(16), progress=0.0)

  with on_mesh(mesh):
    boxed = abstract_params(config.model)
    params = jax.device_put(random_params(config.model), shardings(boxed, mesh))
    lowered = jax.jit(run).lower(params, batch_on(mesh, block_tokens=512))
    program = lowered.compile(FAST_COMPILE).as_text()
  exchanged = COLLECTIVE.findall(program)
  assert len(exchanged) > 10  # of weights, their gradients and the token table
  # States have at least three axes: exits, texts and width. So have weights by heads, and the
  # columns of the token table on one device, 24 / 4, which are exchanged by sheet and token.
  m = config.model
  by_heads = {f"{m.width},{n},{m.head_dim}" for n in (m.heads, m.kv_heads)}
  by_heads |= {f"{n},{m.head_dim},{m.width}" for n in (m.heads, m.kv_heads)}
  large = set(re.findall(r"f32\[(\d+,\d+,[\d,]+)\]", " ".join(exchanged)))
  assert large - by_heads == {"2,32,6"}
