"""FLOPs by hand and by the compiler; what a chip can do."""

import dataclasses

import jax
import numpy as np
import pytest

from mlembed_jax.config import from_mapping
from mlembed_jax.devices import chips
from mlembed_jax.models import flops
from mlembed_jax.models.encoder import Encoder
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


def test_training_is_three_times_forward():
  model = model_of("0_6b")
  assert flops.step_flops(model, 10, 110) == 3 * flops.forward_flops(model, 10, 110)


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
  assert chips.find("TPU v5 lite").bf16_flops == 197e12
  assert chips.find("TPU v5").bf16_flops == 459e12
  assert chips.find("NVIDIA H100") is chips.find("cpu") is chips.find("TPU v9") is None
