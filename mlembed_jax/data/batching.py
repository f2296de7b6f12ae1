"""What a step draws of its rows: hard negatives, and which documents have the instruction."""

import numpy as np
from jaxtyping import Bool, Int

NEGATIVES, INSTRUCTIONS = 0x4E45, 0x494E  # separate the draws from every other use of the seed


def _generator(*entropy: int) -> np.random.Generator:
  return np.random.Generator(np.random.Philox(np.random.SeedSequence(entropy)))


def negative_columns(stored: int, used: int, seed: int, step: int) -> Int[np.ndarray, "k"]:
  """Returns the hard-negative columns of one step: `used` of `stored`, without replacement.

  All rows of a step use the same columns, as in F2LLM-v2.
  """
  generator = _generator(NEGATIVES, seed, step)
  return np.sort(generator.choice(stored, size=min(used, stored), replace=False))


def instructed_documents(
  shape: tuple[int, int], share: float, seed: int, step: int
) -> Bool[np.ndarray, "B D"]:
  """Returns which documents of a step have the instruction, each with a chance of `share`."""
  return _generator(INSTRUCTIONS, seed, step).random(shape) < share
