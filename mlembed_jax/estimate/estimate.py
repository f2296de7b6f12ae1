"""The update compiled for a TPU topology: its memory, its time, its exchanges between chips."""

import collections
import dataclasses
import importlib.util
import math
import os
import re
import time
from typing import Any

import flax.linen as nn
import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from mlembed_jax.batch import Kind
from mlembed_jax.config_fields import Config
from mlembed_jax.data import packing
from mlembed_jax.devices.tpu import TPUS, Tpu
from mlembed_jax.errors import ConfigError, HloError
from mlembed_jax.estimate import hlo
from mlembed_jax.models import flops
from mlembed_jax.parallel.sharding import batch_shards, logical_rules, make_mesh
from mlembed_jax.training import frozen, lowering, micro_batch, optimizer, train_state, train_step
from mlembed_jax.training.gradcache import BLOCKS

# The step belongs to a run of so many updates. The schedule holds it as one number, so any will do.
RUN_STEPS = 1000


def gib(size: float) -> str:
  """Returns bytes in GiB."""
  return f"{size / 2**30:.2f}"


@dataclasses.dataclass(frozen=True)
class Target:
  """The TPU slices that a step is compiled for."""

  name: str
  tpu: Tpu
  torus: tuple[int, ...]
  slices: int

  @classmethod
  def parse(cls, name: str, slices: int) -> "Target":
    """Returns the target of a name such as v5p:4x4x4; ConfigError with the known ones."""
    generation, _, shape = name.partition(":")
    tpu = TPUS.get(generation)
    axes = tuple(int(n) for n in shape.split("x")) if re.fullmatch(r"\d+(x\d+)+", shape) else ()
    if tpu and tpu.not_estimated:
      raise ConfigError(f"--topology: {generation} has no estimate, as {tpu.not_estimated}")
    if tpu is None or len(axes) != len(tpu.largest) or not all(axes):
      estimated = {k: t.largest for k, t in TPUS.items() if not t.not_estimated}
      known = ", ".join(f"{k}:{'x'.join('ABC'[: len(axes)])}" for k, axes in estimated.items())
      raise ConfigError(
        f"--topology: {name!r} is none that is known: {known}, with chips along each axis of the "
        "torus, e.g. v5e:16x16, v5p:4x4x4"
      )
    if any(n > most for n, most in zip(sorted(axes), sorted(tpu.largest), strict=True)):
      largest = "x".join(map(str, tpu.largest))
      raise ConfigError(
        f"--topology: {name} is larger than a {generation} pod, {generation}:{largest}"
      )
    if slices < 1:
      raise ConfigError(f"--slices: {slices} is not positive")
    return cls(name, tpu, axes, slices)

  def devices(self) -> Any:
    """Returns the chips, none of which is here; ConfigError without the compiler."""
    if not importlib.util.find_spec("libtpu"):
      raise ConfigError('the compiler for TPUs is missing; pip install -e ".[tpu]"')
    # Without a TPU the library would wait for the metadata server of Google's cloud.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    # With these two it does not warn that it found no TPU.
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
    # One process at a time may hold a TPU; there is none to hold.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    options: dict[str, Any] = {"num_slices": self.slices} if self.slices > 1 else {}
    options["chip_config_name"] = self.tpu.chip_config
    try:
      found = topologies.get_topology_desc(self.name, "tpu", **options)
    except (RuntimeError, NotImplementedError) as error:
      raise ConfigError(
        f"--topology: {self.name} has no hardware; axes are multiples of 2, as hosts hold 2 x 2 "
        f"chips: {str(error).splitlines()[0]}"
      ) from error
    return found.devices


@dataclasses.dataclass(frozen=True)
class Step:
  """Which step is estimated."""

  task: str  # "": the one whose batches need most memory
  text_tokens: int  # of every text; 0: as many as fit

  def kind(self, config: Config) -> Kind:
    """Returns what decides the shapes of the batch; ConfigError for an unknown task type."""
    tasks, longest = config.losses.contrastive_tasks(), config.data.lengths[-1]
    if self.task not in ("", *tasks):
      known = ", ".join(tasks)
      raise ConfigError(f"--task: {self.task!r} is not one of those that are estimated: {known}")
    kinds = {name: Kind(name, 1, task.negatives, longest, None) for name, task in tasks.items()}
    return kinds[self.task] if self.task else micro_batch.widest(config, list(kinds.values()))

  def tokens(self, config: Config) -> int:
    """Returns the tokens of each text; ConfigError if none can have so many."""
    longest = config.data.lengths[-1]
    if not 0 <= self.text_tokens <= longest:
      raise ConfigError(
        f"--text_tokens: {self.text_tokens} is not between 1 and {longest}, the longest of "
        "data.lengths; 0 is that, too"
      )
    return self.text_tokens or longest


@dataclasses.dataclass(frozen=True)
class Estimate:
  """What a compiled update needs; bytes are those of one chip."""

  topology: str
  devices: int
  mesh: str
  batch_shards: int
  remat: str
  micro_batch: int
  kept_tokens: int
  task: str
  hbm_bytes_per_device: int
  hbm_capacity: int
  hbm_by_kind: dict[str, int]
  fits: bool
  sequences: int
  text_tokens: int
  model_flops_per_step: float
  estimated_step_seconds: float
  seconds_by_kind: dict[str, float]
  estimated_mfu: float
  tokens_per_second_per_chip: float
  sequences_per_second_per_chip: float
  collectives: list[dict[str, Any]]
  compile_seconds: float

  @property
  def block(self) -> int:
    """Tokens encoded at a time on a chip, or on the chips of `mesh.tensor` together."""
    return self.micro_batch // self.batch_shards

  @property
  def free(self) -> float:
    """The share of the memory that is left."""
    return 1 - self.hbm_bytes_per_device / self.hbm_capacity


def estimate_step(config: Config, target: Target, step: Step) -> Estimate:
  """Returns what the update of a step needs on the chips of `target`.

  Where `data.micro_batch` is 0, with the largest one that training would try and that fits.

  Raises:
    ConfigError: the configuration cannot be laid over the chips, or asks for something they lack.
  """
  if config.kd.teacher:
    raise ConfigError("kd.teacher: a teacher is not part of the estimate; set it to ''")
  kind, length = step.kind(config), step.tokens(config)
  mesh = make_mesh(config, target.devices())
  lowering.check_attention(config, "tpu")
  tokens = config.data.global_batch * kind.texts * length
  given = config.data.micro_batch
  sizes = [given] if given else micro_batch.sizes(config, tokens, mesh)
  while True:
    sized = micro_batch.sized(config, sizes.pop())
    case = _Case(sized, target, mesh, kind, length)
    found = _estimate(case, _compile(case))
    if found.fits or not sizes:
      return found


@dataclasses.dataclass(frozen=True)
class _Case:
  """One update to compile."""

  config: Config
  target: Target
  mesh: Mesh
  kind: Kind
  length: int  # tokens of every text

  @property
  def batch_shards(self) -> int:
    return batch_shards(self.mesh.shape)


@dataclasses.dataclass(frozen=True)
class _Account:
  """What the compiler says of an update; of one that it gave up, the memory alone."""

  by_kind: dict[str, int]  # bytes of one chip by what they hold
  spent: hlo.Seconds = dataclasses.field(default_factory=hlo.Seconds)
  collectives: list[dict[str, Any]] = dataclasses.field(default_factory=list)
  seconds: float = 0.0  # how long compiling took


def _compile(case: _Case) -> _Account:
  with jax.set_mesh(case.mesh), nn.logical_axis_rules(logical_rules()):
    started = time.perf_counter()
    lowered = lowering.lowered_step(case.config, case.kind, RUN_STEPS, case.mesh)
    try:
      compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
      return _Account({"all": _refused_bytes(str(error))})
    seconds = time.perf_counter() - started
    by_kind = _memory(case, compiled)
  module = hlo.Module(compiled.as_text())
  trips = _Trips(lowering.kind_layout(case.config, case.kind, case.batch_shards), case.length)
  spent = module.seconds(case.target.tpu, case.target.torus, trips)
  return _Account(by_kind, spent, _listed(module, trips), seconds)


def _estimate(case: _Case, account: _Account) -> Estimate:
  config, target, mesh, length = case.config, case.target, case.mesh, case.length
  needed, capacity = sum(account.by_kind.values()), target.tpu.hbm_bytes
  texts = config.data.global_batch * case.kind.texts
  work = flops.step_flops(
    config.model,
    texts * length,
    texts * length * (length + 1),
    frozen.skipped_products(config),
  )
  total = account.spent.total
  rate = 1 / total / mesh.size if total else 0.0
  return Estimate(
    topology=target.name + (f" x {target.slices}" if target.slices > 1 else ""),
    devices=mesh.size,
    mesh=" x ".join(f"{axis} {size}" for axis, size in mesh.shape.items()),
    batch_shards=case.batch_shards,
    remat=config.model.remat,
    micro_batch=config.data.micro_batch,
    kept_tokens=config.data.kept_tokens,
    task=case.kind.task_type,
    hbm_bytes_per_device=needed,
    hbm_capacity=capacity,
    hbm_by_kind=account.by_kind,
    fits=needed <= micro_batch.USABLE * capacity and total > 0,
    sequences=texts,
    text_tokens=length,
    model_flops_per_step=work,
    estimated_step_seconds=total,
    seconds_by_kind=dataclasses.asdict(account.spent),
    estimated_mfu=work * rate / target.tpu.peak_flops,
    tokens_per_second_per_chip=texts * length * rate,
    sequences_per_second_per_chip=texts * rate,
    collectives=account.collectives,
    compile_seconds=account.seconds,
  )


def _refused_bytes(message: str) -> int:
  """Returns what a program needs that the compiler gave up for its memory."""
  if lowering.VMEM in message:
    raise ConfigError(f"the compiler finds no room for the tiles of an operation: {message[:2000]}")
  used = re.search(r"(?:[Uu]sed |temporaries \()([\d.]+)([GM])", message)
  if not used:
    raise ConfigError(f"the compiler refuses the update: {message[:2000]}")
  return int(float(used.group(1)) * 2 ** (30 if used.group(2) == "G" else 20))


def _memory(case: _Case, compiled: Any) -> dict[str, int]:
  """Returns the bytes of one chip by what they hold."""
  config, shards = case.config, case.batch_shards
  state = train_state.abstract(config, optimizer.make(config.optimizer, RUN_STEPS), case.mesh)
  batch = lowering.batch_shapes(config, case.kind, shards)

  def held(tree: Any) -> int:
    return sum(
      math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    )

  frozen_params = frozen.abstract(config, case.mesh)
  parameters, moments = held((state.params, frozen_params)), held(state.opt_state)
  temporary = compiled.memory_analysis().temp_size_in_bytes
  kept = train_step.kept_bytes(config, state.params, frozen_params, batch.sheets) // shards
  return {
    "parameters": parameters,
    "optimizer": moments,
    "batch and code": lowering.needed_bytes(compiled) - temporary - parameters - moments,
    "kept activations": kept,
    "temporaries": temporary - kept,
  }


class _Trips:
  """Says how often the loops over blocks run for texts of equal length."""

  def __init__(self, layout: packing.Layout, length: int):
    self.blocks = {}
    for i, width in enumerate(layout.widths):
      below = layout.widths[i - 1] if i else 0
      per_sheet = min(width // length, layout.slots(width)) if layout.packed else 1
      sheets = math.ceil(layout.texts / per_sheet) if below < length <= width else 0
      self.blocks[width] = math.ceil(sheets * layout.batch_shards / layout.sheets[i])

  def __call__(self, scope: str) -> float:
    found = re.findall(rf"{BLOCKS}(\d+)_(\d+)_(\d+)", scope)
    if not found:
      raise HloError(f"a loop of unknown length: {scope}")
    width, start, end = map(int, found[-1])
    return max(0, min(self.blocks[width], end) - start)


def _listed(module: hlo.Module, trips: Any) -> list[dict[str, Any]]:
  """Returns the exchanges of a step, those that move most first."""
  counted: dict[tuple[str, str, int, int], float] = collections.defaultdict(float)
  for scope, times, one in module.exchanges(trips):
    counted[scope, one.opcode, one.bytes, one.group] += times
  largest = sorted(counted.items(), key=lambda item: -item[0][2] * item[1])
  return [
    {"kind": opcode, "bytes": size, "group": group, "count": count, "scope": scope}
    for (scope, opcode, size, group), count in largest
  ]
