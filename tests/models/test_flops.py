"""FLOPs by hand and by the compiler; what a chip can do."""

import dataclasses
import math

import jax
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from mlembed_jax.config import from_mapping
from mlembed_jax.devices import chips
from mlembed_jax.models import flops
from mlembed_jax.models.encoder import Encoder
from mlembed_jax.training import frozen
from tests.benchmarks.common import load_config
from tests.material import CONFIGS, config_dict, random_params

# Per token: [GFLOP of products, MFLOP of attention in a text of 512], and by layer as sums.
HAND = {
  # 28 * (2 * 1024 * 128 * (16 + 16) + 2 * 16 * 128 * 1024 + 6 * 1024 * 3072); 2 * 16 * 128 * 513
  "0_6b": (0.881, 59),
  # 36 * (2 * 4096 * 128 * (32 + 16) + 2 * 32 * 128 * 4096 + 6 * 4096 * 12288); 2 * 32 * 128 * 513
  "8b": (13.892, 151),
}


def model_of(name, **changes):
  return dataclasses.replace(load_config(CONFIGS / f"{name}.py").model, **changes)


@pytest.mark.parametrize("name", HAND)
def test_hand_counts(name):
  model, (products, attention) = model_of(name, rank=0), HAND[name]
  assert flops.forward_flops(model, 1, 0) == pytest.approx(products * 1e9, abs=5e5)
  per_token = flops.forward_flops(model, 512, 512 * 513) / 512 - flops.forward_flops(model, 1, 0)
  assert per_token == pytest.approx(attention * 1e6, abs=5e5)


def test_a_factorised_table_costs_its_product_and_a_full_one_nothing():
  whole, factorised = (flops.forward_flops(model_of("0_6b", rank=r), 7, 56) for r in (0, 512))
  assert factorised - whole == 7 * 2 * 512 * 1024


def products(jaxpr):
  """Returns the FLOPs of all matrix products of a program, a loop's as often as it runs."""
  total = 0
  for eqn in jaxpr.eqns:
    if eqn.primitive.name == "dot_general":
      (contracted, _), _ = eqn.params["dimension_numbers"]
      sizes = (eqn.invars[0].aval.shape[axis] for axis in contracted)
      total += 2 * eqn.outvars[0].aval.size * math.prod(sizes)
    times = eqn.params["length"] if eqn.primitive.name == "scan" else 1
    total += times * sum(map(products, jaxprs_in_params(eqn.params)))
  return total


ALL, LORA = {}, {"model.lora.rank": 4, "model.lora.targets": ("q_proj", "o_proj", "down_proj")}
LAYERS = {"train.trainable": ("layers/*",), "train.frozen": ("table", "up", "final_norm/*")}


@pytest.mark.parametrize(("rank", "fields"), [(0, ALL), (24, ALL), (24, LORA), (24, LAYERS)])
def test_an_update_is_counted_by_the_products_of_its_gradient(rank, fields):
  start = {"train.init_from": "a/folder"} if fields else {}
  config = from_mapping(config_dict(**fields | start))
  model = dataclasses.replace(config.model, rank=rank)
  config = dataclasses.replace(config, model=model)
  tokens, ends = np.zeros((4, 32), np.int32), np.full((4, 1), 31, np.int32)

  parts = frozen.split(config, random_params(model))

  def loss(trained, fixed):
    return Encoder(model).apply({"params": frozen.whole(trained, fixed)}, tokens, ends).sum()

  def found(function):
    return products(jax.make_jaxpr(function)(*parts).jaxpr)

  # The einsum multiplies all pairs of tokens, and `squares` is twice their number.
  squares = 2 * 4 * 32 * 32
  assert found(loss) == flops.forward_flops(model, 4 * 32, squares)
  update = flops.step_flops(model, 4 * 32, squares, frozen.skipped_products(config))
  assert found(jax.value_and_grad(loss)) == update


def counted(model, texts, size):
  """Returns the compiler's count for texts of one length; of one layer, as it sees a loop once."""
  params = random_params(model)
  tokens, ends = np.zeros((texts, size), np.int32), np.full((texts, 1), size - 1, np.int32)
  run = jax.jit(lambda p: Encoder(model).apply({"params": p}, tokens, ends))
  return run.lower(params).compile().cost_analysis()["flops"]


def test_products_are_those_that_the_compiler_counts():
  """Between two widths of the MLP and two ranks, so that all the rest cancels out."""
  config = from_mapping(config_dict(**{"model.layers": 1, "matryoshka.exits": (1,)}))
  for field, more in (("ffn", 128), ("rank", 48)):
    small, large = config.model, dataclasses.replace(config.model, **{field: more})
    found = counted(large, 4, 32) - counted(small, 4, 32)
    ours = flops.forward_flops(large, 128, 0) - flops.forward_flops(small, 128, 0)
    assert found == pytest.approx(ours, rel=0.02)  # SwiGLU's own multiplications


def test_an_unknown_chip_is_not_guessed():
  assert chips.find_chip("TPU v5 lite").bf16_flops == 197e12
  assert chips.find_chip("TPU v5").bf16_flops == 459e12
  assert (
    chips.find_chip("NVIDIA H100") is chips.find_chip("cpu") is chips.find_chip("TPU v9") is None
  )
