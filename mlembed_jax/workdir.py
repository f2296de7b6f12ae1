"""What stands in the folder of one run, and writing it so that no file is ever half written.

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

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

from mlembed_jax.config import from_mapping
from mlembed_jax.config_fields import Config, ConfigError


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
    write_json(workdir / "run.json", dataclasses.asdict(self))

  @classmethod
  def load(cls, workdir: pathlib.Path) -> "Run":
    """Returns the run of a workdir.

    Raises:
      ConfigError: there is none, or another version of the package wrote it.
    """
    path = workdir / "run.json"
    if not path.is_file():
      raise ConfigError(f"{workdir}: no run.json; this is not a workdir that a training run wrote")
    try:
      run = json.loads(path.read_text(encoding="utf-8"))
      return cls(from_mapping(run["config"]), run["datasets"], run["plan"])
    except (ValueError, KeyError) as error:  # ConfigError and JSON errors are ValueErrors
      raise ConfigError(f"{path}: {error}") from error


def open_folder(path: str | os.PathLike[str], flag: str) -> pathlib.Path:
  """Returns the folder that a flag names, made if needed.

  Raises:
    ConfigError: it is a URL, or cannot be made or written to.
  """
  if "://" in str(path):  # it would be taken for a folder below this one
    raise ConfigError(f"{flag}: {path} is not a path; mount the bucket, for example by gcsfuse")
  workdir = pathlib.Path(path).absolute()
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    probe = workdir / f".write_test_{os.getpid()}"
    probe.touch()
    probe.unlink()
  except OSError as error:
    raise ConfigError(f"{flag}: {path} is not writable: {error.strerror}") from error
  return workdir


@contextlib.contextmanager
def new_file(path: pathlib.Path) -> Iterator[pathlib.Path]:
  """Yields a temporary path that is renamed to `path` at the end, unless there is an error.

  So readers see all of a file or nothing.
  """
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_name(f".{path.name}.{os.getpid()}")
  try:
    yield temporary
    temporary.replace(path)
  finally:
    temporary.unlink(missing_ok=True)


def write_text(path: pathlib.Path, text: str) -> None:
  """Writes a file the same way."""
  with new_file(path) as new:
    new.write_text(text, encoding="utf-8")


def write_json(path: pathlib.Path, value: Any) -> None:
  """Writes JSON the same way."""
  write_text(path, json.dumps(value, ensure_ascii=False, indent=1) + "\n")


def copy_file(source: pathlib.Path, target: pathlib.Path) -> None:
  """Copies a file the same way; nothing where both are one file."""
  if target.exists() and target.samefile(source):
    return
  with new_file(target) as new:
    shutil.copyfile(source, new)


def replace_folder(new: pathlib.Path, target: pathlib.Path) -> None:
  """Puts the complete folder `new` at `target`; what stood there is removed after that."""
  old = new.with_name(new.name + ".old")
  shutil.rmtree(old, ignore_errors=True)
  if target.exists():
    target.rename(old)
  try:
    new.rename(target)
  except OSError:
    if old.exists():
      old.rename(target)
    raise
  shutil.rmtree(old, ignore_errors=True)


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
