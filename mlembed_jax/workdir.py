"""What stands in the folder of one run.

run.json          configuration, training files and what decides the rows of every step
plan.json         files and languages as they will be read; plan.png shows it
tokenizer.json    a copy of the one the run reads
checkpoints/      orbax, one folder per kept step
metrics.jsonl     one JSON object per logged step
tensorboard/      the same numbers for TensorBoard
eval/step_N.json  held-out scores of every evaluated slice
data/             what `data.builder` wrote
export/           the Hugging Face folder of `export.at_end`
"""

import dataclasses
import hashlib
import json
import pathlib
from typing import Any

from mlembed_jax.config import from_mapping, with_older_values
from mlembed_jax.config_fields import Config
from mlembed_jax.errors import ConfigError
from mlembed_jax.files import read_object, write_json
from mlembed_jax.slice_scores import SliceScore

FORMAT = 1  # of run.json
SCORES_FORMAT = 1  # of eval/step_N.json


@dataclasses.dataclass(frozen=True)
class Run:
  """What a run was started with; all that a checkpoint needs to be used elsewhere."""

  config: Config
  datasets: dict[str, dict[str, Any]]  # manifest entries of the training files
  plan: dict[str, Any]  # everything the rows of a step depend on beside the configuration

  @property
  def fingerprint(self) -> str:
    """Hash of the plan."""
    return hashlib.sha256(json.dumps(self.plan, sort_keys=True).encode()).hexdigest()

  def save(self, workdir: pathlib.Path) -> None:
    """Writes run.json."""
    write_json(workdir / "run.json", {"format_version": FORMAT} | dataclasses.asdict(self))

  @classmethod
  def load(cls, workdir: pathlib.Path) -> "Run":
    """Returns the run of a workdir; fields that joined the configuration later are filled in.

    Raises:
      ConfigError: there is none, it is damaged, or a newer version of the package wrote it.
    """
    path = workdir / "run.json"
    if not path.is_file():
      raise ConfigError(f"{workdir}: no run.json; this is not a workdir that a training run wrote")
    run = read_object(path, FORMAT)
    try:
      config = from_mapping(with_older_values(run["config"]))
      return cls(config, run["datasets"], run["plan"])
    except (
      ValueError,
      KeyError,
      TypeError,
      AttributeError,
    ) as error:  # ConfigErrors are ValueErrors
      raise ConfigError(f"{path}: {error}") from error


@dataclasses.dataclass(frozen=True)
class StepScores:
  """The held-out scores of one step, content of eval/step_N.json."""

  step: int
  tasks: dict[str, str]  # the digest of each held-out task that was scored
  scores: list[SliceScore]

  def of_task(self, task: str) -> list[SliceScore]:
    """Returns the scores of one task."""
    return [s for s in self.scores if s.task == task]

  def save(self, workdir: pathlib.Path) -> None:
    """Writes eval/step_N.json."""
    value = {"format_version": SCORES_FORMAT} | dataclasses.asdict(self)
    write_json(_scores_path(workdir, self.step), value)

  @classmethod
  def load(cls, workdir: pathlib.Path, step: int) -> "StepScores":
    """Returns the scores of a step, none where it was not evaluated.

    Raises:
      ConfigError: the file is damaged, or a newer version of the package wrote it.
    """
    path = _scores_path(workdir, step)
    if not path.exists():
      return cls(step, {}, [])
    value = read_object(path, SCORES_FORMAT)
    try:
      scores = [SliceScore.from_json(score) for score in value["scores"]]
      return cls(value["step"], value.get("tasks", {}), scores)
    except (KeyError, TypeError, AttributeError) as error:
      raise ConfigError(f"{path}: {error}") from error


def _scores_path(workdir: pathlib.Path, step: int) -> pathlib.Path:
  return workdir / "eval" / f"step_{step}.json"
