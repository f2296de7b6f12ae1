#!/usr/bin/env bash
# A checkpoint whose metric is NaN makes Orbax delete the best checkpoint.
#
# Guess: `CheckpointManagerOptions(best_fn=..., best_mode="max", max_to_keep=N)` keeps the N steps
# with the highest metric, and a step whose metric is NaN ranks last or is refused.
#
# Seen (orbax-checkpoint 0.12.8): the steps are sorted by the bare metric, and NaN is neither
# smaller nor larger than any number. So the NaN step stays at the end, where the best step belongs,
# and so does what is saved after it. The NaN step becomes `best_step()`, and the best checkpoint is
# deleted from the disk as the lowest of the list. After the scores 0.1, 0.9, 0.8, NaN, 0.2 the only
# step left of `max_to_keep=1` is the one with 0.2, and `max_to_keep=2` leaves NaN and 0.2. Nothing
# is raised. Where nothing is deleted, `best_step()` still names the NaN step.
#
# Why it matters: the mean over many slices of an embedder (dimensions, depths, languages) is NaN as
# soon as one of them is, for example a rank correlation where every score of a short prefix ties.
# One such evaluation loses the best weights of a run, although no weight was ever NaN.
#
# What to do: map every metric that is not finite to the worst value inside `best_fn`.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet orbax-checkpoint==0.12.8 jax==0.10.2 numpy==2.4.6
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - "$folder" <<'PYTHON'
import logging
import math
import sys
from importlib.metadata import version

import numpy as np
import orbax.checkpoint as ocp

logging.disable(logging.WARNING)
SCORES = [0.1, 0.9, 0.8, math.nan, 0.2]


def finite_score(metrics):
  return metrics["score"] if math.isfinite(metrics["score"]) else -math.inf


def kept_steps(name, score_of, max_to_keep):
  options = ocp.CheckpointManagerOptions(
    best_fn=score_of, best_mode="max", max_to_keep=max_to_keep, enable_async_checkpointing=False
  )
  with ocp.CheckpointManager(f"{sys.argv[1]}/{name}", options=options) as manager:
    for step, score in enumerate(SCORES):
      arguments = ocp.args.StandardSave({"weights": np.ones(3)})
      manager.save(step, args=arguments, metrics={"score": score})
    return list(manager.all_steps()), manager.best_step()


print("orbax-checkpoint", version("orbax-checkpoint"), "- scores of the steps 0 to 4:", SCORES)
seen, mended = {}, {}
for keep in (1, 2, None):
  seen[keep] = kept_steps(f"plain{keep}", lambda metrics: metrics["score"], keep)
  mended[keep] = kept_steps(f"finite{keep}", finite_score, keep)
  print(f"max_to_keep={keep}: steps and best step guessed {mended[keep]}, seen {seen[keep]}")
everything = [0, 1, 2, 3, 4]
if mended != {1: ([1], 1), 2: ([1, 2], 1), None: (everything, 1)}:
  sys.exit("Mapping NaN to the worst score no longer keeps the best step.")
if seen != {1: ([4], 4), 2: ([3, 4], 4), None: (everything, 3)}:
  sys.exit("What Orbax keeps after a NaN has changed.")
PYTHON
