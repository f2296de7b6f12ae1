"""Compiles a run's update for a TPU topology that is not here, and says what it needs.

  python -m mlembed_jax.aot --config configs/8b.py:v5p --topology v5p:4x4x4

Needs the package `libtpu` (`pip install -e ".[tpu]"`), whose compiler runs on any machine. Memory
is the compiler's account. Time is an estimate: hlo.py says from what.
"""

import dataclasses
import json
import sys

import jax
from absl import flags
from ml_collections import config_flags

from mlembed_jax import cli
from mlembed_jax.estimate import pod, sweep
from mlembed_jax.estimate.pod import Estimate
from mlembed_jax.training import memory

CONFIG = config_flags.DEFINE_config_file(
  "config", None, "Configuration file, FILE[:variant], as of mlembed_jax.train."
)
TOPOLOGY = flags.DEFINE_string("topology", None, "Chips, e.g. v5e:16x16, v5p:4x4x4, v6e:16x16.")
SLICES = flags.DEFINE_integer("slices", 1, "How many of them, joined by the data-centre network.")
TASK = flags.DEFINE_string(
  "task", "", "Task type whose batches are compiled; empty: the one that needs most memory."
)
TEXT_TOKENS = flags.DEFINE_integer(
  "text_tokens",
  0,
  "Tokens of each text of the estimated step; 0: as many as data.lengths allows, the longest step "
  "there is. Training chooses data.micro_batch by their mean.",
)
JSON = flags.DEFINE_bool("json", False, "Print one JSON object instead of a text.")
SWEEP = flags.DEFINE_bool(
  "sweep", False, "Try mesh shapes, remat policies and micro-batches, and print those that fit."
)


def text(estimate: Estimate) -> str:
  """Returns the report."""
  e = estimate
  used, there = pod.gib(e.hbm_bytes_per_device), pod.gib(e.hbm_capacity)
  kinds = ", ".join(f"{name} {pod.gib(size)}" for name, size in e.hbm_by_kind.items())
  return f"""\
{e.topology}: {e.devices} chips, mesh {e.mesh}, model.remat {e.remat}
data.micro_batch {e.micro_batch:,} ({e.block:,} on each part of the batch), \
data.kept_tokens {e.kept_tokens:,}
memory per chip: {used} of {there} GiB ({e.free:.0%} free):
  {kinds}
step of {e.sequences:,} texts of {e.text_tokens:,} tokens ({e.task}): \
{e.model_flops_per_step / 1e15:,.3g} PFLOP
{_speed(e) if e.estimated_step_seconds else "estimated: nothing, as the compiler gave up"}"""


def _speed(e: Estimate) -> str:
  parts = ", ".join(f"{name} {1e3 * s:,.0f}" for name, s in e.seconds_by_kind.items())
  slower = 1 + e.seconds_by_kind["attention"] / e.estimated_step_seconds
  exchanges = "\n".join(
    f"  {x['count']:,.0f} x {x['kind']} of {x['bytes'] / 2**20:,.3g} among {x['group']}, "
    f"{x['scope']}"
    for x in e.collectives[:12]
  )
  left_out = ", without the network between slices" if " x " in e.topology else ""
  return f"""\
estimated{left_out}: {1e3 * e.estimated_step_seconds:,.0f} ms ({parts}), MFU {e.estimated_mfu:.3f} \
({e.estimated_mfu / slower:.3f} if attention takes twice as long), \
{e.tokens_per_second_per_chip:,.0f} tokens and {e.sequences_per_second_per_chip:,.1f} texts per \
second and chip
collectives, the largest first (MiB of the whole array):
{exchanges}
compiled in {e.compile_seconds:.0f} s"""


def main() -> None:
  """Reads the flags; ends with status 1 where the configuration does not fit."""
  config = cli.read_config(CONFIG, {"data.builder": "", "data.dataset": "nothing is read"})
  target = pod.Target.parse(str(TOPOLOGY.value), SLICES.value)
  step = pod.Step(TASK.value, TEXT_TOKENS.value)
  if SWEEP.value:
    found = sweep.run(config, target, step)
    print(json.dumps([dataclasses.asdict(e) for e in found]) if JSON.value else sweep.table(found))
    fits = found[0].fits
    sys.exit(None if fits else "error: no setting that was tried fits; use more chips")
  estimate = pod.estimate(config, target, step)
  print(json.dumps(dataclasses.asdict(estimate)) if JSON.value else text(estimate))
  if not estimate.fits:
    needed, there = pod.gib(estimate.hbm_bytes_per_device), pod.gib(estimate.hbm_capacity)
    sys.exit(
      f"error: the step needs {needed} GiB per chip, {target.name} has {there}, of which "
      f"{memory.USABLE:.0%} may be used; use more chips, a smaller data.micro_batch or "
      "data.kept_tokens, or model.remat that keeps less (--sweep finds them)"
    )


if __name__ == "__main__":
  flags.mark_flags_as_required(["config", "topology"])
  jax.config.update("jax_platforms", "cpu")  # the compiler is asked, not a device
  cli.run(main)
