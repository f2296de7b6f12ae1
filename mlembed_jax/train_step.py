"""One update: encode every text of the batch at every exit, the 3-D objective, AdamW."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from mlembed_jax import losses, optimizer, train_state
from mlembed_jax.config import Config
from mlembed_jax.matryoshka import Matryoshka, plan
from mlembed_jax.models.encoder import Encoder
from mlembed_jax.train_state import TrainState

Metrics = dict[str, jax.Array]

RANK_STREAM = 0x52414E4B  # separates the draw of ranks from every other use of the seed


def draw_rank(axes: Matryoshka, seed: int, step: Any) -> jax.Array:
  """Returns the embedding rank of one step, a pure function of (seed, step) on every device."""
  key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), RANK_STREAM), step)
  chance = jnp.log(jnp.array(axes.rank_probabilities))
  return jnp.array(axes.ranks)[jax.random.categorical(key, chance)]


def rank_mask(rank: jax.Array, full: int) -> jax.Array:
  """Returns 1 for the leading `rank` columns of the token table, 0 for the rest, [full]."""
  return (jnp.arange(full) < rank).astype(jnp.float32)


def objective(
  config: Config,
  axes: Matryoshka,
  params: Any,
  batch: dict[str, jax.Array],
  rank: jax.Array | None,
  inbatch: bool,
) -> losses.Objective:
  """Returns the objective of one batch (tokens [B, C, T], lengths [B, C], hashes [B, C, 2])."""
  B, C, T = batch["tokens"].shape
  mask = None if rank is None else rank_mask(rank, config.model.rank)
  states_LND: Any = Encoder(config.model).apply(
    {"params": params}, batch["tokens"].reshape(B * C, T), batch["lengths"].reshape(B * C), mask
  )
  states_END = states_LND[jnp.array(axes.exits) - 1]
  return losses.objective(
    states_END.reshape(len(axes.exits), B, C, -1),
    batch["hashes"],
    dims=axes.dims,
    dim_weights=axes.dim_weights,
    temperature=config.losses.temperature,
    inbatch=inbatch,
    inbatch_passage_grad=config.losses.inbatch_passage_grad,
    mask_duplicates=config.losses.mask_duplicates,
  )


def make(config: Config, steps: int, mesh: Mesh) -> Callable[..., tuple[TrainState, Metrics]]:
  """Returns `step(state, batch, inbatch=...)`, jitted; the old state's memory is reused."""
  axes = plan(config.model, config.matryoshka)
  tx = optimizer.make(config.optimizer, steps)
  rate = optimizer.schedule(config.optimizer, steps)
  layout = jax.tree.map(lambda x: x.sharding, train_state.abstract(config.model, tx, mesh))

  @functools.partial(
    jax.jit, donate_argnames="state", static_argnames="inbatch", out_shardings=(layout, None)
  )
  def step(
    state: TrainState, batch: dict[str, jax.Array], inbatch: bool
  ) -> tuple[TrainState, Metrics]:
    rank = draw_rank(axes, config.train.seed, state.step) if axes.ranks else None

    def loss(params: Any) -> tuple[jax.Array, losses.Objective]:
      result = objective(config, axes, params, batch, rank, inbatch)
      return result.loss, result

    (_, result), grads = jax.value_and_grad(loss, has_aux=True)(state.params)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    metrics = {
      "loss": result.loss,
      "hard_loss": jnp.mean(result.hard_E),
      "inbatch_loss": jnp.mean(result.inbatch_E),
      "gradient_norm": optax.tree.norm(grads),
      "learning_rate": rate(state.step),
      "rank": jnp.zeros((), jnp.int32) if rank is None else rank,
    }
    return TrainState(state.step + 1, params, opt_state), metrics

  return step
