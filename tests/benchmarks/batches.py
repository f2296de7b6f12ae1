"""Real tokens among those computed: packing, one text per sheet, and padding to the longest.

    python -m tests.benchmarks.batches --dataset DIR

The same steps in the same order for all. `to longest` is what most trainers do: every text of a
batch padded to its longest one. `texts x texts` counts the work of attention: the squares of sheet
widths, against those of the texts themselves.
"""

import argparse
import pathlib

import numpy as np

from tests.benchmarks import loader as benchmark
from tests.benchmarks.common import print_table


def lengths(batch):
  """Returns the tokens of every text of a batch."""
  found = []
  for sheets in batch.sheets:
    ends = np.where(sheets.ends < sheets.tokens.shape[-1], sheets.ends, -1)
    starts = np.concatenate([np.full_like(ends[..., :1], -1), ends[..., :-1]], axis=-1)
    found.append((ends - starts)[ends >= 0])
  return np.concatenate(found)


def variants(args):
  for packed in (True, False):
    for widths in args.widths:
      yield packed, tuple(map(int, widths.split(",")))


def measure(args, packed, widths):
  options = argparse.Namespace(**(vars(args) | {"lengths": widths, "packing": packed}))
  batches = benchmark.open_batches(args.dataset, options)
  shapes = {(kind.texts, kind.task_type) for kind in batches.kinds.values()}
  real = computed = longest = attention = squares = 0
  for step in range(args.steps):
    batch = batches[step]
    own = lengths(batch)
    real += own.sum()
    computed += batch.computed_tokens
    longest += own.size * own.max()
    attention += sum(s.tokens.size * s.tokens.shape[-1] for s in batch.sheets)
    squares += np.square(own).sum()
  return real / computed, real / longest, attention / squares, len(shapes)


def rows(args):
  for packed, widths in variants(args):
    share, longest, attention, shapes = measure(args, packed, widths)
    name = "packed" if packed else "one text per sheet"
    yield name, widths, f"{share:.1%}", f"{longest:.1%}", f"{attention:.1f}", shapes


def main(argv=None):
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--dataset", type=pathlib.Path, required=True)
  parser.add_argument("--steps", type=int, default=281)
  parser.add_argument("--batch", type=int, default=512)
  parser.add_argument("--negatives", type=int, default=7)
  parser.add_argument("--block", type=int, default=4096, help="tokens encoded at a time")
  parser.add_argument("--shards", type=int, default=1)
  parser.add_argument(
    "--widths", nargs="+", default=["1024", "256,1024", "64,128,256,512,768,1024"]
  )
  args = parser.parse_args(argv)
  header = ("texts", "sheet widths", "real tokens", "to longest", "texts x texts", "programs")
  print_table(header, rows(args))


if __name__ == "__main__":
  main()
