#!/usr/bin/env bash
# Orbax calls `post_finalization_callback` before the checkpoint is final.
#
# Guess: `AsyncOptions(post_finalization_callback=...)` runs when a checkpoint is complete: the folder
# has its final name, so the callback can copy it, announce it, or write a digest of it.
#
# Seen (orbax-checkpoint 0.12.8): during the callback only the temporary folder of the step exists,
# such as `7.orbax-checkpoint-tmp`; the rename comes after the callback returns. What the callback
# copies or announces does not exist yet under its name, and a process that is killed right after
# it leaves no checkpoint of that step.
#
# Why it matters: the callback is where a run would start an export or an evaluation of the step, or
# tell a queue that it may delete the step before. After a kill at that moment both are gone. It also
# has a use that its name hides: what it writes into the temporary folder becomes part of the
# checkpoint by the same rename, so a manifest can never be missing.
#
# What to do: announce a step when `wait_until_finished` has returned, or when the folder is there.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet orbax-checkpoint==0.12.8 jax==0.10.2 numpy==2.4.6
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - "$folder" <<'PYTHON'
import logging
import pathlib
import sys
from importlib.metadata import version

import numpy as np
import orbax.checkpoint as ocp

logging.disable(logging.WARNING)
root, seen = pathlib.Path(sys.argv[1]) / "checkpoints", []


def names():
  return sorted(path.name for path in root.iterdir())


options = ocp.CheckpointManagerOptions(
  async_options=ocp.options.AsyncOptions(post_finalization_callback=lambda: seen.append(names()))
)
with ocp.CheckpointManager(root, options=options) as manager:
  manager.save(7, args=ocp.args.StandardSave({"weights": np.ones(3)}))
  manager.wait_until_finished()
  after = names()
print("orbax-checkpoint", version("orbax-checkpoint"))
print(f"in the callback: guessed [['7']], seen {seen}; after the save: {after}")
if after != ["7"]:
  sys.exit("The name of a finished checkpoint has changed.")
if len(seen) != 1 or "7" in seen[0]:
  sys.exit("The callback now runs when the checkpoint is final.")
PYTHON
