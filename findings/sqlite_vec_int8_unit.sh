#!/usr/bin/env bash
# The int8 codes of sqlite-vec get worse the wider a unit vector is, and all lean to one side.
#
# Guess: `vec_quantize_int8(x, 'unit')` keeps nearly all neighbours of a unit vector at any width,
# as rounding errors average out, and -x gets the negated codes of x.
#
# Seen (sqlite-vec 0.1.9): the range is -1 to 1 at every width, while the components of a unit
# vector shrink with it: at 1024 dimensions the codes reach about 18 of 127. A code is `127.5 * x -
# 0.5` cut towards zero: half a step too low on average, in the same direction for all vectors. Of
# the ten nearest by float, 0.93 are found at 64 dimensions, 0.78 at 1024 and 0.58 at 4096 (normally
# distributed vectors); with one scale per vector it is 0.98 or more at all of them. At 1024 the
# cosine of x and -x is -0.97.
#
# Why it matters: a comparison of 64 and 1024 dimensions of one embedder in this format measures the
# format too, and makes the cut look better than it is.
#
# What to do: divide each vector by its largest component, multiply by 127, round, store it with
# `vec_int8` and search by cosine, which does not see the scale.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet sqlite-vec==0.1.9 apsw==3.54.1.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import sys
from importlib.metadata import version

import apsw  # the sqlite3 of Python is often built without extensions
import numpy as np
import sqlite_vec

database = apsw.Connection(":memory:")
database.enable_load_extension(True)
database.load_extension(sqlite_vec.loadable_path())
QUERY = "SELECT vec_quantize_int8(vec_f32(?), 'unit')"
SEEN = {64: [0.93, 0.99, 0, -1], 1024: [0.78, 0.98, 0.015, -0.97], 4096: [0.58, 0.98, 0.06, -0.86]}


def unit(vectors):
  return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def unit_codes(vectors):
  rows = [next(database.execute(QUERY, (row.tobytes(),)))[0] for row in vectors]
  return np.stack([np.frombuffer(row, np.int8) for row in rows]).astype(np.float32)


def scaled_codes(vectors):
  return np.rint(vectors * 127 / abs(vectors).max(axis=1, keepdims=True))


def nearest(queries, documents):
  return np.argsort(-unit(queries) @ unit(documents).T, axis=1)[:, :10]


print("sqlite-vec", version("sqlite-vec"), "- guess: nothing below depends on the width")
print("width: recall@10, with a scale per vector, cosine of unrelated vectors, of x and -x")
for width, before in SEEN.items():
  drawn = unit(np.random.default_rng(0).normal(size=(2200, width))).astype(np.float32)
  exact, seen = nearest(drawn[:200], drawn[200:]), []
  for codes in (unit_codes(drawn), scaled_codes(drawn)):
    pairs = zip(exact, nearest(codes[:200], codes[200:]), strict=True)
    seen.append(np.mean([len(set(a) & set(b)) / 10 for a, b in pairs]))
  codes, opposite = unit(unit_codes(drawn)), unit(unit_codes(-drawn))
  seen += [np.mean(codes[:200] @ codes[200:].T), np.mean(np.sum(codes * opposite, axis=1))]
  print(f"{width}:", " ".join(f"{value:.3f}" for value in seen))
  if not np.allclose(seen, before, atol=0.01):
    sys.exit(f"Seen before were {before}.")
PYTHON
