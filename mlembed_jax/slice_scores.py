"""The score of one slice of a model in one task, and how it stands in JSON files.

Training, the `evaluate` command and the model card share it.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple, Self

from mlembed_jax import typed


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
  rank: typed.Count
  depth: typed.Size
  dim: typed.Size
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
      ValueError: a field is missing, unknown, of another type or out of range.
    """
    return typed.from_json(cls, with_depth(value))


@dataclasses.dataclass(frozen=True)
class AsymmetricScore:
  """What queries at one size score against documents at another; all dims, float32."""

  task: str
  metric: str
  query_rank: typed.Count  # of the token table; 0: one full table
  query_depth: typed.Size
  rank: typed.Count  # of the documents
  depth: typed.Size
  score: float  # mean over languages
  by_language: dict[str, float]


def with_depth(value: Any) -> Any:
  """Returns a JSON object in which the depth has its name; version 0.1.0 wrote it as `exit`.

  Anything else is returned as it is.
  """
  if not isinstance(value, Mapping):
    return value
  return {"depth" if name == "exit" else name: content for name, content in value.items()}
