"""The schedule's worked example, updates against numpy formulas, and the state of each option."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from mlembed_jax.config import from_mapping
from mlembed_jax.config_fields import OptimizerConfig
from mlembed_jax.models.encoder import parameter_count
from mlembed_jax.parallel.sharding import make_mesh, put_batch
from mlembed_jax.training import optimizer, train_state, train_step
from mlembed_jax.training.checkpoint import Checkpoints, Retention
from mlembed_jax.training.factored import scale_by_factored_rms
from tests.benchmarks.common import load_config
from tests.material import CONFIGS, batches_of, config_dict, kind_of
from tests.training.test_train_step import on_mesh

MOMENTS = ("float32", "bfloat16", "factored")

CONFIG = OptimizerConfig(
  learning_rate=1e-5,
  min_learning_rate=1e-7,
  schedule="cosine",
  warmup_steps=100,
  beta1=0.9,
  beta2=0.98,
  eps=1e-8,
  weight_decay=0.01,
  clip_norm=1.0,
  moments="float32",
)


@pytest.mark.parametrize(
  ("update", "rate"),
  [
    (0, 0),
    (1, 1e-7),
    (50, 5e-6),
    (100, 1e-5),
    (325, 8.535534e-6),
    (550, 5e-6),
    (900, 3.015369e-7),
    (999, 1e-7),
  ],
)
def test_schedule_worked_example(update, rate):
  assert optimizer.schedule(CONFIG, 1000)(update) == pytest.approx(rate, rel=2e-6, abs=1e-14)


def test_constant_schedule():
  constant = optimizer.schedule(dataclasses.replace(CONFIG, schedule="constant"), 1000)
  assert [float(constant(u)) for u in (100, 999)] == pytest.approx([1e-5, 1e-5])


# Updates by formula.


def rounded(x):
  return x.astype(ml_dtypes.bfloat16).astype(np.float32)


def adam(moments):
  """Returns (direction of a gradient, updates done from 1) to the update of rate 1, in numpy."""
  keep = rounded if moments == "bfloat16" else lambda x: x
  m, v = 0.0, 0.0

  def step(grad, t):
    nonlocal m, v
    m, v = 0.9 * m + 0.1 * grad, 0.98 * v + 0.02 * grad**2
    direction = (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.98**t)) + 1e-8)
    m, v = keep(m), keep(v)
    return direction

  return step


def outer(square):
  """Returns the matrix of rank one that Adafactor puts in the place of another."""
  return square.mean(1)[:, None] * square.mean(0)[None] / square.mean()


def adafactor(name):
  """Returns the same for factored moments, of parameters whose matrices are known by their name."""
  v, ema = 0.0, 0.0

  def matrices(square):
    if name == "table":
      return outer(square)
    if name == "up":  # [layer, D, N, K], each head of each layer a matrix
      heads = [[outer(layer[:, n]) for n in range(layer.shape[1])] for layer in square]
      return np.array(heads).transpose(0, 2, 1, 3)
    return square

  def step(grad, t):
    nonlocal v, ema
    v = 0.98 * v + 0.02 * (grad.astype(np.float64) ** 2 + 1e-16)
    scaled = grad / np.sqrt(matrices(v / (1 - 0.98**t)))
    ema = 0.9 * ema + 0.1 * scaled
    direction, ema = ema / (1 - 0.9**t), rounded(ema)
    return direction

  return step


# Names as in the model where they decide: layers are no axis of a matrix, however many there are.
SHAPES = {"scale": (4,), "table": (130, 128), "up": (2, 128, 3, 129), "gate": (140, 8, 200)}
IN_LAYERS = ("up", "gate")


def tree_of(arrays):
  layers = {name: jnp.asarray(arrays[name]) for name in IN_LAYERS}
  rest = {name: jnp.asarray(x) for name, x in arrays.items() if name not in IN_LAYERS}
  return rest | {"layers": layers}


@pytest.mark.parametrize("moments", MOMENTS)
def test_updates_equal_the_formula_with_decay_on_every_parameter(moments):
  generator = np.random.default_rng(0)
  draw = lambda shape: generator.normal(size=shape).astype(np.float32)  # noqa: E731
  params = {name: draw(shape) for name, shape in SHAPES.items()}
  tx = optimizer.make(dataclasses.replace(CONFIG, moments=moments), 1000)
  state = tx.init(tree_of(params))
  steps = {n: adafactor(n) if moments == "factored" else adam(moments) for n in SHAPES}
  for update in range(4):
    # Rows and columns of different sizes, and smaller from one update to the next.
    grads = {
      n: draw(p.shape) * np.abs(draw(p.shape[-1:])) / (1 + update) for n, p in params.items()
    }
    updates, state = tx.update(tree_of(grads), state, tree_of(params))
    norm = np.sqrt(sum(np.sum(g**2) for g in grads.values()))
    rate = max(1e-7, 1e-5 * update / 100) if update else 0.0
    for name, grad in grads.items():
      direction = steps[name](grad / max(1.0, norm), update + 1)
      expected = -rate * (direction + 0.01 * params[name])
      found = updates["layers"][name] if name in IN_LAYERS else updates[name]
      # An ulp of float32 before rounding may be one of bfloat16 after it, 0.8 % of a moment.
      limit = {"atol": 1e-13} if moments == "float32" else {"atol": 2e-2 * rate}
      np.testing.assert_allclose(found, expected, rtol=2e-5, **limit)
      assert np.mean(np.abs(found - expected)) <= 2e-5 * np.mean(np.abs(expected))
      params[name] = params[name] + expected.astype(np.float32)


def test_factors_of_a_matrix_are_those_of_optax():
  """With its decay: (1 - t ** -0.8), which ours is not, both are fed one gradient, then another."""
  grads = [
    jnp.asarray(np.random.default_rng(i).normal(size=(130, 256)), jnp.float32) for i in (0, 1)
  ]
  beta2 = lambda i, _: 0.98 * (1 - 0.98 ** (i * 1.0)) / (1 - 0.98 ** (i + 1.0))  # noqa: E731
  theirs = optax.scale_by_factored_rms(decay_rate_fn=beta2, epsilon=1e-16)
  ours = scale_by_factored_rms(0.98, 1e-8)
  states = [tx.init(grads[0]) for tx in (theirs, ours)]
  for grad in grads:
    expected, states[0] = theirs.update(grad, states[0], grad)
    found, states[1] = ours.update(grad, states[1])
    np.testing.assert_allclose(found, expected, rtol=1e-5)


# The state on devices.


def wide(moments, fields):
  """Returns a configuration of which the table, its factor and the MLP are factored."""
  sizes = {"width": 128, "ffn": 256, "rank": 128, "layers": 2}
  sizes = {f"model.{name}": size for name, size in sizes.items()}
  axes = {"dims": (16, 128), "exits": (1, 2), "ranks": (64, 128)}
  axes = {f"matryoshka.{name}": sizes for name, sizes in axes.items()}
  return from_mapping(config_dict(**sizes | axes | {"optimizer.moments": moments} | fields))


def opt_state(config, mesh):
  return train_state.abstract(config, optimizer.make(config.optimizer, 20), mesh).opt_state


def bytes_of(leaf, shape):
  return int(np.prod(shape)) * leaf.dtype.itemsize


@pytest.mark.parametrize(("moments", "each"), [("float32", 8), ("bfloat16", 4), ("factored", 2)])
def test_bytes_of_the_state_of_the_140m(moments, each):
  changes = {"optimizer.moments": moments}
  config = load_config(CONFIGS / "140m.py", **changes)
  mesh, size = make_mesh(config), parameter_count(config.model)
  leaves = jax.tree.leaves(opt_state(config, mesh))
  whole = sum(bytes_of(leaf, leaf.shape) for leaf in leaves)
  assert each * size <= whole <= 1.01 * each * size + 100  # 1 %: rows, columns and norm scales
  local = sum(bytes_of(leaf, leaf.sharding.shard_shape(leaf.shape)) for leaf in leaves)
  # Norm scales are whole on each device, and so are means over the axis that is split.
  assert local <= 1.03 * whole / 8


def test_rows_and_columns_lie_where_their_matrix_does():
  config = wide("factored", {"mesh.fsdp": 4, "mesh.tensor": 2})
  _, ((factored, _), *_) = opt_state(config, make_mesh(config))
  gate_DF = [
    moment["params"]["layers"]["mlp"]["gate"] for moment in (factored.rows, factored.columns)
  ]
  assert [x.shape for x in gate_DF] == [(2, 128, 1), (2, 1, 256)]
  specs = [PartitionSpec(None, "fsdp", None), PartitionSpec(None, None, "tensor")]
  assert [x.sharding.spec for x in gate_DF] == specs


def random_like(params, seed):
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), params)


@functools.cache
def updated(moments, sizes):
  """Returns a configuration, its first state, and that after three updates by random gradients."""
  names = ("mesh.data", "mesh.fsdp", "mesh.tensor")
  config = wide(moments, dict(zip(names, sizes, strict=True)))
  mesh = make_mesh(config, jax.devices()[: np.prod(sizes)])
  tx = optimizer.make(config.optimizer, 20)
  layout = jax.tree.map(lambda x: x.sharding, train_state.abstract(config, tx, mesh))

  @functools.partial(jax.jit, out_shardings=layout)
  def update(state, grads):
    trained, grads = (train_state.trained(tree, state.head) for tree in (state.params, grads))
    updates, opt_state = tx.update(grads, state.opt_state, trained)
    return state.replace(opt_state=opt_state, **optax.apply_updates(trained, updates))

  with on_mesh(mesh):
    state = start = train_state.create(config, tx, mesh)
    for seed in range(3):
      state = update(state, jax.device_put(random_like(state.params, seed), layout.params))
  return config, start, state


@pytest.mark.usefixtures("fast_compile")
@pytest.mark.parametrize("moments", MOMENTS)
def test_eight_devices_equal_one(moments):
  found, (_, start, expected) = (updated(moments, sizes) for sizes in ((2, 2, 2), (1, 1, 1)))
  trees = (tree.params for tree in jax.device_get((found[2], expected, start)))
  for a, b, before in zip(*map(jax.tree.leaves, trees), strict=True):
    moved = np.mean(np.abs(b - before))
    assert moved > 0 and np.mean(np.abs(a - b)) <= 1e-4 * moved


@pytest.mark.usefixtures("fast_compile")
@pytest.mark.parametrize("moments", MOMENTS[1:])
def test_a_state_is_saved_and_restored_onto_another_mesh(moments, tmp_path):
  config, _, state = updated(moments, (2, 2, 2))
  other = dataclasses.replace(
    config, mesh=dataclasses.replace(config.mesh, data=1, fsdp=8, tensor=1)
  )
  mesh, checkpoints = make_mesh(other), Checkpoints(Retention(tmp_path, 1))
  checkpoints.save(3, state)
  tx = optimizer.make(other.optimizer, 20)
  checkpoints.wait()
  restored = checkpoints.restore(3, train_state.abstract(other, tx, mesh))
  checkpoints.close()
  for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(state), strict=True):
    assert a.dtype == b.dtype
    np.testing.assert_array_equal(a, b)


STEPS = 30


@functools.cache
def curve(moments, dataset):
  """Returns the losses of a short training on real text."""
  one_axis = {"matryoshka.dims": (128,), "matryoshka.exits": (2,), "matryoshka.ranks": (128,)}
  config = wide(moments, one_axis | {"optimizer.learning_rate": 3e-3, "data.lengths": (32,)})
  mesh = make_mesh(config, jax.devices()[:1])
  options = {"lengths": config.data.lengths, "block_tokens": 1024}
  batches = batches_of(dataset, ["train/bitext.parquet"], **options)
  with on_mesh(mesh):
    step = train_step.make(config, STEPS, mesh)
    state = train_state.create(config, optimizer.make(config.optimizer, STEPS), mesh)
    losses = []
    for i in range(STEPS):
      batch = put_batch(batches[i].arrays(), mesh)
      state, values = step(state, batch, None, kind=kind_of("bitext"))
      losses.append(values["loss"])
  return np.array(jax.device_get(losses))


@pytest.mark.usefixtures("fast_compile")
@pytest.mark.parametrize("moments", MOMENTS[1:])
def test_training_is_as_good_as_with_float32(moments, data):
  found, expected = (curve(m, data / "dataset") for m in (moments, "float32"))
  assert expected[-10:].mean() < 0.7 * expected[:4].mean()  # it learns
  limit = {"bfloat16": 2e-3, "factored": 2e-2}[moments]
  assert np.abs(found / expected - 1).mean() < limit
