"""One update: encode every text of the batch at every exit, the 3-D objective, AdamW."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from mlembed_jax.batch import Arrays, Kind, Sheets
from mlembed_jax.config_fields import LOWEST_TEMPERATURE, Config, ModelConfig
from mlembed_jax.devices import compiler
from mlembed_jax.matryoshka import Matryoshka, axes_of
from mlembed_jax.models.encoder import Encoder
from mlembed_jax.objective import losses
from mlembed_jax.objective.losses import Teachers
from mlembed_jax.training import frozen, gradcache, optimizer, train_state
from mlembed_jax.training.train_state import Head, TrainState

Metrics = dict[str, jax.Array]

RANK_STREAM = 0x52414E4B  # separates the draw of ranks from every other use of the seed


@dataclasses.dataclass(frozen=True)
class TeacherShape:
  """The shape and exits of an online teacher; programs are compiled for them."""

  model: ModelConfig
  exits: tuple[int, ...]  # one per exit of the student, or one for all


def draw_rank(axes: Matryoshka, seed: int, step: Any) -> jax.Array:
  """Returns the embedding rank of one step, a pure function of (seed, step) on every device."""
  key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), RANK_STREAM), step)
  chance = jnp.log(jnp.array(axes.rank_probabilities))
  return jnp.array(axes.ranks)[jax.random.categorical(key, chance)]


def rank_mask(rank: jax.Array, full: int) -> jax.Array:
  """Returns 1 for the leading `rank` columns of the token table, 0 for the rest, [full]."""
  return (jnp.arange(full) < rank).astype(jnp.float32)


def at_least_lowest(log_temperature: dict[str, Any]) -> dict[str, Any]:
  """Returns learned temperatures clipped after an update, as in CLIP: from there they can rise."""
  return jax.tree.map(lambda x: jnp.maximum(x, math.log(LOWEST_TEMPERATURE)), log_temperature)


def encode_block(
  model: ModelConfig, exits: tuple[int, ...], params: Any, sheets: Sheets, mask: Any = None
) -> Float[Array, "E S K D"]:
  """Returns the states of a block's texts (tokens [S, T], ends [S, K]) at the exits."""
  encoder = Encoder(model, exits)
  states: Any = encoder.apply({"params": params}, sheets.tokens, sheets.ends, mask)
  return states


@dataclasses.dataclass(frozen=True)
class BatchLoss:
  """The loss of batches of one kind, with its gradient."""

  config: Config
  kind: Kind
  teacher: TeacherShape | None = None

  def value_and_grad(
    self,
    params: Any,
    head: Head,
    batch: Arrays,
    rank: Any,
    progress: Any,
    teacher_params: Any = None,
    frozen_params: Any = None,
  ) -> tuple[losses.Objective, tuple[Any, Head]]:
    """Returns the objective of a batch and its gradients to `params` and `head`.

    Args:
      params: of the encoder, those that are trained.
      head: what is learnt beside it.
      batch: global arrays.
      rank: of the token table in this step; None: a full table.
      progress: share of the run that is done, 0 to 1.
      teacher_params: of the online teacher.
      frozen_params: parameters of the encoder that are frozen; None: none.
    """
    axes = axes_of(self.config.model, self.config.matryoshka)
    mask = None if rank is None else rank_mask(rank, self.config.model.rank)

    def loss(states: Array, teachers: Teachers, head: Head) -> tuple[Array, losses.Objective]:
      if batch.teacher is not None:
        teachers = dataclasses.replace(teachers, exits=batch.teacher[None])
      settings = losses.LossSettings(self.kind, axes, self.config.losses, self.config.kd)
      learnt = losses.Learnt(self.temperature(head.log_temperature, progress), head.projection)
      result = losses.objective(states, batch, settings, learnt, teachers)
      return result.loss, result

    (_, result), grads = gradcache.value_and_grad(
      lambda p, block: encode_block(
        self.config.model, axes.exits, frozen.whole(p, frozen_params), block, mask
      ),
      lambda block: self.teachers(axes, frozen.whole(params, frozen_params), teacher_params, block),
      loss,
      params,
      head,
      batch,
      self.config.data.kept_tokens,
    )
    return result, grads

  def temperature(self, log_temperature: dict[str, Any], progress: Any) -> Any:
    """Returns the temperature after a share of the run (0 to 1)."""
    task_type = self.kind.task_type
    if self.kind.is_text:
      return self.config.kd.temperature
    if self.config.losses.learn_temperature:
      return jnp.exp(log_temperature[task_type])
    settings = getattr(self.config.losses, task_type)
    return settings.temperature + progress * (settings.final_temperature - settings.temperature)

  def teachers(self, axes: Matryoshka, params: Any, teacher_params: Any, block: Sheets) -> Teachers:
    """Returns the states of a block that its texts learn from; they have no gradient."""
    model, settings = self.config.model, self.config.losses
    exits = full = None
    if self.teacher:
      states = encode_block(self.teacher.model, self.teacher.exits, teacher_params, block)
      judges = settings.false_negative_score == "teacher"
      wide = judges or self.config.kd.similarity or self.config.kd.projection
      exits = states if wide else states[..., : model.width]
    distils = settings.self_distillation and settings.task(self.kind.task_type)
    # Where every step has full rank, the states of the batch are the full model's already.
    if distils and len(axes.ranks) > 1:
      full = encode_block(model, axes.exits[-1:], params, block)
    return jax.lax.stop_gradient(Teachers(exits, full))


def kept_bytes(config: Config, params: Any, frozen_params: Any, sheets: Any) -> int:
  """Returns the bytes of activations, over all devices, that wait for the backward pass.

  `params` and `frozen_params` are the trained and the frozen parameters as shapes.
  """
  axes = axes_of(config.model, config.matryoshka)
  mask = jax.ShapeDtypeStruct((config.model.rank,), jnp.float32) if config.model.rank else None
  found = []

  def count(frozen_params: Any) -> None:  # traced, as shapes cannot be closed over
    run = lambda p, block: encode_block(  # noqa: E731
      config.model, axes.exits, frozen.whole(p[0], frozen_params), block, p[1]
    )
    found.append(gradcache.kept_bytes(run, (params, mask), sheets, config.data.kept_tokens))

  jax.eval_shape(count, frozen_params)
  return found[0]


def make(
  config: Config, steps: int, mesh: Mesh, teacher: TeacherShape | None = None
) -> Callable[..., tuple[TrainState, Metrics]]:
  """Returns `step(state, batch, teacher_params, frozen_params, kind=...)`, jitted.

  The old state is given up. `frozen_params` is None where all parameters are trained.

  A step whose loss or gradient is not finite changes no parameter and no moment. That is decided
  before the update, which so needs no memory for a second state; `state_finite` says whether the
  update itself has overflowed.
  """
  axes = axes_of(config.model, config.matryoshka)
  tx = optimizer.make(config.optimizer, steps)
  rate = optimizer.schedule(config.optimizer, steps)
  layout = jax.tree.map(lambda x: x.sharding, train_state.abstract(config, tx, mesh))
  whole = NamedSharding(mesh, PartitionSpec())  # every process reads the metrics

  @functools.partial(
    jax.jit,
    donate_argnames="state",
    static_argnames="kind",
    out_shardings=(layout, whole),
    compiler_options=compiler.options(mesh.devices.flat[0]),
  )
  def step(
    state: TrainState, batch: Arrays, teacher_params: Any, frozen_params: Any = None, *, kind: Kind
  ) -> tuple[TrainState, Metrics]:
    rank = draw_rank(axes, config.train.seed, state.step) if axes.ranks else None
    progress = state.step / steps
    loss = BatchLoss(config, kind, teacher)
    result, grads = loss.value_and_grad(
      state.params, state.head, batch, rank, progress, teacher_params, frozen_params
    )
    trained = train_state.trained(state.params, state.head)
    grads = train_state.trained(*grads)
    updates, opt_state = tx.update(grads, state.opt_state, trained)
    trained: Any = optax.apply_updates(trained, updates)
    trained |= {"log_temperature": at_least_lowest(trained["log_temperature"])}
    norm = optax.tree.norm(grads)
    finite = jnp.isfinite(result.loss) & jnp.isfinite(norm)
    updated = TrainState(step=state.step + 1, opt_state=opt_state, **trained)
    updated = train_state.updated_where(finite, updated, state)
    metrics = {
      "loss": result.loss,
      "finite": finite,
      "state_finite": train_state.is_finite(updated),
      **{f"{name}_loss": jnp.mean(term) for name, term in result.terms.items()},
      "gradient_norm": norm,
      "learning_rate": rate(state.step),
      "rank": jnp.zeros((), jnp.int32) if rank is None else rank,
      "temperature": jnp.asarray(loss.temperature(state.log_temperature, progress)),
      "negatives": result.negatives,
      "empty_rows": result.empty_rows,
      **gradcache.work(batch.sheets),
    }
    return updated, metrics

  return step
