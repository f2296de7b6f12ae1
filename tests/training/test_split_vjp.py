"""A backward pass taken apart: the same gradient, and nothing kept twice."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlembed_jax.batch import Sheets
from mlembed_jax.models.encoder import Encoder
from mlembed_jax.training.split_vjp import Pull
from tests.material import FAST_COMPILE, random_params


def encoder(model):
  return lambda params, x: Encoder(model).apply({"params": params}, x.tokens, x.ends)


def block(seed, vocab):
  generator = np.random.default_rng(seed)
  tokens = generator.integers(0, vocab, (2, 32)).astype(np.int32)
  texts = np.array([[0, 1, 2], [3, 4, 5]], np.int32)
  return Sheets(np.array([[9, 20, 31], [4, 31, 32]], np.int32), texts, tokens)


@pytest.mark.parametrize(
  ("remat", "dtype"),
  [
    *((remat, "float32") for remat in ("none", "full", "context", "products")),
    *((remat, "bfloat16") for remat in ("none", "products")),
  ],
)
def test_the_gradient_is_that_of_vjp(tiny, remat, dtype):
  model = dataclasses.replace(tiny.model, remat=remat, dtype=dtype)
  params, blocks = random_params(model), [block(seed, model.vocab) for seed in (0, 1)]
  d_out = jnp.asarray(np.random.default_rng(5).normal(size=(3, 2, 3, 48)), dtype)

  def apart(params, blocks):
    pull = Pull(encoder(model), params, blocks[0])
    kept = [pull.forward(params, x)[1] for x in blocks]
    return [pull.back(params, blocks[0], residuals, d_out) for residuals in kept]

  def straight(params, blocks):
    return [jax.vjp(lambda p, x=x: encoder(model)(p, x), params)[1](d_out)[0] for x in blocks]

  found, expected = (
    jax.jit(run, compiler_options=FAST_COMPILE)(params, blocks) for run in (apart, straight)
  )
  close = {"float32": 1e-5, "bfloat16": 2e-2}[dtype]  # of the largest: where XLA fuses, it rounds
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(a, b, rtol=close, atol=close * np.abs(b).max())


def test_parameters_are_not_kept(tiny):
  model = dataclasses.replace(tiny.model, remat="full")
  params, x = random_params(model), block(0, model.vocab)
  kept = jax.eval_shape(lambda: Pull(encoder(model), params, x).empty(1))
  inputs = [leaf for leaf in kept if leaf.shape == (1, 3, 2, 32, 48)]
  assert len(inputs) == 1  # of each layer, once
  shapes = {leaf.shape for leaf in jax.tree.leaves(params)}
  assert not shapes & {leaf.shape[1:] for leaf in kept}
