"""The micro-batch: how many tokens fit the devices at a time, by the compiler's own account."""

import dataclasses
import functools
import math
import os
import pathlib
from collections.abc import Callable, Sequence

import jax
from jax.sharding import Mesh

from mlembed_jax import progress
from mlembed_jax.batch import Kind
from mlembed_jax.config_fields import Config
from mlembed_jax.devices import tpu
from mlembed_jax.errors import ConfigError
from mlembed_jax.files import readable_size
from mlembed_jax.parallel import processes
from mlembed_jax.parallel.sharding import batch_shards, smallest_micro_batch
from mlembed_jax.training import lowering
from mlembed_jax.training.teacher import Teacher

# A step may take this share of a device's memory; the rest is for batches on their way, and for
# fragmentation.
USABLE = 0.9
PADDING = 0.02  # this share of a step's tokens may be padding of last blocks
# Tokens on a device whose products take as long as gathering their weights, where its links are not
# known: H100s over NVLink, 989e12 FLOPs / 450e9 bytes per second. Over a slower network between
# machines it would be more.
GATHER_TOKENS = 2200
CGROUP = pathlib.Path("/sys/fs/cgroup/memory.max")


def device_bytes() -> int:
  """Returns the bytes that one step may take on each device of this process."""
  device = jax.local_devices()[0]
  stats = device.memory_stats() if device.platform != "cpu" else None
  if stats:
    return int(USABLE * stats["bytes_limit"])
  total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
  if CGROUP.is_file() and (limit := CGROUP.read_text().strip()).isdigit():
    total = min(total, int(limit))
  return int(USABLE * total) // jax.local_device_count()


def gather_tokens(mesh: Mesh) -> float:
  """Returns the tokens on a device whose products take as long as gathering their weights.

  0 where every device holds all weights, and on CPU.
  """
  device, group = mesh.devices.flat[0], mesh.shape["fsdp"]
  if group == 1 or device.platform == "cpu":
    return 0.0
  if found := tpu.find_tpu(device.device_kind):
    return found.gather_tokens(tpu.torus([d.coords for d in mesh.devices.flat]), group)
  return GATHER_TOKENS


def sizes(config: Config, tokens_per_step: float, mesh: Mesh) -> list[int]:
  """Returns the micro-batches to choose from, ascending: 1, 2, 3, 4, 6, 8, 12, ... smallest ones.

  A step pads the last block of each width, by half of it on average. Blocks of T tokens on a device
  may make this the share PADDING of its S tokens; where weights are gathered once per block, which
  costs about h/2T of the time (h: `gather_tokens`), T/2S + h/2T is smallest at T = sqrt(hS)
  (or S, if that is less).
  """
  smallest, shards = smallest_micro_batch(config, mesh.shape), batch_shards(mesh.shape)
  tokens = tokens_per_step / shards / len(config.data.lengths)
  gathered = min(tokens, math.sqrt(gather_tokens(mesh) * tokens))
  largest = shards * max(2 * PADDING * tokens, gathered)
  times = sorted({1, *(n * 2**i for n in (2, 3) for i in range(60))})
  return [smallest * n for n in times if n == 1 or smallest * n <= largest]


def _fits(needed: int | None, available: int) -> bool:
  return needed is not None and needed <= available


def largest_micro_batch(
  sizes: list[int], needed: Callable[[int], int | None], available: int
) -> int:
  """Returns the largest of `sizes` (ascending) that fits; `needed` compiles, so few are tried.

  `needed` may return None where the compiler itself gives up.

  Raises:
    ConfigError: even the smallest does not fit.
  """

  def fits(size: int) -> bool:
    return _fits(needed(size), available)

  if fits(sizes[-1]):
    return sizes[-1]
  low, high = 0, len(sizes) - 1  # sizes[high] does not fit
  if high == 0 or not fits(sizes[0]):
    raise ConfigError(
      f"data.micro_batch: not even {sizes[0]:,} tokens at a time fit {readable_size(available)} "
      "per device; use more devices, mesh.tensor, less data.kept_tokens, a model.remat that keeps "
      "less, shorter data.lengths or fewer negatives"
    )
  while high - low > 1:
    middle = (low + high) // 2
    low, high = (middle, high) if fits(sizes[middle]) else (low, middle)
  return sizes[low]


def with_micro_batch(
  config: Config,
  chosen: int,
  kinds: Sequence[Kind],
  tokens_per_step: float,
  steps: int,
  mesh: Mesh,
  teacher: Teacher | None,
) -> Config:
  """Returns the configuration with `data.micro_batch` chosen where it is 0.

  The choice is the largest of `sizes` with which every kind of batch fits.

  Args:
    config: of the run.
    chosen: tokens that the continued run chose, 0 for a new run; the choice stays while it fits and
      the mesh can split it.
    kinds: kinds of batches of the run.
    tokens_per_step: tokens of a step on average, over all devices.
    steps: updates of the run.
    mesh: devices that share a step.
    teacher: online teacher, whose weights need memory too.

  Raises:
    ConfigError: not even one sheet per device fits, or what the configuration gives does not.
  """
  given = config.data.micro_batch
  if not given and chosen >= smallest_micro_batch(config, mesh.shape):
    given = chosen
  if given and not has_own_memory(mesh):
    return sized(config, given)
  # All processes must compile the same programs, and choose the same.
  available, kind = min(processes.gather(device_bytes())), widest(config, kinds)

  @functools.cache
  def needed(size: int) -> int | None:
    what = f"compiling a step of {size:,} tokens at a time, to see its memory"
    with processes.agreed(), progress.clocked(what, shown=processes.is_first()):
      own = lowering.step_bytes(sized(config, size), kind, steps, mesh, teacher)
    found = processes.gather(own)
    return None if None in found else max(found)

  # The margin is for a new choice; what a run began with may use all there is.
  size = given if given and _fits(needed(given), int(available / USABLE)) else 0
  if config.data.micro_batch and not size:
    raise _too_large(config, needed(given), int(available / USABLE))
  if given and not size:
    print(f"data.micro_batch: {given:,} of the checkpoint do not fit any more", flush=True)
  size = size or largest_micro_batch(sizes(config, tokens_per_step, mesh), needed, available)
  print(
    f"data.micro_batch: {size:,} tokens at a time, with which a step takes "
    f"{readable_size(needed(size) or 0)} per device; {readable_size(available)} are for it",
    flush=True,
  )
  return sized(config, size)


def has_own_memory(mesh: Mesh) -> bool:
  """Returns whether a device's memory is a limit of its own, worth a compilation to check.

  A CPU swaps, and keeps no compiled programs: each would be compiled again when it runs.
  """
  return mesh.devices.flat[0].platform != "cpu"


def _too_large(config: Config, needed: int | None, available: int) -> ConfigError:
  found = readable_size(needed) if needed else "more memory than the compiler finds"
  return ConfigError(
    f"data.micro_batch: with {config.data.micro_batch:,} tokens at a time and data.kept_tokens = "
    f"{config.data.kept_tokens:,} a step takes {found} per device, which has "
    f"{readable_size(available)}; make one of them smaller (data.micro_batch = 0: "
    "chosen), or let model.remat keep less"
  )


def sized(config: Config, micro_batch: int) -> Config:
  """Returns `config` with this `data.micro_batch`."""
  return dataclasses.replace(config, data=dataclasses.replace(config.data, micro_batch=micro_batch))


def widest(config: Config, kinds: Sequence[Kind]) -> Kind:
  """Returns a kind of batch that needs as much memory as any of `kinds`.

  Of those with most texts per row the one with most beside them (other rows, both directions, a
  teacher's vectors), with the longest texts of all kinds.
  """

  def demand(kind: Kind) -> tuple[int, bool, bool, int]:
    task = config.losses.task(kind.task_type)
    width = kind.vectors[1] if kind.vectors else 0
    return kind.texts, bool(task and task.inbatch), bool(task and task.symmetric), width

  longest = max(kind.longest for kind in kinds)
  return dataclasses.replace(max(kinds, key=demand), longest=longest)
