#!/usr/bin/env bash
# safetensors 0.8.0 writes the wrong numbers for a NumPy array that was cut or transposed.
#
# Guess: `safetensors.numpy.save` writes the values of `table[:, :64]` and `kernel.T`, as 0.7.0
# does, or refuses them, as `safetensors.torch` does.
#
# Seen (safetensors 0.8.0): it takes the address of the first number and the count of bytes, and
# copies that stretch of memory under the shape of the view. A cut of the columns holds the first
# numbers of the full table instead, and a transposed kernel its numbers in the old order. Names,
# shapes, dtypes and sizes are right and nothing is raised; a cut of the rows is right. The
# documentation asks for contiguous arrays, but nothing checks it. It is reported as issue 825 of
# safetensors/safetensors.
#
# Why it matters: columns are what a Matryoshka cut takes from a table, and kernels are transposed
# between JAX and PyTorch. The file loads everywhere, and only a comparison of vectors shows that
# the weights are scrambled.
#
# What to do: pass `np.ascontiguousarray(array)`, which copies only where it must.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
cat > "$folder/save.py" <<'PYTHON'
import sys
from importlib.metadata import version

import numpy as np
from safetensors.numpy import load, save

TABLE = np.arange(24, dtype=np.float32).reshape(4, 6)
VIEWS = {"columns": TABLE[:, :3], "rows": TABLE[:2], "transposed": TABLE.T}


def same_after_saving(arrays):
  loaded = load(save(arrays))
  return {name: bool(np.array_equal(loaded[name], arrays[name])) for name in arrays}


right = dict.fromkeys(VIEWS, True)
wrong = {} if version("safetensors") == "0.7.0" else {"columns": False, "transposed": False}
seen = same_after_saving(VIEWS)
copied = same_after_saving({name: np.ascontiguousarray(view) for name, view in VIEWS.items()})
print("safetensors", version("safetensors"), "- are the values the same after loading?")
print("  guessed       ", right)
print("  seen          ", seen)
print("  seen of copies", copied)
print("  columns saved ", VIEWS["columns"].tolist())
print("  columns loaded", load(save(VIEWS))["columns"].tolist())
if seen != {**right, **wrong} or copied != right:
  sys.exit("What safetensors writes has changed.")
PYTHON
for release in 0.7.0 0.8.0; do
  "$folder/venv/bin/pip" install --quiet safetensors==$release numpy==2.4.6
  "$folder/venv/bin/python" "$folder/save.py"
done
