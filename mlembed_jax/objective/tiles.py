"""Reductions over all (anchor, candidate) pairs of the global batch in bounded memory.

Pairs are visited tile by tile: memory holds the logits of one tile at a time, in the backward pass
too, where a tile is computed anew. On a mesh each device keeps its own anchors and sees the
candidates of all devices, one gathered chunk at a time. Arrays only; letters as in similarity.py.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from mlembed_jax.objective.similarity import (
  ABSENT,
  Anchors,
  Candidates,
  Texts,
  tile_keep,
  tile_logits,
  tile_pull,
)
from mlembed_jax.parallel import mesh_context

# Anchors and candidates of one tile. On CPU a 512 x 512 tile of one dim is 1 MB and stays in a
# core's cache. Accelerators like longer products and fewer steps: 512 x 4096 x 10 dims are 84 MB.
TILE_ROWS = 512
TILE_COLUMNS = {"cpu": 512}
LARGE_TILE_COLUMNS = 4096
# Logarithm of an empty sum, and what takes a logit out of one. Both are finite, and so far apart
# that exp(MASKED - EMPTY) is zero.
EMPTY = -1e29
MASKED = -1e30


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SoftTargets:
  """A teacher's softmax over candidates, in the form of the texts it comes from."""

  anchors: Texts  # one dim; scale includes 1 / temperature
  candidates: Texts
  log_total: Float[Array, "A"]  # log of the sum of its exponentials, the own positives included


def _tiles(rows: int, target: int) -> tuple[int, int]:
  """Returns the number and the size of equal tiles of at most `target` rows that hold all rows."""
  count = -(-rows // target)
  return count, -(-rows // count)


def _split(tree: Any, target: int) -> Any:
  """Returns the arrays [N, ...] as [tiles, size, ...], the last tile filled up.

  Filling rows are zeros, their integers ABSENT: as candidates they are nobody's negatives, as
  anchors they are cut off again by `_join`.
  """
  rows = jax.tree.leaves(tree)[0].shape[0]
  count, size = _tiles(rows, target)

  def split(x: Array) -> Array:
    padding = [(0, count * size - rows)] + [(0, 0)] * (x.ndim - 1)
    fill = ABSENT if jnp.issubdtype(x.dtype, jnp.integer) else 0
    return jnp.pad(x, padding, constant_values=fill).reshape(count, size, *x.shape[1:])

  return jax.tree.map(split, tree)


def _join(tree: Any, rows: int) -> Any:
  return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:rows], tree)


@dataclasses.dataclass(frozen=True)
class _Devices:
  """The mesh axes that the rows are split over, none on a single device."""

  axes: tuple[str, ...]
  count: int
  platform: str

  def gather(self, tree: Any) -> Any:
    """Returns the arrays [n, ...] of all devices as one."""
    if not self.axes:
      return tree
    return jax.tree.map(lambda x: jax.lax.all_gather(x, self.axes, tiled=True), tree)

  def scatter(self, tree: Any) -> Any:
    """Returns this device's rows of the sum over devices: the transpose of `gather`."""
    if not self.axes:
      return tree
    return jax.tree.map(lambda x: jax.lax.psum_scatter(x, self.axes, tiled=True), tree)

  def chunks(self, candidates: Any) -> Any:
    """Returns this device's part of each tile of candidates."""
    columns = TILE_COLUMNS.get(self.platform, LARGE_TILE_COLUMNS)
    return _split(candidates, max(1, columns // self.count))


def _sweep(update: Callable[..., Any], start: Any, anchors: Any, candidates: Any, on: _Devices):
  """Returns `start` (arrays [A, ...]) after `update(state, anchors, candidates)` of every tile."""
  rows = _split(anchors, TILE_ROWS)

  def chunk(state: Any, c: Any) -> tuple[Any, None]:
    gathered = on.gather(c)
    _, state = jax.lax.scan(lambda _, x: (None, update(*x, gathered)), None, (state, rows))
    return state, None

  state, _ = jax.lax.scan(chunk, _split(start, TILE_ROWS), on.chunks(candidates))
  return _join(state, jax.tree.leaves(start)[0].shape[0])


def _sweep_back(
  weights: Callable[..., Any], state: Any, anchors: Any, candidates: Any, on: _Devices
):
  """Returns the cotangents of both `Texts`; `weights(state, anchors, candidates)` are those of the
  logits of a tile."""
  rows, states = _split(anchors, TILE_ROWS), _split(state, TILE_ROWS)

  def chunk(total: Any, c: Any) -> tuple[Any, Any]:
    gathered = on.gather(c)

    def tile(d_c: Any, x: Any) -> tuple[Any, Any]:
      d_a, d_tile = tile_pull(weights(*x, gathered), x[1][0], gathered[0])
      return jax.tree.map(jnp.add, d_c, d_tile), d_a

    zeros = (
      [jnp.zeros(x.shape[::-1]) for x in gathered[0].blocks],
      jnp.zeros(gathered[0].scale.shape),
    )
    (blocks, scale), d_a = jax.lax.scan(tile, zeros, (states, rows))
    d_c = on.scatter(([x.T for x in blocks], scale))
    return jax.tree.map(jnp.add, total, d_a), d_c

  like = jax.tree.map(lambda x: jnp.zeros(x.shape), (list(rows[0].blocks), rows[0].scale))
  d_a, d_c = jax.lax.scan(chunk, like, on.chunks(candidates))
  return _cotangent(d_a, anchors[0]), _cotangent(d_c, candidates[0])


def _cotangent(d: tuple[list[Array], Array], like: Texts) -> Texts:
  blocks, scale = _join(d, len(like.scale))
  return Texts(tuple(x.astype(y.dtype) for x, y in zip(blocks, like.blocks, strict=True)), scale)


def _devices() -> _Devices:
  """Returns the devices that the rows of the batch are split over, from the mesh of the context."""
  axes = mesh_context.mesh_axes("batch")
  return _Devices(axes, mesh_context.shards("batch"), mesh_context.platform())


def _on_devices(function: Callable[..., Any], *args: Any) -> Any:
  """Returns `function(*args, on)` on the mesh of the context; all arrays are [rows, ...]."""
  on = _devices()
  if not on.axes:
    return function(*args, on)
  rows = PartitionSpec(on.axes)
  # check_vma is off: carries start as constants, which would have to be marked as varying.
  return jax.shard_map(
    lambda *local: function(*local, on), in_specs=rows, out_specs=rows, check_vma=False
  )(*args)


@jax.custom_vjp
def log_sum_exp(
  anchors: Texts,  # [A, ...], scale includes 1 / temperature
  candidates: Texts,  # [N, ...]
  anchor_ids: Anchors,
  candidate_ids: Candidates,
) -> tuple[Float[Array, "A M"], Float[Array, "A"]]:
  """Returns the log of the sum of exp(logit) over each anchor's negatives, and their number.

  Without any negative the first is EMPTY. Differentiable in the texts; exact, with the rounding of
  float32 sums. Where the texts are bfloat16, their gradient is summed in float32 from bfloat16
  factors, as in any product of that type.
  """
  return _on_devices(_log_sum_exp, anchors, candidates, anchor_ids, candidate_ids)


def _masked(values: list[Array], allowed: Array) -> list[Array]:
  # The mask is written to memory once: otherwise XLA compares the ids again for every use of every
  # dim.
  bias = jax.lax.optimization_barrier(jnp.where(allowed, 0.0, MASKED))
  return [x + bias for x in values]


def _summed(top: Array, total: Array, values: Sequence[Array]) -> tuple[Array, Array]:
  """Returns the largest logit of each anchor and dim, and the sum of exp(logit - it), so far."""
  new_top = jnp.maximum(top, jnp.stack([jnp.max(x, axis=1) for x in values], axis=-1))
  parts = [jnp.sum(jnp.exp(x - new_top[:, m, None]), axis=1) for m, x in enumerate(values)]
  return new_top, total * jnp.exp(top - new_top) + jnp.stack(parts, axis=-1)


def _log_of(top: Array, total: Array) -> Array:
  """Returns the log of the sums that `_summed` has gathered; EMPTY where there was nothing."""
  return jnp.maximum(top + jnp.log(total), EMPTY)


def _log_sum_exp(
  anchors: Texts, candidates: Texts, ids_a: Anchors, ids_c: Candidates, on: _Devices
) -> tuple[Array, Array]:
  A, M = anchors.scale.shape
  start = (jnp.full((A, M), EMPTY), jnp.zeros((A, M)), jnp.zeros(A))

  def update(state: Any, a: Any, c: Any) -> Any:
    top, total, count = state
    allowed = tile_keep(a[1], c[1])
    top, total = _summed(top, total, _masked(tile_logits(a[0], c[0]), allowed))
    return top, total, count + jnp.sum(allowed, axis=1, dtype=jnp.float32)

  top, total, count = _sweep(update, start, (anchors, ids_a), (candidates, ids_c), on)
  return _log_of(top, total), count


def _log_sum_exp_fwd(*args: Any) -> Any:
  out = log_sum_exp(*args)
  return out, (args, out[0])


def _log_sum_exp_bwd(saved: Any, cotangents: Any) -> Any:
  (anchors, candidates, *ids), value = saved

  def weights(state: Any, a: Any, c: Any) -> list[Array]:
    value, d_value = state
    values = _masked(tile_logits(a[0], c[0]), tile_keep(a[1], c[1]))
    return [jnp.exp(x - value[:, m, None]) * d_value[:, m, None] for m, x in enumerate(values)]

  state, both = (value, cotangents[0]), ((anchors, ids[0]), (candidates, ids[1]))
  return *_on_devices(functools.partial(_sweep_back, weights), state, *both), None, None


log_sum_exp.defvjp(_log_sum_exp_fwd, _log_sum_exp_bwd)


@jax.custom_vjp
def expected_logits(
  anchors: Texts,  # [A, ...], scale includes 1 / temperature
  candidates: Texts,  # [N, ...]
  anchor_ids: Anchors,
  candidate_ids: Candidates,
  teacher: SoftTargets,
) -> Float[Array, "A M"]:
  """Returns the sum over each anchor's negatives of teacher probability x logit.

  Differentiable in the texts, not in the teacher.
  """
  fixed = _with_teacher(anchor_ids, candidate_ids, teacher)
  return _on_devices(_expected_logits, (anchors, fixed[0]), (candidates, fixed[1]))


def _with_teacher(anchor_ids: Anchors, candidate_ids: Candidates, t: SoftTargets) -> Any:
  return (anchor_ids, t.anchors, t.log_total), (candidate_ids, t.candidates)


def _targets(a: Any, c: Any) -> Float[Array, "a n"]:
  """Returns the teacher's probabilities of one tile; zero where the candidate is no negative."""
  (ids, texts_a, log_total), (candidate_ids, texts_c) = a, c
  chance = jnp.exp(tile_logits(texts_a, texts_c)[0] - log_total[:, None])
  return jnp.where(tile_keep(ids, candidate_ids), chance, 0.0)


def _expected_logits(anchors: Any, candidates: Any, on: _Devices) -> Array:
  def update(state: Array, a: Any, c: Any) -> Array:
    targets = _targets(a[1], c[1])
    parts = [jnp.sum(targets * x, axis=1) for x in tile_logits(a[0], c[0])]
    return state + jnp.stack(parts, axis=-1)

  return _sweep(update, jnp.zeros(anchors[0].scale.shape), anchors, candidates, on)


def _expected_logits_fwd(*args: Any) -> Any:
  return expected_logits(*args), args


def _expected_logits_bwd(args: Any, d_value: Array) -> Any:
  anchors, candidates, *rest = args
  fixed = _with_teacher(*rest)

  def weights(d: Array, a: Any, c: Any) -> list[Array]:
    targets = _targets(a[1], c[1])
    return [targets * d[:, m, None] for m in range(d.shape[1])]

  both = ((anchors, fixed[0]), (candidates, fixed[1]))
  return *_on_devices(functools.partial(_sweep_back, weights), d_value, *both), None, None, None


expected_logits.defvjp(_expected_logits_fwd, _expected_logits_bwd)


@jax.custom_vjp
def divergence(
  anchors: Texts,  # [A, ...], scale includes 1 / temperature
  candidates: Texts,  # [N, ...]
  anchor_ids: Anchors,
  candidate_ids: Candidates,
  teacher: tuple[Texts, Texts],
) -> Float[Array, "A M"]:
  """Returns KL(teacher || each dim) of an anchor's choice among its negatives; 0 without any.

  `teacher` has the same anchors and candidates, of one dim and any width. All sums come from one
  visit of the pairs, as those of attention do: both models' log-sums, and the teacher's mean of
  both logits. Differentiable in the student's texts, not in the teacher's.
  """
  return _divergences(anchors, candidates, anchor_ids, candidate_ids, teacher)[0]


def _divergences(
  anchors: Texts, candidates: Texts, ids_a: Anchors, ids_c: Candidates, t: tuple[Texts, Texts]
) -> tuple[Array, Array, Array]:
  """Returns the divergences [A, M], and the log-sums of student [A, M] and teacher [A, 1]."""
  return _on_devices(_divergence, (anchors, ids_a, t[0]), (candidates, ids_c, t[1]))


def _divergence(anchors: Any, candidates: Any, on: _Devices) -> tuple[Array, Array, Array]:
  A, M = anchors[0].scale.shape
  empty = lambda m: (jnp.full((A, m), EMPTY), jnp.zeros((A, m)))  # noqa: E731
  start = (*empty(M), *empty(1), jnp.zeros((A, M + 1)))

  def update(state: Any, a: Any, c: Any) -> Any:
    top, total, goal_top, goal_total, means = state
    values, goal = _both_logits(a, c)
    new_top, goal_total = _summed(goal_top, goal_total, [goal])
    chance = jnp.exp(goal - new_top)  # of a candidate that is no negative: 0
    parts = [jnp.sum(chance * x, axis=1) for x in (*values, goal)]
    means = means * jnp.exp(goal_top - new_top) + jnp.stack(parts, axis=-1)
    return *_summed(top, total, values), new_top, goal_total, means

  top, total, goal_top, goal_total, means = _sweep(update, start, anchors, candidates, on)
  own, goal = _log_of(top, total), _log_of(goal_top, goal_total)
  means = means / jnp.maximum(goal_total, jnp.finfo(jnp.float32).tiny)
  return (own - means[:, :M]) - (goal - means[:, M:]), own, goal


def _both_logits(a: Any, c: Any) -> tuple[list[Array], Array]:
  """Returns the logits of a tile for each dim, and the teacher's."""
  allowed = tile_keep(a[1], c[1])
  (goal,) = _masked(tile_logits(a[2], c[2]), allowed)
  return _masked(tile_logits(a[0], c[0]), allowed), goal


def _divergence_fwd(*args: Any) -> Any:
  value, *sums = _divergences(*args)
  return value, (args, sums)


def _divergence_bwd(saved: Any, d_value: Array) -> Any:
  (anchors, candidates, ids_a, ids_c, teacher), sums = saved

  def weights(state: Any, a: Any, c: Any) -> list[Array]:
    own, goal_sum, d = state
    values, goal = _both_logits(a, c)
    chance = jnp.exp(goal - goal_sum)
    return [(jnp.exp(x - own[:, m, None]) - chance) * d[:, m, None] for m, x in enumerate(values)]

  both = (anchors, ids_a, teacher[0]), (candidates, ids_c, teacher[1])
  found = _on_devices(functools.partial(_sweep_back, weights), (*sums, d_value), *both)
  return *found, None, None, None


divergence.defvjp(_divergence_fwd, _divergence_bwd)
