"""Settings of mesh and memory compared for one topology: what fits, the fastest first."""

import dataclasses
import sys
from collections.abc import Iterator, Sequence

from mlembed_jax.config_fields import Config
from mlembed_jax.errors import ConfigError
from mlembed_jax.estimate.estimate import Estimate, Step, Target, estimate_step, gib
from mlembed_jax.parallel.sharding import make_mesh, smallest_micro_batch
from mlembed_jax.training import micro_batch

COPIES = (1, 4, 16)  # each slice is tried with so many copies of the parameters
REMAT = ("full", "context", "products")
HEAD = """\
| mesh | model.remat | data.micro_batch | data.kept_tokens | GiB | free | step | MFU |
| --- | --- | --- | --- | --- | --- | --- | --- |"""


def sweep_settings(config: Config, target: Target, step: Step) -> list[Estimate]:
  """Returns the estimates of all settings tried, the fastest first, those that do not fit last.

  One axis after another, each from the best found before: the mesh, how many tokens keep how much,
  the tokens encoded at a time. A compilation each, of a minute to several; progress goes to stderr.

  Raises:
    ConfigError: no setting can be estimated.
  """
  search = _Search(target, step)
  print(HEAD, file=sys.stderr, flush=True)
  for axis in (_meshes, _kept, _blocks):
    config = min(axis(config, target, step), key=search.cost)
  if not search.found:
    raise search.errors[config]
  return sorted(search.found.values(), key=_order)


class _Search:
  """Estimates every configuration once."""

  def __init__(self, target: Target, step: Step):
    self.target, self.step = target, step
    self.found: dict[Config, Estimate] = {}
    self.errors: dict[Config, ConfigError] = {}

  def cost(self, config: Config) -> tuple[bool, float]:
    """Returns the sort key of a configuration, the best first."""
    if config not in self.found and config not in self.errors:
      self._estimate(config)
    return _order(self.found[config]) if config in self.found else (True, float("inf"))

  def _estimate(self, config: Config) -> None:
    try:
      self.found[config] = estimate_step(config, self.target, self.step)
    except ConfigError as error:
      self.errors[config] = error
      print(f"left out: {error}", file=sys.stderr, flush=True)
    else:
      print(line(self.found[config]), file=sys.stderr, flush=True)


def _order(e: Estimate) -> tuple[bool, float]:
  """Returns (it does not fit, seconds or bytes)."""
  return not e.fits, e.estimated_step_seconds if e.fits else e.hbm_bytes_per_device


def _meshes(config: Config, target: Target, step: Step) -> Iterator[Config]:
  """Yields meshes that split the parameters over a slice, or over a part of it and copy them.

  On a torus of three axes XLA sums full arrays instead of gathering parts where one group takes
  all of them.
  """
  chips = len(target.devices()) // target.slices
  for copies in sorted({*COPIES, max(1, config.mesh.data // target.slices)}):
    if copies == 1 or chips % (copies * config.mesh.tensor) == 0:
      mesh = dataclasses.replace(config.mesh, data=copies * target.slices, fsdp=-1)
      changed = dataclasses.replace(config, mesh=mesh)
      chosen = config.data.micro_batch or _sizes(changed, target, step)[-1]
      yield micro_batch.sized(changed, chosen)


def _sizes(config: Config, target: Target, step: Step) -> list[int]:
  tokens = config.data.global_batch * step.kind(config).texts * step.tokens(config)
  return micro_batch.sizes(config, tokens, make_mesh(config, target.devices()))


def _blocks(config: Config, target: Target, step: Step) -> Iterator[Config]:
  """Yields half of the micro-batch, the same, twice as many tokens, and all of the step."""
  smallest = smallest_micro_batch(config, make_mesh(config, target.devices()).shape)
  texts = config.data.global_batch * step.kind(config).texts
  whole, chosen = texts * config.data.lengths[-1], config.data.micro_batch
  for size in sorted({max(smallest, chosen // 2), chosen, min(whole, 2 * chosen), whole}):
    yield micro_batch.sized(config, size)


def _kept(config: Config, _: Target, step: Step) -> Iterator[Config]:
  """Yields the remat policies, with no block or every block kept between the passes."""
  everything = config.data.global_batch * step.kind(config).texts * config.data.lengths[-1]
  for tokens in (0, everything):
    data = dataclasses.replace(config.data, kept_tokens=tokens)
    for remat in REMAT:
      model = dataclasses.replace(config.model, remat=remat)
      yield dataclasses.replace(config, data=data, model=model)


def line(e: Estimate) -> str:
  """Returns one setting as a row of a Markdown table."""
  time = f"{1e3 * e.estimated_step_seconds:,.0f} ms | {e.estimated_mfu:.3f}" if e.fits else "- | -"
  return (
    f"| {e.mesh} | {e.remat} | {e.micro_batch:,} | {e.kept_tokens:,} | "
    f"{gib(e.hbm_bytes_per_device)} | {e.free:.0%} | {time} |"
  )


def sweep_table(found: Sequence[Estimate]) -> str:
  """Returns all settings as a Markdown table."""
  return "\n".join([HEAD, *map(line, found)])
