"""Settings of memory and mesh compared for one topology: what fits, the fastest first."""

import dataclasses
import itertools
import math
import sys
from collections.abc import Iterator, Sequence

from mlembed_jax import pod
from mlembed_jax.config_fields import Config, ConfigError

REMAT = ("full", "context", "products")
BLOCKS = (2048, 8192)  # tokens of a block on each chip


def run(config: Config, target: pod.Target, step: pod.Step) -> list[pod.Estimate]:
  """Returns the estimates of all settings, the fastest first, those that do not fit last.

  One compilation each, of a minute to several; progress goes to stderr.
  """
  found = []
  for one in candidates(config, math.prod(target.torus) * target.slices):
    try:
      found.append(pod.estimate(one, target, step))
    except ConfigError as error:
      print(f"left out: {error}", file=sys.stderr, flush=True)
      continue
    print(line(found[-1]), file=sys.stderr, flush=True)
  return sorted(found, key=lambda e: (not e.fits, e.estimated_step_seconds))


def candidates(config: Config, devices: int) -> Iterator[Config]:
  """Yields configurations: mesh shapes with all others at their smallest, then the rest.

  The widest split of parameters and, from 64 chips on, a quarter of it: on a torus of three axes
  XLA sums full arrays instead of gathering parts where one group takes all of them.
  """
  for copies, remat, tokens in itertools.product((1, 4) if devices >= 64 else (1,), REMAT, BLOCKS):
    size = max(tokens, config.data.lengths[-1]) * devices
    for kept in (0, 4 * size):
      yield dataclasses.replace(
        config,
        mesh=dataclasses.replace(config.mesh, data=copies, fsdp=-1),
        model=dataclasses.replace(config.model, remat=remat),
        data=dataclasses.replace(config.data, micro_batch=size, kept_tokens=kept),
      )


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
