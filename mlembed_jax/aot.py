"""Compiles a run's update for a TPU topology that is not here, and says what it needs.

  python -m mlembed_jax.aot --config configs/8b.py:v5p --topology v5p:4x4x4

Needs the package `libtpu` (`pip install -e ".[tpu]"`), whose compiler runs on any machine. Memory
is the compiler's account. Time is an estimate: hlo.py says from what.
"""

import dataclasses
import json
import sys

from absl import flags
from ml_collections import config_flags

from mlembed_jax import cli

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


def main() -> None:
  """Reads the flags; ends with status 1 where the configuration does not fit."""
  # Imported here, jax does not slow down --help.
  import jax

  from mlembed_jax.estimate import sweep
  from mlembed_jax.estimate import text as estimate_text
  from mlembed_jax.estimate.estimate import Step, Target, estimate_step, gib
  from mlembed_jax.training import micro_batch

  jax.config.update("jax_platforms", "cpu")  # the compiler is asked, not a device
  config = cli.read_config(CONFIG, {"data.builder": "", "data.dataset": "nothing is read"})
  target = Target.parse(str(TOPOLOGY.value), SLICES.value)
  step = Step(TASK.value, TEXT_TOKENS.value)
  if SWEEP.value:
    found = sweep.run(config, target, step)
    print(json.dumps([dataclasses.asdict(e) for e in found]) if JSON.value else sweep.table(found))
    fits = found[0].fits
    sys.exit(None if fits else "error: no setting that was tried fits; use more chips")
  estimate = estimate_step(config, target, step)
  print(json.dumps(dataclasses.asdict(estimate)) if JSON.value else estimate_text.report(estimate))
  if not estimate.fits:
    needed, there = gib(estimate.hbm_bytes_per_device), gib(estimate.hbm_capacity)
    sys.exit(
      f"error: the step needs {needed} GiB per chip, {target.name} has {there}, of which "
      f"{micro_batch.USABLE:.0%} may be used; use more chips, a smaller data.micro_batch or "
      "data.kept_tokens, or model.remat that keeps less (--sweep finds them)"
    )


if __name__ == "__main__":
  flags.mark_flags_as_required(["config", "topology"])
  cli.run(main)
