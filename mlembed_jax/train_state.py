"""Everything a run must keep to go on exactly: step, parameters, optimiser moments."""

import functools
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from mlembed_jax.config import ModelConfig
from mlembed_jax.models.encoder import Encoder
from mlembed_jax.sharding import shardings


class TrainState(flax.struct.PyTreeNode):
  """A pytree of plain arrays."""

  step: Any  # updates done, int32
  params: Any
  opt_state: Any


def _init(
  model: ModelConfig, tx: optax.GradientTransformation, unbox: Any, key: jax.Array
) -> TrainState:
  tokens, lengths = jnp.zeros((1, 2), jnp.int32), jnp.ones((1,), jnp.int32)
  params = unbox(Encoder(model).init(key, tokens, lengths)["params"])
  return TrainState(step=jnp.zeros((), jnp.int32), params=params, opt_state=tx.init(params))


def abstract(model: ModelConfig, tx: optax.GradientTransformation, mesh: Mesh) -> TrainState:
  """Returns the state as shapes with shardings; nothing is computed."""
  key = jax.eval_shape(lambda: jax.random.key(0))
  # The boxes with axis names pass through tx.init, so moments follow their parameters.
  boxed = jax.eval_shape(functools.partial(_init, model, tx, lambda x: x), key)
  plain = jax.eval_shape(functools.partial(_init, model, tx, nn.unbox), key)
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), plain, shardings(boxed, mesh)
  )


def create(
  model: ModelConfig, tx: optax.GradientTransformation, mesh: Mesh, seed: int
) -> TrainState:
  """Returns a new state, made where it will live: no host ever holds the whole model."""
  out = jax.tree.map(lambda x: x.sharding, abstract(model, tx, mesh))
  init = jax.jit(functools.partial(_init, model, tx, nn.unbox), out_shardings=out)
  return init(jax.random.key(seed))
