"""The content of scores.json: what was scored, the score of every slice, what the slices cost."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any, Self

from mlembed_jax.errors import DataError
from mlembed_jax.files import read_object, write_object
from mlembed_jax.slice_scores import SliceScore, with_depth

FORMAT = 1  # of scores.json


@dataclasses.dataclass(frozen=True)
class TaskSummary:
  """One task that was scored."""

  name: str
  type: str
  metric: str
  texts: int | None  # None: not known, as of tasks of MTEB
  languages: int


@dataclasses.dataclass(frozen=True)
class BodyCost:
  """The size of the model cut to a rank and a depth."""

  rank: int  # 0: one full table
  depth: int
  count: int  # parameters
  flops_per_token: float


@dataclasses.dataclass(frozen=True)
class Latency:
  """The time to encode one text at a depth."""

  depth: int
  ms: float
  tokens: int  # of the text


@dataclasses.dataclass(frozen=True)
class Costs:
  """What slices cost; empty where it is not known."""

  parameters: list[BodyCost] = dataclasses.field(default_factory=list)
  latency_ms: list[Latency] = dataclasses.field(default_factory=list)
  device: str = "one device"  # on which the latency was measured

  @classmethod
  def from_json(cls, value: Mapping[str, Any]) -> Self:
    """Returns the costs of a JSON object.

    Raises:
      KeyError, TypeError: fields are missing, or unknown.
    """
    parameters = [BodyCost(**with_depth(cost)) for cost in value["parameters"]]
    latency_ms = [Latency(**with_depth(cost)) for cost in value["latency_ms"]]
    return cls(parameters, latency_ms, value["device"])


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """The content of scores.json."""

  model: str
  precisions: list[str]
  tasks: list[TaskSummary]
  scores: list[SliceScore]
  costs: Costs
  skipped: dict[str, int]  # how many of what was not scored as it is

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
      tasks = [TaskSummary(**task) for task in value.pop("tasks")]
      scores = [SliceScore.from_json(score) for score in value.pop("scores")]
      return cls(tasks=tasks, scores=scores, costs=Costs.from_json(value.pop("costs")), **value)
    except (KeyError, TypeError, AttributeError) as error:
      raise DataError(f"{path}: {error}") from error
