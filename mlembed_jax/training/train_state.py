"""Everything a run must keep to go on exactly: step, parameters, optimiser moments."""

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


class TrainState(flax.struct.PyTreeNode):
  """All arrays that an update reads and replaces."""

  step: Any  # updates done, int32
  params: Any
  log_temperature: Any  # {task type: scalar}; empty unless temperatures are learned
  opt_state: Any


def trained(params: Any, log_temperature: Any) -> dict[str, Any]:
  """Returns the tree that the optimiser updates."""
  return {"params": params, "log_temperature": log_temperature}


def _init(config: Config, tx: optax.GradientTransformation, unbox: Any, key: Any) -> TrainState:
  params = unbox(encoder.init(config.model, key))
  logs = initial_log_temperature(config)
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    log_temperature=logs,
    opt_state=tx.init(trained(params, logs)),
  )


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
