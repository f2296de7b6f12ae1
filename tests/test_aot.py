"""Updates compiled for TPUs that are not here: memory, time, exchanges, and what is refused."""

import dataclasses
import json
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mlembed_jax.config import from_mapping
from mlembed_jax.devices.tpu import TPUS
from mlembed_jax.errors import ConfigError
from mlembed_jax.estimate import hlo, sweep
from mlembed_jax.estimate.estimate import Step, Target, estimate_step
from mlembed_jax.models import flops
from mlembed_jax.models.encoder import parameter_count
from mlembed_jax.parallel.sharding import make_mesh
from mlembed_jax.training import optimizer, train_state
from mlembed_jax.training.gradcache import BLOCKS
from tests.benchmarks.common import load_config
from tests.material import CONFIGS, config_dict

SMALL = {
  "model.layers": 2,
  "model.vocab": 4096,
  "data.lengths": (256,),
  "data.global_batch": 64,
  "data.micro_batch": 8 * 1024,
}


def run(*flags, **fields):
  options = [f"--config.{name}={value}" for name, value in (SMALL | fields).items()]
  command = [sys.executable, "-m", "mlembed_jax.aot", "--config", str(CONFIGS / "140m.py")]
  return subprocess.run([*command, *flags, *options], capture_output=True, text=True, check=False)


def test_report_of_a_small_model():
  """The update of a small model on eight chips, half of its blocks kept."""
  half = {"data.kept_tokens": 72 * 1024}
  done = run("--topology", "v5e:2x4", "--task", "retrieval", "--json", **half)
  assert done.returncode == 0, done.stderr
  report = json.loads(done.stdout)
  check_estimate(report)
  check_memory(report)
  check_collectives(report)


def check_estimate(report):
  config = load_config(CONFIGS / "140m.py", **SMALL, **{"data.kept_tokens": 72 * 1024})
  texts = 64 * 9
  work = flops.step_flops(config.model, texts * 256, texts * 256 * 257)
  assert report["topology"] == "v5e:2x4" and report["devices"] == 8
  assert report["model_flops_per_step"] == work
  assert (
    report["fits"] and 0 < report["hbm_bytes_per_device"] < report["hbm_capacity"] == 16 * 2**30
  )
  seconds = report["estimated_step_seconds"]
  assert report["estimated_mfu"] == pytest.approx(work / seconds / 8 / 197e12)
  assert 0.02 < report["estimated_mfu"] < 1
  assert report["tokens_per_second_per_chip"] == pytest.approx(texts * 256 / seconds / 8)
  assert report["compile_seconds"] > 1


def check_memory(report):
  config = load_config(CONFIGS / "140m.py", **SMALL)
  by_kind = report["hbm_by_kind"]
  assert sum(by_kind.values()) == report["hbm_bytes_per_device"]
  # Norm scales are whole on each chip.
  share = 4 * parameter_count(config.model) / 8
  assert share <= by_kind["parameters"] <= 1.01 * share
  assert by_kind["optimizer"] == pytest.approx(2 * by_kind["parameters"], rel=1e-4)
  # Inputs of two layers, bfloat16, of half of 18 blocks; beside them 1 KiB of angles per token.
  inputs = 2 * 640 * 2 * 72 * 1024 / 8
  assert inputs < by_kind["kept activations"] < 2.2 * inputs
  assert by_kind["temporaries"] > 0


def check_collectives(report):
  assert report["seconds_by_kind"]["hidden"] > 0  # gathers of weights, beside products
  kinds = {x["kind"] for x in report["collectives"]}
  assert "all-gather" in kinds  # of weights
  assert all(x["group"] == 8 for x in report["collectives"])
  counts = [x["count"] for x in report["collectives"] if BLOCKS in x["scope"]]
  assert max(counts) % (9 * 2) == 0  # in a loop over half of 18 blocks one over two layers


def test_what_does_not_fit_ends_with_a_sentence():
  # 18 GB of scores and activations of all texts, kept at once on four chips.
  fields = {
    "model.remat": "none",
    "model.layers": 9,
    "data.lengths": (1024,),
    "data.global_batch": 512,
    "data.micro_batch": 4 * 128 * 1024,
    "data.kept_tokens": 10**9,
  }
  done = run("--topology", "v5e:2x2", **fields)
  assert done.returncode == 1
  assert (
    "GiB per chip, v5e:2x2 has 16.00, of which 90% " in done.stderr
    and "data.kept_tokens" in done.stderr
  )


@pytest.mark.parametrize(
  ("name", "slices", "message"),
  [
    ("v9:4x4", 1, "none that is known: v4:AxBxC, v5e:AxB, v5p:AxBxC, v6e:AxB"),
    ("v5p:4x4", 1, "none that is known"),
    ("v5e", 1, "none that is known"),
    ("v5e:0x4", 1, "none that is known"),
    ("v5e:32x16", 1, "larger than a v5e pod, v5e:16x16"),
    ("v5e:4x4", 0, "--slices: 0 is not positive"),
  ],
)
def test_unknown_chips_are_refused(name, slices, message):
  with pytest.raises(ConfigError, match=message):
    Target.parse(name, slices)


def test_a_shape_without_hardware_is_refused_by_name():
  with pytest.raises(ConfigError, match="--topology: v5e:3x5"):
    Target.parse("v5e:3x5", 1).devices()


@pytest.mark.parametrize(
  ("step", "message"),
  [
    (Step("retrieval", 65), "--text_tokens: 65 is not between 1 and 64"),
    (Step("ranking", 0), "--task: 'ranking' is not one of those that are estimated: retr"),
  ],
)
def test_unknown_steps_are_refused(step, message):
  config = from_mapping(config_dict())
  with pytest.raises(ConfigError, match=message):
    step.kind(config)
    step.tokens(config)


def test_slices_hold_copies():
  devices = Target.parse("v5e:2x4", 2).devices()
  mesh = make_mesh(from_mapping(config_dict(**{"mesh.data": 2})), devices)
  assert dict(mesh.shape) == {"data": 2, "fsdp": 8, "tensor": 1}
  assert [{d.slice_index for d in copy.flat} for copy in mesh.devices] == [{0}, {1}]
  with pytest.raises(ConfigError, match=r"mesh\.data: 1 is not a multiple of the 2 slices"):
    make_mesh(from_mapping(config_dict(**{"mesh.fsdp": 8, "mesh.tensor": 2})), devices)


def module_of(function, *shapes, name="v5e:2x4", axis=None):
  """Returns the module of `function` on one chip, or on all with the first axis of each split."""
  devices = Target.parse(name, 1).devices()
  mesh = Mesh(np.array(devices[: 8 if axis else 1]), ("x",))
  split = NamedSharding(mesh, PartitionSpec(axis))
  inputs = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=split) for shape in shapes]
  return hlo.Module(jax.jit(function, out_shardings=split).lower(*inputs).compile().as_text())


def no_trips(scope):
  raise AssertionError(scope)


@pytest.mark.parametrize(("name", "most"), [("v5e:2x4", 1.3), ("v5p:2x2x2", 1.6), ("v6e:2x4", 2.0)])
def test_products_in_a_loop_take_their_flops_over_the_peak(name, most):
  def layers(x, weights):
    return jax.lax.scan(lambda x, w: (x @ w, None), x, weights)[0]

  module = module_of(layers, (8192, 4096), (5, 4096, 4096), name=name)
  tpu = TPUS[name.partition(":")[0]]
  found = module.seconds(tpu, Target.parse(name, 1).torus, no_trips)
  ideal = 5 * 2 * 8192 * 4096**2 / tpu.peak_flops
  assert ideal < found.compute < most * ideal
  assert found.collectives == found.attention == found.hidden == 0


def test_a_loop_of_unknown_length_is_asked_for():
  def steps(x, count):
    return jax.lax.fori_loop(0, count[0].astype(jnp.int32), lambda _, x: x @ x, x)

  module = module_of(steps, (4096, 4096), (1,))
  once, thrice = (module.seconds(TPUS["v5e"], (2, 4), lambda _, n=n: n) for n in (1, 3))
  ideal = 2 * 4096**3 / 197e12
  assert 2 * ideal < thrice.total - once.total < 3 * ideal


def test_a_sum_over_chips_takes_its_bytes_over_the_links():
  module = module_of(
    lambda x: jnp.broadcast_to(jnp.sum(x, axis=0, keepdims=True), x.shape), (8, 2**20), axis="x"
  )
  found = [one for _, _, one in module.exchanges(no_trips)]
  assert [(one.opcode, one.bytes, one.group) for one in found] == [("all-reduce", 2 * 2**20, 8)]
  # Eight chips of v5e are no ring: a link per axis of 2 x 4.
  expected = 2 * 7 / 8 * 2 * 2**20 / (2 * 45e9)
  assert found[0].seconds(TPUS["v5e"], (2, 4)) == pytest.approx(expected)


@pytest.mark.parametrize(
  ("kind", "group", "share"),
  [
    ("all-gather", 8, 7 / 8),
    ("reduce-scatter", 8, 7 / 8),
    ("all-reduce", 8, 2 * 7 / 8),
    ("all-to-all", 8, 7 / 8 * 6 / 4),  # on its way through a quarter of 4 + 2 chips
  ],
)
def test_exchanges_take_what_a_chip_receives(kind, group, share):
  found = hlo.Collective(kind, 9 * 10**9, group).seconds(TPUS["v5e"], (2, 4))
  assert found == pytest.approx(share * 9e9 / (2 * 45e9))


BACKGROUND = """
ENTRY %main (p: bf16[500000]) -> bf16[4000000] {
  %p = bf16[500000]{0} parameter(0)
  %copy-start = (bf16[500000]{0}, bf16[500000]{0}) copy-start(%p)
  %one = (bf16[500000]{0}, bf16[4000000]{0}) all-gather-start(%p), replica_groups=[1,8]<=[8]
  %two = (bf16[500000]{0}, bf16[4000000]{0}) all-gather-start(%p), replica_groups=[1,8]<=[8]
  %work = bf16[500000]{0} add(%p, %p), backend_config={"estimated_cycles":"WORK"}
  %copy-done = bf16[500000]{0} copy-done(%copy-start)
  %first = bf16[4000000]{0} all-gather-done(%one)
LAST
}
"""
LAST = "  ROOT %done = bf16[4000000]{0} all-gather-done(%two)"


@pytest.mark.parametrize("last", [LAST, ""])
@pytest.mark.parametrize("share", [0.0, 0.25, 1.5, 3.0])
def test_work_beside_exchanges_hides_them_one_after_another(share, last):
  exchange = 7 / 8 * 2 * 4_000_000 / (2 * 45e9)
  cycles = round(share * exchange * TPUS["v5e"].clock_hz)
  module = hlo.Module(BACKGROUND.replace("WORK", str(cycles)).replace("LAST", last))
  found = module.seconds(TPUS["v5e"], (2, 4), no_trips)
  assert found.hidden == pytest.approx(min(share, 2) * exchange, rel=1e-3)
  assert found.collectives == pytest.approx(max(0, 2 - share) * exchange, rel=1e-3)
  assert found.total == pytest.approx(max(share, 2) * exchange, rel=1e-3)


IN_A_LOOP = """
%body (p: s32[]) -> s32[] {
  %one = (bf16[500000]{0}, bf16[4000000]{0}) all-gather-start(%p), replica_groups=[1,8]<=[8]
  %work = bf16[500000]{0} add(%p, %p), backend_config={"estimated_cycles":"WORK"}
  %done = bf16[4000000]{0} all-gather-done(%one)
}
%condition (p: s32[]) -> pred[] {
  %two = s32[] constant(2)
  ROOT %less = pred[] compare(%p, %two), direction=LT
}
ENTRY %main (p: bf16[500000]) -> bf16[4000000] {
  %outer = (bf16[500000]{0}, bf16[4000000]{0}) all-gather-start(%p), replica_groups=[1,8]<=[8]
  %loop = s32[] while(%p), condition=%condition, body=%body
  ROOT %last = bf16[4000000]{0} all-gather-done(%outer)
}
"""


@pytest.mark.parametrize(("share", "hidden"), [(1.0, 2.0), (1.25, 2.5), (2.0, 3.0)])
def test_exchanges_around_a_loop_have_the_time_that_those_in_it_leave(share, hidden):
  exchange = 7 / 8 * 2 * 4_000_000 / (2 * 45e9)
  cycles = round(share * exchange * TPUS["v5e"].clock_hz)
  module = hlo.Module(IN_A_LOOP.replace("WORK", str(cycles)))
  found = module.seconds(TPUS["v5e"], (2, 4), no_trips)
  assert found.hidden == pytest.approx(hidden * exchange, rel=1e-3)
  assert found.collectives == pytest.approx((3 - hidden) * exchange, rel=1e-3)


@pytest.mark.parametrize(
  ("line", "size"),
  [
    ("(bf16[10], bf16[80]) all-gather-start(%p), replica_groups=[1,8]<=[8]", 160),
    ("((bf16[10], f32[5]), (bf16[80], f32[40])) all-gather-start(%p), replica_groups=[1,8]", 320),
    ("(bf16[10], f32[5]) all-reduce-start(%p, %q), replica_groups=[1,8]<=[8]", 40),
    ("(bf16[10], bf16[10], u32[]) collective-permute-start(%p), source_target_pairs={{0,1}}", 20),
    ("((bf16[80]), bf16[10], u32[], u32[]) reduce-scatter-start(%p), replica_groups=[1,8]", 160),
    ("((bf16[80]), bf16[80]) all-to-all-start(%p), replica_groups=[1,8]<=[8]", 160),
    ("bf16[10] reduce-scatter(%p), replica_groups=[1,8]<=[8]", 160),
  ],
)
def test_bytes_of_an_exchange_are_those_of_the_whole_array(line, size):
  module = hlo.Module(f"ENTRY %main (p: bf16[10]) -> bf16[10] {{\n  %x = {line}\n}}")
  assert [one.bytes for _, _, one in module.exchanges(no_trips)] == [size]


BRANCHES = """
%branch (p: bf16[]) -> bf16[] {
  %work = bf16[] add(%p, %p), backend_config={"estimated_cycles":"1500"}
}
ENTRY %main (p: bf16[500000]) -> bf16[4000000] {
  %one = (bf16[500000]{0}, bf16[4000000]{0}) all-gather-start(%p), replica_groups=[1,8]<=[8]
  %a = bf16[] conditional(%p), branch_computations={%branch, %branch}
  %b = bf16[] conditional(%p), branch_computations={%branch, %branch}
  ROOT %done = bf16[4000000]{0} all-gather-done(%one)
}
"""


def test_a_branch_is_timed_each_time_it_runs():
  found = hlo.Module(BRANCHES).seconds(TPUS["v5e"], (2, 4), no_trips)
  assert found.compute == found.hidden == pytest.approx(2e-6)


FUSED = """
%fused (p: bf16[4000000]) -> bf16[500000] {
  %all = bf16[4000000] KIND(%p), replica_groups=[1,8]<=[8]
}
ENTRY %main (p: bf16[4000000]) -> bf16[500000] {
  ROOT %f = bf16[500000] fusion(%p), kind=kCustom, calls=%fused
}
"""


@pytest.mark.parametrize("kind", ["all-reduce", "all-gather"])
def test_only_a_fused_sum_is_scattered(kind):
  found = hlo.Module(FUSED.replace("KIND", kind)).seconds(TPUS["v5e"], (2, 4), no_trips)
  assert found.collectives == pytest.approx(7 / 8 * 8e6 / (2 * 45e9))


def test_the_state_of_a_pod_is_split():
  config = load_config(CONFIGS / "8b.py")
  mesh = make_mesh(config, Target.parse("v5e:16x16", 1).devices())
  state = train_state.abstract(config, optimizer.make(config.optimizer, 10), mesh)
  local = sum(
    np.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(state)
  )
  assert local <= 1.03 * 12 * parameter_count(config.model) / 256


def test_kernels_count_query_heads():
  """Eight rows, 32 query and 8 key heads, 1,024 tokens, width 128."""
  forward = "f32[8,512,128], bf16[8,32,1024,128]"
  backward = "f32[8,512,128], bf16[8,1,32,1024,128], bf16[8,8,1024,128], bf16[8,8,1024,128]"
  scores = 8 * 32 * 1024 * 1025 / 2
  for name, shape, products in (("splash_fwd", forward, 2), ("splash_dkv", backward, 5)):
    kernel = hlo.Operation(name, f"({shape})", "custom-call", "tpu_custom_call")
    assert hlo.kernel_flops(kernel) == products * 2 * 128 * scores
    one = dataclasses.replace(kernel, shape="(f32[1024,128]{1,0}, bf16[32,1024,128]{2,1,0})")
    assert hlo.kernel_flops(one) == products * 2 * 128 * scores / 8


@pytest.mark.parametrize(
  ("name", "torus", "group", "links"),
  [
    ("v5p", (4, 4, 4), 16, 4),
    ("v5p", (4, 4, 4), 64, 6),
    ("v5e", (16, 16), 256, 4),
    ("v5e", (16, 16), 64, 3),
    ("v5e", (16, 16), 4, 1),
    ("v5e", (4, 4), 16, 2),
  ],
)
def test_only_whole_closed_axes_count_twice(name, torus, group, links):
  assert TPUS[name].links(torus, group) == links


def test_teachers_are_not_estimated():
  config = from_mapping(config_dict(**{"kd.teacher": "stored"}))
  with pytest.raises(ConfigError, match=r"kd\.teacher: a teacher is not part"):
    estimate_step(config, Target.parse("v5e:2x4", 1), Step("retrieval", 0))


def test_a_sweep_goes_from_axis_to_axis(monkeypatch):
  """Of made-up costs: 4 copies are best, then everything kept, then twice the block."""
  asked = []

  def estimate(config, target, step):
    asked.append(config)
    kept, block = config.data.kept_tokens, config.data.micro_batch
    fits = config.model.remat != "products"  # which would be the fastest
    seconds = 2.0 - (config.mesh.data == 4) - 0.5 * bool(kept) - 1e-9 * block
    return types.SimpleNamespace(
      fits=fits, estimated_step_seconds=seconds, hbm_bytes_per_device=10**10, config=config
    )

  monkeypatch.setattr(sweep, "estimate_step", estimate)
  monkeypatch.setattr(sweep, "line", lambda _: "")
  config = load_config(CONFIGS / "8b.py", **{"data.lengths": (1024,)})
  found = sweep.sweep_settings(config, Target.parse("v5e:8x8", 1), Step("", 256))
  assert len(asked) == len(set(asked)) == len(found)
  assert not found[-1].fits and found[0].config.model.remat == "full"
  best = found[0].config
  assert best.mesh.data == 4 and best.data.kept_tokens == best.data.micro_batch == 512 * 11 * 1024


@pytest.mark.parametrize(
  ("field", "value", "message"),
  [("kd.teacher", "stored", r"kd\.teacher: a teacher is not part"), ("mesh.tensor", 3, "mesh: ")],
)
def test_a_sweep_without_an_estimate_says_why(field, value, message):
  config = from_mapping(config_dict(**{field: value}))
  with pytest.raises(ConfigError, match=message):
    sweep.sweep_settings(config, Target.parse("v5e:2x4", 1), Step("", 0))
