"""The score of one slice of a model in one task, and how it stands in JSON files.

Training, the `evaluate` command and the model card share it, so this module knows no other.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple, Self


class Size(NamedTuple):
  """The place of a slice on the four axes."""

  rank: int  # of the token table; 0: one full table
  depth: int  # layers
  dim: int
  precision: str  # of the vectors


@dataclasses.dataclass(frozen=True)
class SliceScore:
  """What one slice scores in one task; higher is better."""

  task: str
  metric: str
  rank: int
  depth: int
  dim: int
  precision: str
  score: float  # mean over languages; of a task of MTEB, over its subsets
  by_language: dict[str, float]
  others: dict[str, float] = dataclasses.field(default_factory=dict)  # means of other metrics

  @property
  def size(self) -> Size:
    """The place of the slice on the four axes."""
    return Size(self.rank, self.depth, self.dim, self.precision)

  @classmethod
  def from_json(cls, value: Mapping[str, Any]) -> Self:
    """Returns the score of a JSON object, which `dataclasses.asdict` makes.

    Raises:
      TypeError: fields are missing, or unknown.
    """
    return cls(**with_depth(value))


def with_depth(value: Mapping[str, Any]) -> dict[str, Any]:
  """Returns a JSON object in which the depth has its name; version 0.1.0 wrote it as `exit`."""
  return {"depth" if name == "exit" else name: content for name, content in value.items()}
