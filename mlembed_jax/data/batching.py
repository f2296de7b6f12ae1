"""What one step reads and of what shape: kinds of batches, drawn negatives and instructions."""

import dataclasses

import numpy as np
from jaxtyping import Bool, Int

NEGATIVES, INSTRUCTIONS = 0x4E45, 0x494E  # separate the draws from every other use of the seed


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
