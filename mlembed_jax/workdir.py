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
from mlembed_jax.files import check_format, write_json

FORMAT = 1  # of run.json


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
    try:
      run = json.loads(path.read_text(encoding="utf-8"))
      version = run.get("format_version")
    except (ValueError, AttributeError) as error:
      raise ConfigError(f"{path}: {error}") from error
    check_format(path, version, FORMAT)
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


def evaluation_path(workdir: pathlib.Path, step: int) -> pathlib.Path:
  """Returns where the held-out scores of a step stand."""
  return workdir / "eval" / f"step_{step}.json"


def evaluated(workdir: pathlib.Path, step: int) -> dict[str, str]:
  """Returns {held-out task: digest} of what was scored at a step."""
  path = evaluation_path(workdir, step)
  return json.loads(path.read_text(encoding="utf-8")).get("tasks", {}) if path.exists() else {}


def read_evaluation(workdir: pathlib.Path, step: int) -> list[dict[str, Any]]:
  """Returns the held-out scores of a step, an empty list where it was not evaluated."""
  path = evaluation_path(workdir, step)
  return json.loads(path.read_text(encoding="utf-8"))["scores"] if path.exists() else []
