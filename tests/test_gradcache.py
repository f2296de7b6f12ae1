"""Micro-batches change memory, not the update: every combination equals the full batch."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlembed_jax import train_state, train_step
from mlembed_jax.config import from_mapping
from mlembed_jax.losses import Task
from mlembed_jax.models.encoder import abstract_params
from mlembed_jax.sharding import make_mesh, put_batch, shardings
from mlembed_jax.train_step import TeacherShape
from tests.material import FAST_COMPILE, config_dict, random_params
from tests.test_train_step import batch_of, on_mesh

TEACHER = dataclasses.replace(
  from_mapping(config_dict()).model, layers=4, width=64, rank=0, remat="none"
)


def value_and_grad(config, task, mesh):
  boxed = abstract_params(config.model)
  arrays = batch_of()
  if task.kind == "scored_pairs":
    arrays = {name: array[:, :2] for name, array in arrays.items()}
    arrays["scores"] = np.random.default_rng(0).choice([0.0, 0.25, 1.0], 16).astype(np.float32)
  if config.kd.teacher == "stored":
    vectors = np.random.default_rng(1).normal(size=(16, 2 + task.positives, 64))
    arrays["teacher"] = vectors.astype(np.float32)
  online = TeacherShape(TEACHER, (1, 3, 4)) if config.kd.teacher == "online" else None

  def run(params, logs, batch, rank, teacher_params):
    result, grads = train_step.value_and_grad(
      config,
      params,
      logs,
      batch,
      task=task,
      rank=rank,
      progress=0.25,
      teacher=online,
      teacher_params=teacher_params,
    )
    return result, grads

  with on_mesh(mesh):
    params = jax.device_put(random_params(config.model), shardings(boxed, mesh))
    logs = jax.tree.map(jnp.asarray, train_state.initial_log_temperature(config))
    rank = np.int32(16) if config.model.rank else None
    teacher_params = random_params(TEACHER, 3) if online else None
    return jax.device_get(
      jax.jit(run, compiler_options=FAST_COMPILE)(
        params, logs, put_batch(arrays, mesh), rank, teacher_params
      )
    )


def assert_equal(found, expected):
  (result, grads), (full, full_grads) = found, expected
  assert result.loss == pytest.approx(full.loss, rel=1e-6)
  assert jax.tree.structure(grads) == jax.tree.structure(full_grads)
  for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(full_grads), strict=True):
    assert np.abs(a - b).max() <= 1e-5 * np.abs(b).max()


ONE_AXIS = {"matryoshka.dims": (48,), "matryoshka.exits": (3,), "matryoshka.ranks": (24,)}
COMBINATIONS = {
  "retrieval": ("retrieval", {}),
  "nothing nested": ("retrieval", ONE_AXIS),
  "full table": ("retrieval", {"model.rank": 0, "matryoshka.ranks": ()}),
  "remat": ("clustering", {"model.remat": "full"}),
  "bitext, joint, all negatives": (
    "bitext",
    {"losses.softmax": "joint", "losses.inbatch_negatives": True},
  ),
  "online teacher": ("retrieval", {"kd.teacher": "online", "kd.space": "unit"}),
  "online teacher judges": (
    "retrieval",
    {
      "kd.teacher": "online",
      "losses.false_negative_score": "teacher",
      "losses.false_negative_margin": 0.0,
    },
  ),
  "stored vectors": ("bitext", {"kd.teacher": "stored"}),
  "self-distillation": ("retrieval", {"losses.self_distillation": 0.5}),
  "regularizers": ("retrieval", {"losses.spread_out": 0.5, "losses.int8": 0.5}),
  "learned temperature": ("bitext", {"losses.learn_temperature": True}),
  "scored pairs": ("scored_pairs", {"losses.learn_temperature": True}),
}


@pytest.mark.parametrize("name", COMBINATIONS)
def test_micro_batches_equal_the_full_batch(name):
  kind, fields = COMBINATIONS[name]
  config = from_mapping(config_dict(**fields))
  mesh = make_mesh(config, jax.devices()[:1])
  full = value_and_grad(config, Task(kind), mesh)
  small = dataclasses.replace(config, data=dataclasses.replace(config.data, micro_batch=4))
  assert_equal(value_and_grad(small, Task(kind), mesh), full)


def test_two_positives_and_eight_devices_equal_the_full_batch_on_one():
  fields = {"kd.teacher": "online", "losses.self_distillation": 0.5, "losses.binary": 0.1}
  config = from_mapping(config_dict(**fields))
  task = Task("bitext", positives=2)
  full = value_and_grad(config, task, make_mesh(config, jax.devices()[:1]))
  split = from_mapping(config_dict(**fields, **{"data.micro_batch": 8, "mesh.data": 2}))
  assert_equal(value_and_grad(split, task, make_mesh(split)), full)
