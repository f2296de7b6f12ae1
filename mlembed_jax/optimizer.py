"""AdamW and its learning-rate schedule, as in the published training code."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from mlembed_jax.config_fields import OptimizerConfig

Schedule = Callable[[Any], Any]


def schedule(config: OptimizerConfig, steps: int) -> Schedule:
  """Returns update number -> learning rate: linear warm-up, then cosine to zero or constant.

  The first update has rate 0; from then on `min_learning_rate` bounds the rate from below.
  """
  c = config
  decay = (
    optax.cosine_decay_schedule(c.learning_rate, max(1, steps - c.warmup_steps))
    if c.schedule == "cosine"
    else optax.constant_schedule(c.learning_rate)
  )
  warmup = optax.linear_schedule(0.0, c.learning_rate, c.warmup_steps)
  joined = optax.join_schedules([warmup, decay], [c.warmup_steps])

  def rate(update: Any) -> Any:
    return jnp.where(update > 0, jnp.maximum(c.min_learning_rate, joined(update)), 0.0)

  return rate


def make(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
  """Returns clipping by global norm, then AdamW with decay on every parameter of the encoder."""
  c = config
  return optax.chain(
    optax.clip_by_global_norm(c.clip_norm),
    optax.adamw(
      schedule(c, steps),
      b1=c.beta1,
      b2=c.beta2,
      eps=c.eps,
      weight_decay=c.weight_decay,
      mask=_decays,
    ),
  )


def _decays(tree: Any) -> Any:
  """Returns whether each leaf decays; decay would pull a learned temperature towards 1."""
  return jax.tree_util.tree_map_with_path(
    lambda path, _: "log_temperature" not in jax.tree_util.keystr(path), tree
  )
