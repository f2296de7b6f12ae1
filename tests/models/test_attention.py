"""Attention: the definition in numpy, the kernels against the definition, what they refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlembed_jax.errors import ConfigError
from mlembed_jax.models.attention import (
  attention,
  choose,
  cudnn_attention,
  einsum,
  splash_attention,
)
from mlembed_jax.parallel.sharding import logical_rules

SEGMENTS = np.array([[1] * 100 + [2] * 30 + [3] * 70 + [0] * 56, [1] * 256])


def arrays(size, width, q_heads=4, kv_heads=2, seed=0):
  generator = np.random.default_rng(seed)
  shapes = ((2, size, heads, width) for heads in (q_heads, kv_heads, kv_heads))
  return [generator.normal(size=shape).astype(np.float32) for shape in shapes]


def numpy_attention(q, k, v, segments):
  """Returns grouped-query causal attention, one query at a time, in float64."""
  B, T, N, K = q.shape
  out = np.zeros((B, T, N, K))
  for b, t, n in np.ndindex(B, T, N):
    g = n // (N // k.shape[2])
    keys = [s for s in range(t + 1) if segments[b, s] == segments[b, t]]
    scores = np.array([q[b, t, n] @ k[b, s, g] for s in keys]) / np.sqrt(K)
    weights = np.exp(scores - scores.max())
    out[b, t, n] = (weights / weights.sum()) @ v[b, keys, g]
  return out


def test_the_definition_equals_numpy():
  q, k, v = arrays(9, 4, q_heads=6)
  segments = np.array([[1] * 9, [1, 1, 1, 2, 2, 2, 2, 0, 0]])
  np.testing.assert_allclose(
    attention(q, k, v, segments), numpy_attention(q, k, v, segments), atol=1e-5
  )


def value_and_grads(function, inputs):
  weights = np.random.default_rng(9).normal(size=inputs[0].shape).astype(np.float32)
  run = lambda *qkv: jnp.sum(function(*qkv, SEGMENTS) * weights)  # noqa: E731
  return jax.jit(jax.value_and_grad(run, argnums=(0, 1, 2)))(*inputs)


def on_eight_devices(function):
  """Returns `function` with rows on two devices and heads on two."""
  mesh = jax.make_mesh(
    (1, 2, 2),
    ("data", "fsdp", "tensor"),
    axis_types=(jax.sharding.AxisType.Auto,) * 3,
    devices=jax.devices()[:4],
  )

  def run(*args):
    import flax.linen as nn

    with jax.set_mesh(mesh), nn.logical_axis_rules(logical_rules()):
      return function(*args)

  return run


@pytest.mark.parametrize("devices", [1, 4])
def test_splash_equals_the_definition_with_packed_texts(devices):
  inputs = arrays(256, 128)
  kernel = lambda *args: splash_attention(*args, interpret=True)  # noqa: E731
  run = value_and_grads if devices == 1 else on_eight_devices(value_and_grads)
  value, grads = run(kernel, inputs)
  expected, expected_grads = value_and_grads(einsum, inputs)
  assert value == pytest.approx(float(expected), rel=1e-5, abs=1e-3)
  for found, wanted in zip(grads, expected_grads, strict=True):
    np.testing.assert_allclose(found, wanted, atol=2e-5 * np.abs(wanted).max())


def test_the_mask_of_cudnn_is_the_definition():
  inputs = arrays(256, 64)
  found = value_and_grads(lambda *args: cudnn_attention(*args, kernel="xla"), inputs)
  expected = value_and_grads(einsum, inputs)
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-4 * np.abs(b).max())


@pytest.mark.parametrize(
  ("platform", "shape", "name"),
  [
    ("tpu", (1024, 128, "bfloat16"), "splash"),
    ("tpu", (64, 128, "bfloat16"), "einsum"),
    ("tpu", (256, 64, "bfloat16"), "einsum"),
    ("gpu", (256, 128, "bfloat16"), "cudnn"),
    ("gpu", (256, 128, "float32"), "einsum"),
    ("cpu", (256, 128, "bfloat16"), "einsum"),
  ],
)
def test_auto_is_the_best_that_can(platform, shape, name):
  assert choose("auto", platform, *shape) == name


@pytest.mark.parametrize(
  ("name", "platform", "shape", "message"),
  [
    ("splash", "cpu", (256, 128, "bfloat16"), "'splash' does not run on cpu, which has einsum"),
    ("cudnn", "tpu", (256, 128, "bfloat16"), "which has splash, einsum"),
    ("splash", "tpu", (200, 128, "bfloat16"), "data.lengths in multiples of 128, found 200"),
    ("splash", "tpu", (256, 64, "bfloat16"), "model.head_dim in multiples of 128, found 64"),
    ("cudnn", "gpu", (256, 128, "float32"), "model.dtype bfloat16, found float32"),
    ("cudnn", "gpu", (256, 192, "bfloat16"), "up to 128, found 192"),
  ],
)
def test_what_a_kernel_cannot_do_is_refused(name, platform, shape, message):
  with pytest.raises(ConfigError, match=message):
    choose(name, platform, *shape)
