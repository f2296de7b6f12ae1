"""The content of scores.json: what was scored, the score of every slice, what the slices cost."""

import dataclasses
import pathlib
from typing import Self

from mlembed_jax import typed
from mlembed_jax.errors import DataError
from mlembed_jax.files import read_object, write_object
from mlembed_jax.slice_scores import AsymmetricScore, SliceScore, with_depth
from mlembed_jax.typed import Count, Size

FORMAT = 1  # of scores.json


@dataclasses.dataclass(frozen=True)
class TaskSummary:
  """One task that was scored."""

  name: str
  type: str
  metric: str
  texts: Count | None  # None: not known, as of tasks of MTEB
  languages: Count


@dataclasses.dataclass(frozen=True)
class BodyCost:
  """The size of the model cut to a rank and a depth."""

  rank: Count  # 0: one full table
  depth: Size
  count: Count  # parameters
  flops_per_token: float


@dataclasses.dataclass(frozen=True)
class Latency:
  """The time to encode one text at a depth."""

  depth: Size
  ms: float
  tokens: Count  # of the text


@dataclasses.dataclass(frozen=True)
class Costs:
  """What slices cost; empty where it is not known."""

  parameters: list[BodyCost] = dataclasses.field(default_factory=list)
  latency_ms: list[Latency] = dataclasses.field(default_factory=list)
  device: str = "one device"  # on which the latency was measured


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """The content of scores.json."""

  model: str
  precisions: list[str]
  tasks: list[TaskSummary]
  scores: list[SliceScore]
  costs: Costs
  skipped: dict[str, Count]  # how many of what was not scored as it is
  # Queries at one size, documents at another; tasks of MTEB have none.
  asymmetric: list[AsymmetricScore] = dataclasses.field(default_factory=list)

  def save(self, path: pathlib.Path) -> None:
    """Writes scores.json."""
    write_object(path, {"format_version": FORMAT} | dataclasses.asdict(self))

  @classmethod
  def load(cls, path: pathlib.Path) -> Self:
    """Returns the content of a scores.json, also of one that version 0.1.0 wrote.

    Raises:
      DataError: it is damaged, or a newer version of the package wrote it.
    """
    value = read_object(path, FORMAT, DataError)
    value.pop("format_version", None)
    try:
      value["scores"] = [with_depth(score) for score in typed.listed(value, "scores")]
      if isinstance(costs := value.get("costs"), dict):
        for name in ("parameters", "latency_ms"):
          costs[name] = [with_depth(cost) for cost in typed.listed(costs, name)]
      return typed.from_json(cls, value)
    except ValueError as error:
      raise DataError(f"{path}: {error}") from error
