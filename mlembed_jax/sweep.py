"""Settings of mesh and memory compared for one topology: what fits, the fastest first."""

import dataclasses
import sys
from collections.abc import Callable, Iterator, Sequence

from mlembed_jax import memory, pod
from mlembed_jax.config_fields import Config, ConfigError
from mlembed_jax.sharding import make_mesh, replicas, smallest_micro_batch

COPIES = (1, 4, 16)  # of the parameters, on each slice
REMAT = ("full", "context", "products")


def run(config: Config, target: pod.Target, step: pod.Step) -> list[pod.Estimate]:
  """Returns the estimates of all settings tried, the fastest first, those that do not fit last.

  One axis after another, each from the best found before: the mesh, the tokens encoded at a time,
  how many of them keep how much. A compilation each, of a minute to several; progress goes to
  stderr.
  """
  search = _Search(target, step)
  for axis in (_meshes, _blocks, _kept):
    config = min(axis(config, target, step), key=search.cost)
  return sorted(search.found.values(), key=_order)


class _Search:
  """Estimates every configuration once."""

  def __init__(self, target: pod.Target, step: pod.Step):
    self.target, self.step = target, step
    self.found: dict[Config, pod.Estimate] = {}
    self.left_out: set[Config] = set()

  def cost(self, config: Config) -> tuple[bool, float]:
    """Returns what orders settings."""
    if config not in self.found and config not in self.left_out:
      self._estimate(config)
    return _order(self.found[config]) if config in self.found else (True, float("inf"))

  def _estimate(self, config: Config) -> None:
    try:
      self.found[config] = pod.estimate(config, self.target, self.step)
    except ConfigError as error:
      self.left_out.add(config)
      print(f"left out: {error}", file=sys.stderr, flush=True)
    else:
      print(line(self.found[config]), file=sys.stderr, flush=True)


def _order(e: pod.Estimate) -> tuple[bool, float]:
  """Returns (it does not fit, seconds or bytes)."""
  return not e.fits, e.estimated_step_seconds if e.fits else e.hbm_bytes_per_device


Axis = Callable[[Config, pod.Target, pod.Step], Iterator[Config]]


def _meshes(config: Config, target: pod.Target, _: pod.Step) -> Iterator[Config]:
  """Yields the meshes that split parameters over a slice, or over a part of it and copy them.

  On a torus of three axes XLA sums full arrays instead of gathering parts where one group takes
  all of them.
  """
  chips = len(target.devices()) // target.slices
  for copies in COPIES:
    if copies == 1 or chips >= 16 * copies:
      mesh = dataclasses.replace(config.mesh, data=copies * target.slices, fsdp=-1)
      yield dataclasses.replace(config, mesh=mesh)


def _blocks(config: Config, target: pod.Target, step: pod.Step) -> Iterator[Config]:
  """Yields the micro-batch that training chooses, half of it, twice, and the step at once."""
  mesh, kind = make_mesh(config, target.devices()), step.kind(config)
  smallest, parts = smallest_micro_batch(config, mesh.shape), replicas(mesh.shape)
  tokens = config.data.global_batch * kind.texts * step.tokens(config)
  chosen = config.data.micro_batch or memory.sizes(config, tokens, mesh)[-1]
  whole = config.data.global_batch // parts * kind.texts * config.data.lengths[-1] * parts
  for size in sorted({max(smallest, chosen // 2), chosen, min(whole, 2 * chosen), whole}):
    yield memory.sized(config, size)


def _kept(config: Config, _: pod.Target, step: pod.Step) -> Iterator[Config]:
  """Yields what is computed again, with nothing kept between the passes or everything."""
  everything = config.data.global_batch * step.kind(config).texts * config.data.lengths[-1]
  for tokens in (0, max(everything, config.data.micro_batch)):
    data = dataclasses.replace(config.data, kept_tokens=tokens)
    for remat in REMAT:
      model = dataclasses.replace(config.model, remat=remat)
      yield dataclasses.replace(config, data=data, model=model)


def line(e: pod.Estimate) -> str:
  """Returns one setting as a row of a Markdown table."""
  time = f"{1e3 * e.estimated_step_seconds:,.0f} ms | {e.estimated_mfu:.3f}" if e.fits else "- | -"
  return (
    f"| {e.mesh} | {e.remat} | {e.micro_batch:,} | {e.kept_tokens:,} | "
    f"{pod.gib(e.hbm_bytes_per_device)} | {e.free:.0%} | {time} |"
  )


def table(found: Sequence[pod.Estimate]) -> str:
  """Returns all settings as a Markdown table."""
  head = "| mesh | model.remat | data.micro_batch | data.kept_tokens | GiB | free | step | MFU |"
  return "\n".join([head, "|" + " --- |" * 8, *map(line, found)])
