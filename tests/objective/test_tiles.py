"""Sums over all pairs tile by tile: the float64 sum, on any mesh, without the pairs in memory."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import PartitionSpec

from mlembed_jax.batch import Arrays
from mlembed_jax.config import from_mapping
from mlembed_jax.matryoshka import Matryoshka, dim_weights
from mlembed_jax.objective import losses, similarity, tiles
from mlembed_jax.objective.similarity import Anchors, Candidates
from mlembed_jax.objective.tiles import SoftTargets
from mlembed_jax.parallel.sharding import RULES, logical_rules, make_mesh
from tests.material import FAST_COMPILE, config_dict, kind_of

DIMS = (8, 16, 48)
# A logit of L is rounded three times by 0.6e-7 * L, and its exponential is wrong by as much.
EXP = 2e-7


def unit(x):
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


def problem(rows, columns, temperature=0.05, seed=0):
  """Returns the arguments of log_sum_exp and the soft targets; anchor 0 has no negative.

  Of 9 texts most are repeated. Some candidates are copies of anchors or their opposites, so the
  logits span all of +-1 / temperature.
  """
  rng = np.random.default_rng(seed)

  def vectors(*shape):
    return rng.normal(size=shape).astype(np.float32)

  def ids(*shape):
    return jnp.asarray(rng.integers(0, 9, shape), jnp.int32)

  a, c = vectors(rows, 48), vectors(columns, 48)
  c[: rows // 2], c[rows // 2 : rows] = a[rows // 2 : rows // 2 * 2], -a[rows // 2 :]
  limit = jnp.asarray(rng.uniform(-0.1, 0.3, rows), jnp.float32).at[0].set(-2.0)
  keys = (
    Anchors(jnp.arange(rows), ids(rows), ids(rows, 1), jnp.asarray(unit(vectors(rows, 16))), limit),
    Candidates(
      jnp.asarray(rng.integers(0, rows, columns), jnp.int32),
      ids(columns),
      ids(columns, 1),
      jnp.asarray(unit(vectors(columns, 16))),
    ),
  )
  anchors = similarity.divide(similarity.texts(jnp.asarray(a), DIMS), temperature)
  candidates = similarity.texts(jnp.asarray(c), DIMS)
  teacher = SoftTargets(
    similarity.divide(similarity.texts(jnp.asarray(vectors(rows, 48)), (48,)), 0.05),
    similarity.texts(jnp.asarray(vectors(columns, 48)), (48,)),
    jnp.asarray(rng.uniform(3, 5, rows), jnp.float32),
  )
  weight = jnp.asarray(vectors(rows, 3))  # of the outputs in the sum that is differentiated
  return (anchors, candidates, *keys), teacher, weight


def value_and_grad(args, teacher, weight):
  """Returns ((log-sums, counts, expected logits, divergences), gradients of their weighted sum)."""
  anchors, candidates, *keys = args

  def total(anchors, candidates):
    value, count = tiles.log_sum_exp(anchors, candidates, *keys)
    expected = tiles.expected_logits(anchors, candidates, *keys, teacher)
    both = teacher.anchors, teacher.candidates
    apart = tiles.divergence(anchors, candidates, *keys, both)
    # An empty sum is -1e29: it enters as such in losses, which then are constant. Here as 0.
    sums = jnp.where(value > tiles.EMPTY, value, value - jax.lax.stop_gradient(value))
    return jnp.sum(weight * (sums + 0.1 * expected + apart)), (value, count, expected, apart)

  (_, out), grads = jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(anchors, candidates)
  return out, grads


def plain(args, teacher, weight):
  """Returns the same with all pairs written down, in float64."""
  a, c = (leaves(texts) for texts in args[:2])
  keep = plain_keep(*(jax.tree.map(np.asarray, keys) for keys in args[2:]))
  logits = all_logits(a, c)
  value = torch.logsumexp(logits.masked_fill(~keep[..., None], -torch.inf), dim=1)
  goal = all_logits(leaves(teacher.anchors), leaves(teacher.candidates))[..., 0].detach()
  choice = torch.log_softmax(goal.masked_fill(~keep, -torch.inf), dim=1)[..., None]
  own = torch.log_softmax(logits.masked_fill(~keep[..., None], -torch.inf), dim=1)
  apart = torch.where(keep[..., None], choice.exp() * (choice - own), 0.0).sum(dim=1)
  chance = torch.exp(goal - torch.tensor(np.asarray(teacher.log_total, np.float64))[:, None])
  expected = torch.sum((chance * keep)[..., None].detach() * logits, dim=1)
  filled = keep.any(1)
  weight = torch.tensor(np.asarray(weight, np.float64))
  total = torch.sum(weight * 0.1 * expected) + torch.sum((weight * (value + apart))[filled])
  total.backward()
  grads = [[x.grad.numpy() for x in (*t["blocks"], t["scale"])] for t in (a, c)]
  apart = torch.where(filled[:, None], apart, 0.0)
  out = value, keep.sum(1), expected, apart
  return tuple(x.detach().numpy() for x in out), grads


def leaves(texts):
  tensor = functools.partial(torch.tensor, dtype=torch.float64, requires_grad=True)
  blocks = [tensor(np.asarray(x, np.float64)) for x in texts.blocks]
  return {"blocks": blocks, "scale": tensor(np.asarray(texts.scale, np.float64))}


def all_logits(a, c):
  """Returns the logits [..., A, N, M]."""
  products, out = 0.0, []
  for m, (x, y) in enumerate(zip(a["blocks"], c["blocks"], strict=True)):
    products = products + x @ y.mT
    out.append(products * a["scale"][..., :, None, m] * c["scale"][..., None, :, m])
  return torch.stack(out, dim=-1)


def plain_keep(a, c):
  def is_negative(i, n):
    return (
      a.row[i] != c.row[n]
      and c.text[n] not in (a.text[i], *a.targets[i])
      and a.text[i] not in c.anchors[n]
      and a.judge[i] @ c.judge[n] <= a.limit[i]
    )

  return torch.tensor([[is_negative(i, n) for n in range(len(c.row))] for i in range(len(a.row))])


def compiled(function, *args):
  return jax.device_get(jax.jit(function, compiler_options=FAST_COMPILE)(*args))


def assert_close(found, expected, tolerance):
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max())


@pytest.fixture
def small_tiles(monkeypatch):
  """Asks for tiles of 4 x 4; returns the sizes of those whose logits were computed."""
  sizes = set()

  def recorded(function):
    def call(*args):
      a, c = args[-2:]
      sizes.add((len(a.scale), len(c.scale)))
      return function(*args)

    return call

  monkeypatch.setattr(tiles, "TILE_ROWS", 4)
  monkeypatch.setattr(tiles, "TILE_COLUMNS", {"cpu": 4})
  for name in ("tile_logits", "tile_pull"):
    monkeypatch.setattr(tiles, name, recorded(getattr(similarity, name)))
  return sizes


# 13 rows, a prime number, are four tiles with three rows to fill them up.
@pytest.mark.parametrize(
  ("rows", "columns", "tile", "temperature"),
  [(12, 24, (4, 4), 0.05), (13, 26, (4, 4), 0.01), (5, 15, (3, 4), 0.01)],
)
def test_tiles_add_up_to_the_sum_over_all_pairs(small_tiles, rows, columns, tile, temperature):
  args, teacher, weight = problem(rows, columns, temperature)
  (value, count, expected, apart), grads = compiled(value_and_grad, args, teacher, weight)
  assert small_tiles == {tile}
  out, plain_grads = plain(args, teacher, weight)
  plain_value, plain_count, plain_expected, plain_apart = out
  # Anchor 0 has no negative: a finite stand-in for -inf, and no gradient at all.
  assert np.all(value[0] == np.float32(tiles.EMPTY))
  assert not np.any(np.isfinite(plain_value[0]))
  assert not any(np.any(x[0]) for x in jax.tree.leaves(grads[0]))
  logits = all_logits(*(leaves(x) for x in args[:2])).detach().numpy()
  assert np.abs(logits).max() > 0.99 / temperature
  assert_close(value[1:], plain_value[1:], 1e-6)
  np.testing.assert_array_equal(count, plain_count)
  assert_close(expected, plain_expected, EXP / temperature)
  assert_close(apart, plain_apart, EXP / temperature)
  assert not np.any(apart[0])
  assert_close([[*g.blocks, g.scale] for g in grads], plain_grads, EXP / temperature)


def test_tiles_are_equal_and_never_above_their_target():
  sizes = {(4096, 512): (8, 512), (8191, 512): (16, 512), (48, 20): (3, 16), (3, 512): (1, 3)}
  assert {key: tiles._tiles(*key) for key in sizes} == sizes


MESHES = {"data 8": (8, 1, 1), "fsdp 8": (1, 8, 1), "fsdp 4 x tensor 2": (1, 4, 2)}


@functools.cache
def one_device():
  return compiled(value_and_grad, *problem(16, 32))


@pytest.mark.parametrize("sizes", MESHES.values(), ids=MESHES)
def test_eight_devices_equal_one(sizes, monkeypatch):
  expected = one_device()
  # 16 columns over all devices: two chunks of candidates each.
  monkeypatch.setattr(tiles, "TILE_ROWS", 2)
  monkeypatch.setattr(tiles, "TILE_COLUMNS", {"cpu": 16})
  names = ("mesh.data", "mesh.fsdp", "mesh.tensor")
  mesh = make_mesh(from_mapping(config_dict(**dict(zip(names, sizes, strict=True)))))
  rows = jax.NamedSharding(mesh, PartitionSpec(RULES["batch"]))
  with jax.set_mesh(mesh), nn.logical_axis_rules(logical_rules()):
    found = compiled(value_and_grad, *jax.device_put(problem(16, 32), rows))
  (value, count, *sums), grads = found
  assert_close(value[1:], expected[0][0][1:], 1e-6)
  np.testing.assert_array_equal(count, expected[0][1])
  assert_close((sums, grads), (expected[0][2:], expected[1]), EXP / 0.05)


def temporary_bytes(rows):
  """Returns the memory of value and gradient beside inputs and outputs, compiled, not run."""
  settings = {"retrieval.symmetric": True, "self_distillation": 1.0, "spread_out": 1.0}
  config = from_mapping(config_dict(**{f"losses.{k}": v for k, v in settings.items()}))
  axes = Matryoshka((8, 64), dim_weights((8, 64)), (1, 2), (), ())

  def loss(states, hashes):
    return losses.objective(
      states,
      Arrays(hashes),
      losses.LossSettings(kind_of("retrieval"), axes, config.losses, config.kd),
      losses.Learnt(0.05),
      teachers=losses.Teachers(),
    ).loss

  shape = jax.ShapeDtypeStruct
  args = shape((2, rows, 3, 64), jnp.float32), shape((rows, 3, 2), jnp.uint32)
  program = jax.jit(jax.value_and_grad(loss), compiler_options=FAST_COMPILE).lower(*args).compile()
  return program.memory_analysis().temp_size_in_bytes


def test_the_logits_of_all_pairs_are_never_in_memory():
  small, large = temporary_bytes(4096), temporary_bytes(8191)  # a prime number
  assert large < 2.2 * small
  # Not even one bit per pair in a byte of its own.
  assert large < 8191**2
