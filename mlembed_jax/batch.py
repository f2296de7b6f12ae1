"""What one step reads: the kind of its rows, which is static, and its arrays. No jax here.

The arrays are NamedTuples, which jax takes as pytrees: the loader fills them with NumPy arrays, a
mesh holds them as global ones, and a program is lowered from their shapes.
"""

import dataclasses
from typing import Any, NamedTuple

from jaxtyping import Float32, Int32, UInt32


@dataclasses.dataclass(frozen=True)
class Kind:
  """What decides the shapes of a step's batch; one program is compiled per kind."""

  task_type: str
  positives: int  # that each row has
  negatives: int  # hard ones that are used of each row
  longest: int  # tokens of its longest text
  vectors: tuple[int, int] | None  # a teacher's, per row: texts that have one, and their width

  @property
  def is_text(self) -> bool:
    """Whether the rows are texts alone, of which only a teacher says something."""
    return not self.positives

  @property
  def is_scored(self) -> bool:
    """Whether the rows are pairs with a score."""
    return self.task_type == "scored_pairs"

  @property
  def texts(self) -> int:
    """Texts of a row: the query, its positives and its negatives."""
    return 1 + self.positives + self.negatives


class Sheets(NamedTuple):
  """The token sheets of one width T, of which each holds up to K texts.

  S counts the sheets of a block, shard after shard. A single block lacks the axis of blocks.
  """

  ends: Int32[Any, "*blocks S K"]  # where each text ends, ascending; T: no more texts
  texts: Int32[Any, "*blocks S K"]  # numbers within the shard; an empty slot has their count
  tokens: Int32[Any, "*blocks S T"]


class Arrays(NamedTuple):
  """The arrays of a batch: B rows of C texts each, first the query, then positives, negatives."""

  hashes: UInt32[Any, "B C 2"]  # 64 bits of each text without its instruction
  scores: Float32[Any, "B"] | None = None  # of scored pairs
  sheets: tuple[Sheets, ...] = ()  # by width
  teacher: Float32[Any, "B C2 D2"] | None = None  # a teacher's vectors of the first C2 texts
