#!/usr/bin/env bash
# Orbax restores a checkpoint with a flipped bit as other numbers, without a word.
#
# Guess: the files of a checkpoint are compressed by zstd inside OCDBT, both of which know checksums,
# and zarr 3 has a crc32c codec; so a flipped bit in the file of the arrays raises an error.
#
# Seen (orbax-checkpoint 0.12.8, tensorstore as it brings it): of 40 single flips in the data file of
# a float32 matrix all 40 are restored, each with other values, in zarr 2 and in zarr 3 alike: no
# checksum of the array data is compared on the way. In the specification that Orbax makes for
# zarr 3, crc32c protects the index of a shard, not the numbers.
#
# Why it matters: a pod run is restored dozens of times from network storage and spot machines. A bit
# that flips in an exponent makes one weight or moment 2 ** 64 times as large; one in the mantissa is
# never noticed, and is trained on.
#
# What to do: keep a digest of every file of a checkpoint beside it, and compare before the restore.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet orbax-checkpoint==0.12.8 jax==0.10.2 numpy==2.4.6
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - "$folder" <<'PYTHON'
import logging
import pathlib
import random
import sys
from importlib.metadata import version

import numpy as np
import orbax.checkpoint as ocp

logging.disable(logging.WARNING)
FLIPS = 40
weights = np.random.default_rng(0).standard_normal((256, 256)).astype(np.float32)


def outcomes(path, zarr3):
  checkpointer = ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_zarr3=zarr3))
  checkpointer.save(path, {"weights": weights})
  data = max((p for p in path.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
  whole, rng, found = data.read_bytes(), random.Random(0), []
  for _ in range(FLIPS):
    flipped = bytearray(whole)
    flipped[rng.randrange(len(flipped))] ^= 1 << rng.randrange(8)
    data.write_bytes(flipped)
    try:
      restored = np.asarray(checkpointer.restore(path)["weights"])
      found.append("equal" if restored.tobytes() == weights.tobytes() else "other numbers")
    except Exception:
      found.append("error")
  return {name: found.count(name) for name in ("error", "equal", "other numbers")}


print("orbax-checkpoint", version("orbax-checkpoint"), "tensorstore", version("tensorstore"))
for zarr3 in (False, True):
  seen = outcomes(pathlib.Path(sys.argv[1]) / f"zarr3_{zarr3}", zarr3)
  print(f"zarr {3 if zarr3 else 2}: guessed {FLIPS} errors, seen {seen}")
  if seen["other numbers"] < FLIPS * 3 // 4:
    sys.exit("Most flips are no longer restored as other numbers.")
PYTHON
