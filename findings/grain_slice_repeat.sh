#!/usr/bin/env bash
# In Grain a slice of a shuffled dataset is another slice in every epoch, so held-out rows leak.
#
# Guess: `shuffled = dataset.shuffle(seed=0)`, `held_out = shuffled[:1000]` and `train =
# shuffled[1000:].repeat()` split the rows once, as both slices show when they are listed.
#
# Seen (grain 0.2.18): `repeat` asks the datasets before it for rows behind their end, and `shuffle`
# answers each further epoch with another permutation. The slice lies between them and picks
# positions, not rows. In the second epoch the training slice meets about the share of the held-out
# rows that it has of all rows, and after a few epochs every one. `len`, `list(train)` before the
# `repeat` and `list(held_out)` look right. Version 0.2.12 did not do this. It is reported as issue
# 1200 of google/grain.
#
# Why it matters: a held-out loss of an embedder falls with each epoch although nothing generalises
# better, and dimensions or depths are chosen by rows that were trained on.
#
# What to do: slice before the shuffle (`dataset[1000:].shuffle(seed=0).repeat()`), or choose the
# held-out rows by a hash of their text when the data is prepared.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet grain==0.2.18 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import sys
from importlib.metadata import version

import grain

ROWS, HELD_OUT, EPOCHS = 1000, 100, 5


def leaked_rows(train, held_out):
  """Returns how many held-out rows were met up to the end of each epoch."""
  size = ROWS - HELD_OUT
  rows = list(train.repeat(EPOCHS))
  return [len(set(rows[: size * epoch]) & set(held_out)) for epoch in range(1, EPOCHS + 1)]


dataset = grain.MapDataset.range(ROWS)
shuffled = dataset.shuffle(seed=0)
assert sorted([*shuffled[:HELD_OUT], *shuffled[HELD_OUT:]]) == list(range(ROWS))
seen = leaked_rows(shuffled[HELD_OUT:], list(shuffled[:HELD_OUT]))
mended = leaked_rows(dataset[HELD_OUT:].shuffle(seed=0), list(dataset[:HELD_OUT]))
print("grain", version("grain"), f"- held-out rows of {HELD_OUT} met after epochs 1 to {EPOCHS}")
print("guessed:              ", [0] * EPOCHS)
print("shuffle, then slice:  ", seen)
print("slice, then shuffle:  ", mended)
if any(mended):
  sys.exit("Slicing before the shuffle leaks too.")
if not (seen[0] == 0 and seen[1] > 0.8 * HELD_OUT and seen[-1] == HELD_OUT):
  sys.exit("What a repeated slice of a shuffled dataset holds has changed.")
PYTHON
