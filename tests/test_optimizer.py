"""The schedule's worked example; AdamW against a numpy formula."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from mlembed_jax import optimizer
from mlembed_jax.config_fields import OptimizerConfig

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


def test_updates_equal_adamw_with_decay_on_every_parameter():
  generator = np.random.default_rng(0)

  def draw(shape):
    return generator.normal(size=shape).astype(np.float32)

  params = {"scale": draw((4,)), "table": draw((3, 2))}
  tx = optimizer.make(CONFIG, 1000)
  state = tx.init({name: jnp.array(p) for name, p in params.items()})
  m = {name: np.zeros_like(p) for name, p in params.items()}
  v = {name: np.zeros_like(p) for name, p in params.items()}
  for update in range(5):
    grads = {name: draw(p.shape) for name, p in params.items()}
    updates, state = tx.update(grads, state, {n: jnp.array(p) for n, p in params.items()})
    norm = np.sqrt(sum(np.sum(g**2) for g in grads.values()))
    rate = max(1e-7, 1e-5 * update / 100) if update else 0.0
    for name, grad in grads.items():
      clipped = grad / max(1.0, norm)
      m[name] = 0.9 * m[name] + 0.1 * clipped
      v[name] = 0.98 * v[name] + 0.02 * clipped**2
      adam = (m[name] / (1 - 0.9 ** (update + 1))) / (
        np.sqrt(v[name] / (1 - 0.98 ** (update + 1))) + 1e-8
      )
      expected = -rate * (adam + 0.01 * params[name])
      np.testing.assert_allclose(updates[name], expected, rtol=2e-5, atol=1e-13)
      params[name] = params[name] + expected
