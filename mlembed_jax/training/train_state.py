"""Everything a run must keep to go on exactly: step, parameters, optimiser moments."""

import dataclasses
import functools
import math
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from mlembed_jax.config_fields import Config
from mlembed_jax.models import encoder
from mlembed_jax.parallel.sharding import shardings
from mlembed_jax.training import frozen

PROJECTION_STREAM = 0x50524F4A  # separates its draw from those of the encoder


class Head(flax.struct.PyTreeNode):
  """What is learnt beside the encoder, and no part of exports."""

  log_temperature: Any  # {task type: scalar}; empty unless temperatures are learned
  projection: Any = None  # [D, width of the teacher], see kd.projection; None: there is none


class TrainState(flax.struct.PyTreeNode):
  """All arrays that an update reads and replaces."""

  step: Any  # updates done, int32
  params: Any  # those that are trained
  log_temperature: Any  # as in Head
  opt_state: Any
  projection: Any = None  # as in Head

  @property
  def head(self) -> Head:
    """What is learnt beside the encoder."""
    return Head(self.log_temperature, self.projection)


def as_tree(state: TrainState) -> dict[str, Any]:
  """Returns a state as checkpoints keep it: by field, without a projection where there is none."""
  fields = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
  return {
    name: value for name, value in fields.items() if name != "projection" or value is not None
  }


def trained(params: Any, head: Head) -> dict[str, Any]:
  """Returns the tree that the optimiser updates."""
  tree = {"params": params, "log_temperature": head.log_temperature}
  return tree if head.projection is None else tree | {"projection": head.projection}


def _init(config: Config, tx: optax.GradientTransformation, unbox: Any, key: Any) -> TrainState:
  params = unbox(frozen.split(config, encoder.init(config.model, key))[0])
  projection = _initial_projection(config, key)
  head = Head(initial_log_temperature(config), None if projection is None else unbox(projection))
  tree = trained(params, head)
  return TrainState(step=jnp.zeros((), jnp.int32), opt_state=tx.init(tree), **tree)


def _initial_projection(config: Config, key: Any) -> nn.LogicallyPartitioned | None:
  """Returns a random map from the width to that of the teacher, None where none is learnt."""
  if not config.kd.projection:
    return None
  shape = config.model.width, config.kd.projection
  key = jax.random.fold_in(key, PROJECTION_STREAM)
  value = jax.nn.initializers.lecun_normal()(key, shape, jnp.float32)
  return nn.LogicallyPartitioned(value, ("embed", None))


def initial_log_temperature(config: Config) -> dict[str, jax.Array]:
  """Returns the logarithm of each task type's temperature where they are learned."""
  if not config.losses.learn_temperature:
    return {}
  task_types = (*config.losses.contrastive_tasks(), "scored_pairs")
  # The dtype is named: weakly typed scalars would change type with the first update, and recompile.
  return {
    name: jnp.asarray(math.log(getattr(config.losses, name).temperature), jnp.float32)
    for name in task_types
  }


def abstract(config: Config, tx: optax.GradientTransformation, mesh: Mesh) -> TrainState:
  """Returns the state as shapes with shardings; nothing is computed."""
  key = jax.eval_shape(lambda: jax.random.key(0))
  # The boxes with axis names pass through tx.init, so moments follow their parameters.
  boxed = jax.eval_shape(functools.partial(_init, config, tx, lambda x: x), key)
  boxed = boxed.replace(opt_state=_averaged_axes_whole(boxed.opt_state))
  plain = jax.eval_shape(functools.partial(_init, config, tx, nn.unbox), key)
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), plain, shardings(boxed, mesh)
  )


def _averaged_axes_whole(boxed: Any) -> Any:
  """Returns the boxes of moments without the names of axes that are averaged over: of size 1."""

  def one(leaf: Any) -> Any:
    if not isinstance(leaf, nn.LogicallyPartitioned):
      return leaf
    sizes = zip(leaf.names, leaf.value.shape, strict=True)
    return leaf.replace(names=tuple(None if size == 1 else name for name, size in sizes))

  return jax.tree.map(one, boxed, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))


def is_finite(tree: Any) -> jax.Array:
  """Returns whether every number of a tree is finite, bool []."""
  floats = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)]
  return jnp.stack([jnp.all(jnp.isfinite(x)) for x in floats]).all()


def updated_where(finite: Any, updated: TrainState, before: TrainState) -> TrainState:
  """Returns `updated`, or `before` with all counts of steps raised: the schedule goes on."""

  def one(new: Any, old: Any) -> Any:
    return jnp.where(finite, new, old) if jnp.issubdtype(new.dtype, jnp.floating) else new

  return jax.tree.map(one, updated, before)


@functools.partial(jax.jit, donate_argnums=0)
def passed_over(state: TrainState) -> TrainState:
  """Returns the state after a step whose batch is passed over: all counts of steps are raised."""
  return jax.tree.map(lambda x: x if jnp.issubdtype(x.dtype, jnp.floating) else x + 1, state)


def create(config: Config, tx: optax.GradientTransformation, mesh: Mesh) -> TrainState:
  """Returns a new state, made where it will live: no process ever holds the whole model."""
  out = jax.tree.map(lambda x: x.sharding, abstract(config, tx, mesh))
  init = jax.jit(functools.partial(_init, config, tx, nn.unbox), out_shardings=out)
  return init(jax.random.key(config.train.seed))
