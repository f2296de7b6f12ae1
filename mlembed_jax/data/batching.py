"""Which rows make up each step, and rows of token ids as arrays of a few fixed shapes.

The batch of step n is a pure function of (files, seed, n): there is no iterator state, so a run
resumes anywhere and on any number of hosts. No jax here.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import grain
import numpy as np
from jaxtyping import Int

from mlembed_jax.data.tokenizer import DataError


@dataclasses.dataclass(frozen=True)
class Kind:
  """What decides the shapes of a step's batch; one program is compiled per kind."""

  task_type: str
  positives: int  # per row
  negatives: int  # hard ones used per row
  longest: int  # tokens of its longest text
  vectors: tuple[int, int] | None  # a teacher's, per row: texts that have one, and their width

  @property
  def texts(self) -> int:
    """Texts per row."""
    return 1 + self.positives + self.negatives


def order(sizes: Mapping[str, int], batch_size: int, seed: int) -> grain.MapDataset:
  """Returns an endless dataset whose element n is (file, row numbers [batch_size]) of step n.

  All rows of a step come from one file. Every epoch shuffles the rows of each file, cuts them
  into batches (a remainder shorter than a batch waits for another epoch's shuffle) and visits all
  batches of all files in a new order, so files appear in proportion to their size.

  Raises:
    DataError: a file has fewer rows than one batch.
  """
  for name, rows in sizes.items():
    if rows < batch_size:
      raise DataError(
        f"{name}: {rows} usable rows are fewer than data.global_batch = {batch_size}; "
        "lower it, or leave the file out of data.train"
      )
  files = [
    # Batching after the shuffle and before the repeat: no batch holds a row twice.
    grain.MapDataset.range(rows)
    .seed(seed + 1 + i)
    .shuffle()
    .batch(batch_size, drop_remainder=True, batch_fn=np.array)
    .map(lambda chosen, name=name: (name, chosen))
    for i, (name, rows) in enumerate(sizes.items())
  ]
  return grain.MapDataset.concatenate(files).seed(seed).shuffle().repeat()


def steps_per_epoch(sizes: Mapping[str, int], batch_size: int) -> int:
  """Returns the number of batches in one pass over all files."""
  return sum(rows // batch_size for rows in sizes.values())


def negative_columns(stored: int, used: int, seed: int, step: int) -> Int[np.ndarray, "k"]:
  """Returns the hard-negative columns of one step: `used` of `stored`, without replacement.

  All rows of a step use the same columns, as in F2LLM-v2. The first argument of the generator
  separates this stream from every other use of the seed.
  """
  generator = np.random.Generator(np.random.Philox(np.random.SeedSequence([0x4E45, seed, step])))
  return np.sort(generator.choice(stored, size=min(used, stored), replace=False))


def bucket(length: int, lengths: Sequence[int]) -> int:
  """Returns the smallest of `lengths` that holds `length` tokens."""
  return next(size for size in sorted(lengths) if size >= length)


def pad(ids: Sequence[Sequence[int]], size: int) -> tuple[np.ndarray, np.ndarray]:
  """Returns tokens [N, size], padded on the right with 0, and lengths [N]; both int32."""
  tokens = np.zeros((len(ids), size), np.int32)
  for row, values in zip(tokens, ids, strict=True):
    row[: len(values)] = values
  return tokens, np.array([len(values) for values in ids], np.int32)
