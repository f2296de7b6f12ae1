"""The encoder: formulas in numpy, independence of rows and padding, exits, settings that act."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlembed_jax.batch import Sheets
from mlembed_jax.config_fields import SETTINGS, LoraConfig, ModelConfig
from mlembed_jax.errors import ConfigError
from mlembed_jax.families import FAMILIES
from mlembed_jax.matryoshka import Slice, slice_config, slice_params
from mlembed_jax.models import pooling
from mlembed_jax.models.attention import quarter_turn, rotary, rotation
from mlembed_jax.models.encoder import (
  REMAT_POLICIES,
  Encoder,
  RMSNorm,
  abstract_params,
  parameter_shapes,
)
from mlembed_jax.parallel.sharding import RULES
from mlembed_jax.training.split_vjp import Pull
from tests.material import FAST_COMPILE, packed, padded, random_batch, random_params


@pytest.fixture(scope="module")
def encode(tiny):
  return jax.jit(padded(tiny.model))


@pytest.fixture(scope="module")
def batch(tiny):
  return random_batch(tiny.model.vocab, 6, 64)


@pytest.fixture(scope="module")
def states(encode, params, batch):
  return np.asarray(encode({"params": params}, *batch))


def test_rms_norm_worked_example(tiny):
  model = RMSNorm(tiny.model)
  params = {"scale": jnp.array([1, 0.5, 2, 1])}
  x = jnp.array([1.0, 2, 2, 4])
  np.testing.assert_allclose(model.apply({"params": params}, x), [0.4, 0.4, 1.6, 1.6], rtol=1e-5)


def test_rotary_equals_numpy():
  x = np.random.default_rng(0).normal(size=(1, 5, 2, 8)).astype(np.float32)
  positions = np.array([[0, 1, 2, 1000, 40_000]])
  expected = np.empty_like(x)
  for t, i in np.ndindex(5, 4):
    angle = positions[0, t] * 1e4 ** (-2 * i / 8)
    a, b = x[0, t, :, i], x[0, t, :, i + 4]
    expected[0, t, :, i] = a * np.cos(angle) - b * np.sin(angle)
    expected[0, t, :, i + 4] = b * np.cos(angle) + a * np.sin(angle)
  found = rotary(x, rotation(positions, 8, 1e4))
  # float32 angles of 40,000 radians are 4e-3 apart; transformers has the same.
  np.testing.assert_allclose(found, expected, atol=1e-2)
  np.testing.assert_allclose(found[:, :3], expected[:, :3], atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_turning_by_a_product_is_exact(dtype):
  x = jnp.array(np.random.default_rng(0).normal(size=(1, 5, 2, 8)), dtype)
  np.testing.assert_array_equal(quarter_turn(x, "tpu"), quarter_turn(x, "cpu"))
  # A TPU would multiply float32 in bfloat16 otherwise.
  assert "HIGHEST" in str(jax.make_jaxpr(lambda x: quarter_turn(x, "tpu"))(x))


def test_padding_never_changes_a_result(encode, params, batch, states):
  tokens, lengths = batch
  wider = np.pad(tokens, ((0, 0), (0, 32)), constant_values=7)
  other = np.where(np.arange(96)[None] < lengths[:, None], wider, 3)
  np.testing.assert_allclose(encode({"params": params}, other, lengths), states, atol=2e-6)


def test_rows_never_influence_each_other(encode, params, batch, states):
  tokens, lengths = batch
  order = np.array([3, 0, 5, 1, 4, 2])
  shuffled = encode({"params": params}, tokens[order], lengths[order])
  np.testing.assert_allclose(shuffled, states[:, order], atol=2e-6)
  changed = tokens.copy()
  changed[0] = (changed[0] + 1) % 600
  result = np.asarray(encode({"params": params}, changed, lengths))
  np.testing.assert_array_equal(result[:, 1:], states[:, 1:])
  assert np.abs(result[:, 0] - states[:, 0]).max() > 0.1


def test_positions_and_segments_worked_example():
  positions, segments = pooling.packed(np.array([[1, 2, 5, 7], [5, 7, 7, 7], [7, 7, 7, 7]]), 7)
  np.testing.assert_array_equal(positions[:2], [[0, 1, 0, 0, 1, 2, 0], [0, 1, 2, 3, 4, 5, 0]])
  np.testing.assert_array_equal(segments, [[1, 1, 2, 3, 3, 3, 0], [1] * 6 + [0], [0] * 7])


def test_vectors_at_the_ends_worked_example():
  x = np.arange(4, dtype=np.float32).reshape(1, 4, 1) * 10
  np.testing.assert_array_equal(pooling.last_tokens(x, np.array([[0, 2, 4]]))[0, :2, 0], [0, 20])
  assert np.all(np.isfinite(pooling.last_tokens(x, np.array([[0, 2, 4]]))))


@pytest.fixture(scope="module")
def sheets(tiny):
  """Sixteen texts packed, and the sheets they are in: [S, T] and [S, K]."""
  tokens, lengths = random_batch(tiny.model.vocab, 16, 32)
  found = packed(tokens[None], lengths[None], widths=(64,))[0]
  assert np.sum(np.any(found.texts[0] < 16, axis=-1)) < 8
  return tokens, lengths, Sheets(*(array[0] for array in found))


def in_order(states_LSKD, texts_SK):
  """Returns the states of the texts 0, 1, 2 ..., [L, 16, D]."""
  places = np.array([np.argwhere(texts_SK == text)[0] for text in range(16)])
  return states_LSKD[:, places[:, 0], places[:, 1]]


def test_texts_that_share_a_row_are_as_alone(tiny, encode, params, sheets):
  tokens, lengths, shared = sheets
  alone = np.asarray(encode({"params": params}, tokens, lengths))
  together = jax.jit(Encoder(tiny.model).apply)({"params": params}, shared.tokens, shared.ends)
  assert np.all(np.isfinite(together))
  np.testing.assert_allclose(in_order(together, shared.texts), alone, atol=3e-6)


def test_gradients_of_texts_that_share_a_row_are_as_alone(tiny, params, sheets):
  tokens, lengths, shared = sheets
  weights = np.random.default_rng(0).normal(size=(3, 16, 48)).astype(np.float32)

  def loss_alone(p):
    return jnp.sum(weights * padded(tiny.model)({"params": p}, tokens, lengths))

  def loss_together(p):
    states = Encoder(tiny.model).apply({"params": p}, shared.tokens, shared.ends)
    return jnp.sum(weights * in_order(states, shared.texts))

  alone, together = (
    jax.jit(jax.grad(loss), compiler_options=FAST_COMPILE)(params)
    for loss in (loss_alone, loss_together)
  )
  for a, b in zip(jax.tree.leaves(together), jax.tree.leaves(alone), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max())


def test_a_text_does_not_see_the_others_of_its_row(tiny, params, sheets):
  _, _, shared = sheets
  apply = jax.jit(Encoder(tiny.model).apply)
  sheet = next(i for i, ends in enumerate(shared.ends) if np.sum(ends < 64) > 2)
  first, second = shared.ends[sheet, :2]
  changed = shared.tokens.copy()
  changed[sheet, first + 1 : second + 1] = (changed[sheet, first + 1 : second + 1] + 1) % 600
  before, after = (
    np.array(apply({"params": params}, tokens, shared.ends)) for tokens in (shared.tokens, changed)
  )
  assert np.abs(after - before)[:, sheet, 1].max() > 0.1
  after[:, sheet, 1] = before[:, sheet, 1]
  np.testing.assert_array_equal(after, before)


def test_every_exit_is_the_cut_model(tiny, params, batch, states):
  for depth in (1, 2, 3):
    cut = Slice(depth=depth)
    apply = jax.jit(padded(slice_config(tiny.model, cut)))
    result = apply({"params": slice_params(params, cut)}, *batch)
    assert result.shape[0] == depth
    np.testing.assert_allclose(result[-1], states[depth - 1], atol=2e-6)


def test_rank_mask_equals_the_sliced_table(tiny, encode, params, batch):
  cut = Slice(rank=16)
  mask = (np.arange(tiny.model.rank) < 16).astype(np.float32)
  masked = encode({"params": params}, *batch, mask)
  sliced = jax.jit(padded(slice_config(tiny.model, cut)))(
    {"params": slice_params(params, cut)}, *batch
  )
  np.testing.assert_allclose(masked, sliced, atol=2e-6)


def test_masked_ranks_get_no_gradient(tiny, params, batch):
  mask = (np.arange(tiny.model.rank) < 16).astype(np.float32)

  def loss(p):
    return jnp.sum(padded(tiny.model)({"params": p}, *batch, mask)[-1] ** 3)

  grads = jax.jit(jax.grad(loss))(params)
  assert not np.any(grads["table"][:, 16:]) and not np.any(grads["up"][16:])
  assert np.any(grads["table"][:, :16]) and np.all(np.any(grads["up"][:16], axis=1))


def test_full_table_equals_the_product_of_its_factors(tiny, params, batch, states):
  full = {name: leaf for name, leaf in params.items() if name != "up"}
  full["table"] = params["table"] @ params["up"]
  model = dataclasses.replace(tiny.model, rank=0)
  result = jax.jit(padded(model))({"params": full}, *batch)
  np.testing.assert_allclose(result, states, atol=5e-5)


def test_bfloat16_is_close_and_returns_bfloat16(tiny, params, batch, states):
  model = dataclasses.replace(tiny.model, dtype="bfloat16")
  result = jax.jit(padded(model))({"params": params}, *batch)
  assert result.dtype == jnp.bfloat16
  a, b = np.asarray(result, np.float32).reshape(-1, 48), states.reshape(-1, 48)
  cosine = np.sum(a * b, axis=1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
  assert cosine.min() > 0.995


@pytest.mark.parametrize("rank", [0, 24])
def test_bfloat16_sums_a_frequent_tokens_gradient_in_float32(tiny, rank):
  """4096 equal texts teach their token 4096 times as much as one; a bfloat16 sum stops at 256."""
  model = dataclasses.replace(tiny.model, dtype="bfloat16", rank=rank, layers=1)
  params = random_params(model)

  def token_gradient(rows):
    tokens, lengths = np.full((rows, 1), 7), np.ones(rows, np.int32)
    loss = lambda p: jnp.sum(padded(model)({"params": p}, tokens, lengths))  # noqa: E731
    return np.asarray(jax.jit(jax.grad(loss))(params)["table"])[7]

  ratio = token_gradient(4096) / token_gradient(1)
  np.testing.assert_allclose(np.median(ratio), 4096, rtol=0.02)


@pytest.mark.parametrize("policy", REMAT_POLICIES)
def test_remat_changes_no_gradient(tiny, params, batch, policy):
  def grads(remat):
    apply = padded(dataclasses.replace(tiny.model, remat=remat))
    return jax.jit(jax.grad(lambda p: jnp.sum(apply({"params": p}, *batch) ** 3)))(params)

  for a, b in zip(jax.tree.leaves(grads("none")), jax.tree.leaves(grads(policy)), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * np.abs(a).max())


OTHER = {
  "vocab": 641,
  "width": 32,
  "layers": 2,
  "ffn": 96,
  "heads": 2,
  "kv_heads": 1,
  "head_dim": 8,
  "rank": 0,
  "rope_theta": 1e4,
  "norm_eps": 1e-5,
  "family": "llama",
  "dtype": "bfloat16",
  "attention": "splash",
  "remat": "full",
  "lora": LoraConfig(4, 16.0, ()),
}


def program(model: ModelConfig) -> str:
  """Returns the encoder as text: every shape, constant and primitive; nothing is run."""
  tokens = jax.ShapeDtypeStruct((2, 8), jnp.int32)
  lengths = jax.ShapeDtypeStruct((2,), jnp.int32)
  params = nn.unbox(abstract_params(model))
  return str(jax.make_jaxpr(padded(model))({"params": params}, tokens, lengths))


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(ModelConfig)])
def test_every_field_changes_the_program(tiny, field):
  changed = dataclasses.replace(tiny.model, **{field: OTHER[field]})
  if field == "attention":  # kernels are none of the CPU's
    with pytest.raises(ConfigError, match=r"model\.attention"):
      program(changed)
    return
  assert program(changed) != program(tiny.model)


def test_every_field_of_an_adapter_changes_the_program(tiny):
  adapters = [LoraConfig(4, 16.0, ()), LoraConfig(8, 32.0, ()), LoraConfig(4, 8.0, ())]
  adapters.append(LoraConfig(4, 16.0, ("q_proj",)))
  models = [dataclasses.replace(tiny.model, lora=adapter) for adapter in adapters]
  assert len({*map(program, models)}) == len(adapters)


def test_families_are_different_programs(tiny):
  models = [dataclasses.replace(tiny.model, family=family) for family in FAMILIES]
  assert len({*map(program, models)}) == len(FAMILIES)


def test_remat_policies_are_different_programs(tiny):
  """Of the gradient: the text of a forward program need not say what a policy keeps."""
  tokens, ends = jnp.zeros((2, 8), jnp.int32), jnp.full((2, 1), 7, jnp.int32)

  def gradient(remat):
    model = dataclasses.replace(tiny.model, remat=remat)
    loss = lambda p: Encoder(model).apply({"params": p}, tokens, ends).sum()  # noqa: E731
    return str(jax.make_jaxpr(jax.grad(loss))(parameter_shapes(model)))

  choices = SETTINGS["model.remat"].choices
  assert len({*map(gradient, choices)}) == len(choices) == 1 + len(REMAT_POLICIES)


def test_policies_keep_more_and_more(tiny):
  block = Sheets(*(jax.ShapeDtypeStruct((2, size), jnp.int32) for size in (1, 1, 64)))

  def kept(remat):
    model = dataclasses.replace(tiny.model, remat=remat)
    encode = lambda p, x: Encoder(model).apply({"params": p}, x.tokens, x.ends)  # noqa: E731
    return Pull(encode, parameter_shapes(model), block).bytes

  for order in (("full", "context", "products", "none"), ("full", "dots", "none")):
    sizes = [kept(remat) for remat in order]
    assert sizes == sorted(set(sizes))


def test_every_parameter_names_its_axes(tiny):
  boxes = jax.tree.leaves(
    abstract_params(tiny.model), is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned)
  )
  for box in boxes:
    assert isinstance(box, nn.LogicallyPartitioned)
    assert len(box.names) == box.value.ndim and set(box.names) <= set(RULES)


def test_random_params_reach_every_norm(tiny):
  assert np.ptp(random_params(tiny.model)["final_norm"]["scale"]) > 0.1
