"""One update: the same on any mesh, compiled once per shape, settings that act, drawn ranks."""

import collections
import contextlib
import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlembed_jax.batch import Arrays
from mlembed_jax.config import flatten, from_mapping
from mlembed_jax.matryoshka import axes_of
from mlembed_jax.models.encoder import abstract_params
from mlembed_jax.parallel.sharding import (
  batch_shards,
  logical_rules,
  make_mesh,
  put_batch,
  shardings,
)
from mlembed_jax.training import optimizer, train_state, train_step
from mlembed_jax.training.train_state import Head
from mlembed_jax.training.train_step import BatchLoss
from tests.material import FAST_COMPILE, config_dict, kind_of, packed, random_batch, random_params

pytestmark = pytest.mark.usefixtures("fast_compile")


def random_rows(rows=16, texts=4, size=32, seed=0):
  """Returns tokens [B, C, T] and lengths [B, C]."""
  tokens, lengths = random_batch(640, rows * texts, size, seed)
  return tokens.reshape(rows, texts, size), lengths.reshape(rows, texts)


def batch_of(rows=16, texts=4, size=32, seed=0, **options):
  """Returns the same rows for any number of `shards`; all in one block as it is."""
  hashes = np.random.default_rng(seed).integers(0, 2**32, (rows, texts, 2), np.uint32)
  hashes[5, 1] = hashes[11, 1]
  sheets = packed(*random_rows(rows, texts, size, seed), **options)
  return Arrays(hashes, sheets=sheets)


def batch_on(mesh, *shape, **options):
  return put_batch(batch_of(*shape, shards=batch_shards(mesh.shape), **options), mesh)


def on_mesh(mesh):
  stack = contextlib.ExitStack()
  stack.enter_context(jax.set_mesh(mesh))
  stack.enter_context(nn.logical_axis_rules(logical_rules()))
  return stack


RETRIEVAL, CLUSTERING = kind_of("retrieval"), kind_of("clustering")


def loss_and_grads(config, devices, kind):
  mesh = make_mesh(config, devices)
  boxed = abstract_params(config.model)
  with on_mesh(mesh):
    params = jax.device_put(random_params(config.model), shardings(boxed, mesh))

    def run(params, batch, rank):
      return BatchLoss(config, kind).value_and_grad(params, Head({}), batch, rank, progress=0.0)

    result, (grads, _) = jax.jit(run, compiler_options=FAST_COMPILE)(
      params, batch_on(mesh), np.int32(16)
    )
    return jax.device_get((result.loss, grads))


@functools.cache
def one_device(kind):
  return loss_and_grads(from_mapping(config_dict()), jax.devices()[:1], kind)


MESHES = {
  "data 8": (8, 1, 1),
  "fsdp 8": (1, 8, 1),
  "fsdp 4 x tensor 2": (1, 4, 2),
  "data 2 x fsdp 2 x tensor 2": (2, 2, 2),
}


@pytest.mark.parametrize("kind", [RETRIEVAL, CLUSTERING], ids=lambda kind: kind.task_type)
@pytest.mark.parametrize("sizes", MESHES.values(), ids=MESHES)
def test_eight_devices_equal_one(sizes, kind):
  names = ("mesh.data", "mesh.fsdp", "mesh.tensor")
  config = from_mapping(config_dict(**dict(zip(names, sizes, strict=True))))
  loss, grads = loss_and_grads(config, None, kind)
  expected, expected_grads = one_device(kind)
  assert loss == pytest.approx(expected, rel=1e-5)
  for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(expected_grads), strict=True):
    assert np.abs(a - b).max() <= 1e-5 * np.abs(b).max()


@pytest.fixture(scope="module")
def trainer(tiny):
  mesh = make_mesh(tiny)
  with on_mesh(mesh):
    yield mesh, train_step.make(tiny, 20, mesh)


def new_state(config, mesh):
  return train_state.create(config, optimizer.make(config.optimizer, 20), mesh)


def test_compiles_once_per_shape(tiny, trainer):
  mesh, step = trainer
  state = new_state(tiny, mesh)
  kinds = [(4, 32, RETRIEVAL), (3, 32, CLUSTERING), (4, 64, RETRIEVAL)]
  for _ in range(3):
    for texts, size, kind in kinds:
      state, _ = step(state, batch_on(mesh, 16, texts, size), None, kind=kind)
  assert step._cache_size() == len(kinds)
  assert int(state.step) == 9


def test_one_program_whatever_number_of_blocks_is_used(tiny):
  mesh = make_mesh(tiny)
  rows, rng = batch_shards(mesh.shape), np.random.default_rng(0)
  with on_mesh(mesh):
    step, state = train_step.make(tiny, 20, mesh), new_state(tiny, mesh)
    used = set()
    for longest in (4, 32):
      tokens, _ = random_rows()
      lengths = rng.integers(2, longest + 1, tokens.shape[:2])
      batch = batch_of()._replace(sheets=packed(tokens, lengths, rows, block_tokens=256))
      used.add(int(np.any(batch.sheets[0].ends < 32, axis=(1, 2)).sum()))
      state, metrics = step(state, put_batch(batch, mesh), None, kind=RETRIEVAL)
      assert np.isfinite(float(metrics["gradient_norm"]))
  assert len(used) == 2 and step._cache_size() == 1


def test_learned_temperatures_compile_once_and_leave_the_lowest_again():
  start = {f"losses.retrieval.{name}": 0.02 for name in ("temperature", "final_temperature")}
  config = from_mapping(config_dict(**start, **{"losses.learn_temperature": True}))
  # A rate that crosses the whole range with a few updates.
  fast = dataclasses.replace(config.optimizer, learning_rate=0.3, warmup_steps=0)
  config, mesh = dataclasses.replace(config, optimizer=fast), make_mesh(config)
  tokens, lengths = random_rows()
  for array in (tokens, lengths):
    array[:, 1] = array[:, 0]  # a positive with a cosine of 1: lower is better
  random = batch_of(shards=batch_shards(mesh.shape))
  equal = random._replace(sheets=packed(tokens, lengths, batch_shards(mesh.shape)))
  with on_mesh(mesh):
    step, state = train_step.make(config, 20, mesh), new_state(config, mesh)
    seen = []
    for batch in [equal] * 5 + [random] * 12:  # Adam's momentum lasts for some steps
      state, metrics = step(state, put_batch(batch, mesh), None, kind=RETRIEVAL)
      seen.append(float(metrics["temperature"]))
  assert step._cache_size() == 1
  assert min(seen) == pytest.approx(0.01, rel=1e-5)
  assert seen[-1] > 0.011


def test_loss_falls_on_a_repeated_batch_and_metrics_are_complete(tiny, trainer):
  mesh, step = trainer
  state, losses = new_state(tiny, mesh), []
  for _ in range(8):
    state, metrics = step(state, batch_on(mesh), None, kind=RETRIEVAL)
    losses.append(float(metrics["loss"]))
  assert losses[-1] < losses[0]
  assert set(metrics) == {
    "loss",
    "hard_loss",
    "inbatch_loss",
    "gradient_norm",
    "finite",
    "state_finite",
    "learning_rate",
    "rank",
    "temperature",
    "negatives",
    "empty_rows",
    *("texts", "tokens", "computed_tokens", "squares"),
  }
  assert float(metrics["loss"]) == pytest.approx(
    float(metrics["hard_loss"] + metrics["inbatch_loss"]), rel=1e-5
  )
  assert int(metrics["rank"]) in tiny.matryoshka.ranks


def _filled(tree, name, value):
  """Returns a tree with `value` in every leaf whose path has the name."""

  def one(path, leaf):
    return jnp.full_like(leaf, value) if name in jax.tree_util.keystr(path) else leaf

  return jax.tree_util.tree_map_with_path(one, tree)


def test_a_step_that_is_not_finite_changes_no_number_but_counts(tiny, trainer):
  mesh, step = trainer
  state = new_state(tiny, mesh)
  state = state.replace(params=_filled(state.params, "table", np.nan))
  before = jax.tree.map(np.array, state)
  after, metrics = step(state, batch_on(mesh), None, kind=RETRIEVAL)
  assert not metrics["finite"]
  for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(before), strict=True):
    counts = jnp.issubdtype(a.dtype, jnp.integer)  # the schedule goes on, as the steps do
    np.testing.assert_array_equal(a, b + 1 if counts else b)
  jax.tree.map(np.testing.assert_array_equal, train_state.passed_over(before), after)


def test_an_update_that_overflows_is_noticed(tiny, trainer):
  mesh, step = trainer
  state = new_state(tiny, mesh)
  state = state.replace(opt_state=_filled(state.opt_state, "mu", 3e38))
  _, metrics = step(state, batch_on(mesh), None, kind=RETRIEVAL)
  assert metrics["finite"] and not metrics["state_finite"]
  assert np.isfinite(metrics["loss"]) and np.isfinite(metrics["gradient_norm"])


def test_the_old_state_is_donated(tiny, trainer):
  mesh, step = trainer
  state = new_state(tiny, mesh)
  step(state, batch_on(mesh), None, kind=RETRIEVAL)
  assert state.params["table"].is_deleted()


def test_rank_draws_are_proportional_and_depend_on_seed_and_step_alone(tiny):
  axes = axes_of(tiny.model, dataclasses.replace(tiny.matryoshka, ranks=(2, 4, 8, 16)))
  draw = jax.jit(jax.vmap(lambda s: train_step.draw_rank(axes, 0, s)))
  ranks = np.asarray(draw(np.arange(20_000)))
  counts = collections.Counter(ranks.tolist())
  for rank, share in zip((2, 4, 8, 16), (1 / 15, 2 / 15, 4 / 15, 8 / 15), strict=True):
    assert counts[rank] / 20_000 == pytest.approx(share, abs=0.015)
  np.testing.assert_array_equal(ranks[500:510], draw(np.arange(500, 510)))
  other = jax.jit(jax.vmap(lambda s: train_step.draw_rank(axes, 1, s)))(np.arange(100))
  assert np.any(np.asarray(other) != ranks[:100])


OTHER = {
  "losses.retrieval.temperature": 0.1,
  "losses.retrieval.final_temperature": 0.1,
  "losses.retrieval.inbatch": False,
  "losses.retrieval.symmetric": True,
  "losses.learn_temperature": True,
  "losses.softmax": "joint",
  "losses.inbatch_negatives": True,
  "losses.inbatch_passage_grad": False,
  "losses.mask_duplicates": False,
  "losses.false_negative_margin": 0.1,
  "losses.self_distillation": 0.5,
  "losses.spread_out": 0.5,
  "losses.int8": 0.5,
  "losses.binary": 0.5,
  "matryoshka.dims": (48,),
  "matryoshka.exits": (3,),
  "matryoshka.ranks": (24,),
  "optimizer.learning_rate": 2e-3,
  "optimizer.min_learning_rate": 1e-6,
  "optimizer.schedule": "constant",
  "optimizer.warmup_steps": 5,
  "optimizer.beta1": 0.8,
  "optimizer.beta2": 0.9,
  "optimizer.eps": 1e-6,
  "optimizer.weight_decay": 0.1,
  "optimizer.clip_norm": 2.0,
  "optimizer.moments": "bfloat16",
  "train.seed": 1,
}
# Fields that act only beside others, with those.
BESIDE = {
  "losses.false_negative_score": ("teacher", {"losses.false_negative_margin": 0.1}),
  "kd.space": ("unit", {}),
  "kd.weight": (0.5, {}),
  "kd.prefix": (0.5, {}),
  "kd.projection": (64, {}),
  "kd.similarity": (0.5, {}),
  "kd.temperature": (0.1, {"kd.similarity": 0.5}),
  "losses.contrastive": (0.5, {}),
}


def program(config, kind=RETRIEVAL, vectors=False):
  mesh = make_mesh(config)
  tx = optimizer.make(config.optimizer, 20)
  state = train_state.abstract(config, tx, mesh)
  arrays = batch_of(shards=batch_shards(mesh.shape))
  if kind.task_type == "scored_pairs":
    arrays = arrays._replace(scores=np.zeros(16, np.float32))
  if vectors:
    arrays = arrays._replace(teacher=np.zeros((16, 4, 64), np.float32))
  batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arrays)
  with on_mesh(mesh):
    step = train_step.make(config, 20, mesh)
    return str(step.trace(state, batch, None, kind=kind).jaxpr)


@functools.cache
def tiny_program(kind=RETRIEVAL):
  return program(from_mapping(config_dict()), kind)


KINDS = ("bitext", "clustering", "classification", "scored_pairs")
NEGATIVES = {f"losses.{kind}.negatives" for kind in KINDS[:3]}  # drawn with the batch
# Per task type: another value of each of its settings.
OWN = {
  ("bitext", "inbatch"): False,
  ("bitext", "symmetric"): True,
  ("clustering", "inbatch"): True,
  ("clustering", "symmetric"): True,
  ("classification", "inbatch"): True,
  ("classification", "symmetric"): True,
  **{(kind, "temperature"): 0.1 for kind in KINDS},
  **{(kind, "final_temperature"): 0.1 for kind in KINDS},
}
# Fields of these groups that act outside the program of a step.
ELSEWHERE = {
  *("train.trainable", "train.frozen"),  # tests/training/test_frozen.py
  *("losses.retrieval.negatives", "train.init_from", "train.steps", "train.epochs"),
  *(
    "train.log_every",
    "train.trackers",
    "train.profile_steps",
    "train.checkpoint_every",
    "train.keep_checkpoints",
  ),
  *("train.keep_every", "train.keep_best", "train.max_nonfinite_steps", "train.spike_factor"),
  *("kd.teacher", "kd.exits", "kd.match", "kd.mrl"),  # tests/training/test_teacher.py
}


def test_no_setting_is_forgotten():
  groups = ("losses.", "kd.", "matryoshka.", "optimizer.", "train.")
  fields = {name for name in flatten(from_mapping(config_dict())) if name.startswith(groups)}
  other_kinds = {name for name in fields if name.split(".")[1] in KINDS}
  assert fields - other_kinds == {*OTHER, *BESIDE, *ELSEWHERE}
  assert other_kinds == {f"losses.{kind}.{field}" for kind, field in OWN} | NEGATIVES


@pytest.mark.parametrize("field", OTHER)
def test_every_setting_changes_the_program(field):
  assert program(from_mapping(config_dict(**{field: OTHER[field]}))) != tiny_program()


def test_each_choice_of_moments_is_a_program_of_its_own():
  choices = ("float32", "bfloat16", "factored")
  found = {program(from_mapping(config_dict(**{"optimizer.moments": m}))) for m in choices}
  assert len(found) == 3


@pytest.mark.parametrize("field", ("learning_rate", "beta1", "beta2", "eps", "weight_decay"))
def test_settings_change_the_program_of_factored_moments_too(field):
  factored = {"optimizer.moments": "factored"}
  field = f"optimizer.{field}"
  before, after = (
    program(from_mapping(config_dict(**factored, **more))) for more in ({}, {field: OTHER[field]})
  )
  assert before != after


@pytest.mark.parametrize("field", BESIDE)
def test_settings_beside_others_change_the_program(field):
  value, others = BESIDE[field]
  base = {"kd.teacher": "stored", **others}
  before, after = (
    program(from_mapping(config_dict(**settings)), vectors=True)
    for settings in (base, base | {field: value})
  )
  assert before != after


@pytest.mark.parametrize(("kind", "field"), OWN)
def test_a_task_type_reads_its_own_settings(kind, field):
  base = {f"losses.{k}.inbatch": True for k in KINDS[:3]} if field == "symmetric" else {}
  base |= {"losses.bitext.symmetric": False}

  def found(kind, **changes):
    return program(from_mapping(config_dict(**base | changes)), kind_of(kind))

  change = {f"losses.{kind}.{field}": OWN[kind, field]}
  assert found(kind, **change) != found(kind)
  assert found("retrieval", **change) == found("retrieval")


def test_the_program_is_the_same_for_the_same_settings():
  assert program(from_mapping(config_dict())) == tiny_program()
