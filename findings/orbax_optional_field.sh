#!/usr/bin/env bash
# An optional field that holds None makes all earlier checkpoints unreadable for Orbax.
#
# Guess: None is an empty pytree, so a train state that gains a field `extra: Any = None` has the
# same leaves as before, and `StandardCheckpointer.restore` reads its earlier checkpoints. If it is
# strict about structure, it is strict about all of it.
#
# Seen (orbax-checkpoint 0.12.8): restore raises "tree structures do not match", as it counts None
# as an entry of the tree, and {} and () as well. It fails in both directions: a checkpoint with such
# a field cannot be read once the field is gone. Yet a None may be read as {}, a tuple as a list, and
# a dataclass as a dictionary of the same names. In a checkpoint with many arrays nothing differs but
# a field without any array.
#
# Why it matters: a trainer of embedders gains optional parts (a learnt temperature, a projection to
# a teacher, adapters). With the usual default of None, every run that is under way when the trainer
# is upgraded can no longer be continued.
#
# What to do: save and restore a dictionary of the fields, without those that hold nothing.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet \
  orbax-checkpoint==0.12.8 jax==0.10.2 numpy==2.4.6 flax==0.12.8
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - "$folder" <<'PYTHON'
import logging
import sys
from importlib.metadata import version
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

logging.disable(logging.WARNING)


class Before(flax.struct.PyTreeNode):
  step: Any
  params: Any


class After(flax.struct.PyTreeNode):
  step: Any
  params: Any
  extra: Any = None


def outcome(name, saved, wanted):
  path = f"{sys.argv[1]}/{name.replace(' ', '_')}"
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(path, saved)
    checkpointer.wait_until_finished()
    try:
      checkpointer.restore(path, jax.tree.map(ocp.utils.to_shape_dtype_struct, wanted))
    except ValueError as error:
      return str(error).partition(":")[0]
  return "restored"


x = jnp.ones(2)
before, after = Before(x, {"w": x}), After(x, {"w": x})
CASES = {
  "a field with None was added": (before, after),
  "a field with {} was added": (before, After(x, {"w": x}, {})),
  "a field with None was removed": (after, before),
  "None is read as {}": (after, After(x, {"w": x}, {})),
  "a dataclass is read as a dictionary": (before, {"step": x, "params": {"w": x}}),
  "a list is read as a tuple": ({"a": [x, x]}, {"a": (x, x)}),
}
MISMATCH = "User-provided restore item and on-disk value metadata tree structures do not match"
EXPECTED = [MISMATCH] * 3 + ["restored"] * 3
print("orbax-checkpoint", version("orbax-checkpoint"), "- guessed: all are restored")
seen = [outcome(name, *trees) for name, trees in CASES.items()]
for name, said in zip(CASES, seen, strict=True):
  print(f"{name}: {said}")
if seen != EXPECTED:
  sys.exit("What Orbax makes of fields without arrays has changed.")
PYTHON
