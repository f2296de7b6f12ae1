"""What stands in the folder of one run.

run.json          configuration, training files and what decides the rows of every step
plan.json         files and languages as they will be read; plan.png shows it
tokenizer.json    a copy of the one the run reads
checkpoints/      orbax, one folder per kept step
frozen/           the parameters that the run does not train, saved once
metrics.jsonl     one JSON object per logged step
nonfinite.jsonl   the rows of steps that were not finite
goodput.json      where the wall time of all starts went
lock.json         who trains here at the moment
profile/          the trace of `train.profile_steps`
held/             checkpoints that are being read, which stay so long
damaged/          checkpoints that were found damaged, or that the run went back from
tensorboard/      the same numbers for TensorBoard; wandb/, mlflow.db for those trackers
trackers.json     the runs of wandb and mlflow that are those of this workdir
eval/step_N.json  held-out scores of every evaluated slice
data/             what `data.builder` wrote
export/           the Hugging Face folder of `export.at_end`
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import pathlib
import statistics
from typing import Any

from mlembed_jax import files, typed
from mlembed_jax.config import from_mapping, with_older_values
from mlembed_jax.config_fields import Config
from mlembed_jax.errors import ConfigError
from mlembed_jax.slice_scores import SliceScore, with_depth

RUN = "run.json"
FORMAT = 1  # of run.json
SCORES_FORMAT = 1  # of eval/step_N.json


@dataclasses.dataclass(frozen=True)
class Run:
  """What a run was started with; all that a checkpoint needs to be used elsewhere."""

  config: Config
  datasets: dict[str, dict[str, Any]]  # manifest entries of the training files
  plan: dict[str, Any]  # everything the rows of a step depend on beside the configuration
  # What was changed on the way: {"step": from which on, "skip_steps": [...], ...}
  history: list[dict[str, Any]] = dataclasses.field(default_factory=list)
  tokenizer: str = ""  # digest of tokenizer.json; empty in workdirs of 0.1.0
  digests_since: int | None = None  # checkpoints from this step on have digests; None: of 0.1.0
  prompts: dict[str, str] | None = None  # of the embedder that it started from; None: it did not

  @functools.cached_property
  def skipped_steps(self) -> frozenset[int]:
    """The steps whose rows are passed over."""
    return frozenset(step for entry in self.history for step in entry.get("skip_steps", ()))

  @property
  def fingerprint(self) -> str:
    """Hash of the plan."""
    return hashlib.sha256(json.dumps(self.plan, sort_keys=True).encode()).hexdigest()

  def check_tokenizer(self, workdir: pathlib.Path) -> None:
    """Raises ConfigError where tokenizer.json of the workdir is not that of the run."""
    path = workdir / "tokenizer.json"
    if not path.is_file():
      raise ConfigError(f"{path} is missing; copy the whole workdir")
    if self.tokenizer and files.digest(path) != self.tokenizer:
      raise ConfigError(
        f"{path} is not the tokenizer that the run was trained with; restore it from a copy, or "
        "start training again, which writes it anew"
      )

  def save(self, workdir: pathlib.Path) -> None:
    """Writes run.json."""
    files.write_object(workdir / RUN, {"format_version": FORMAT} | dataclasses.asdict(self))

  @classmethod
  def load(cls, workdir: pathlib.Path) -> "Run":
    """Returns the run of a workdir; fields that joined the configuration later are filled in.

    Raises:
      ConfigError: there is none, it is damaged, or a newer version of the package wrote it.
    """
    path = workdir / RUN
    if not path.is_file():
      what = f"has no {RUN}; this" if workdir.is_dir() else "does not exist; it"
      raise ConfigError(f"{workdir} {what} is not a workdir that a training run wrote")
    run = files.read_object(path, FORMAT)
    try:
      run.pop("format_version", None)
      config = from_mapping(with_older_values(run.pop("config")))
      loaded = cls(config, **vars(typed.from_json(_BesideConfig, run)))
      _ = loaded.skipped_steps  # what is no list of steps is noticed now
    except (ValueError, KeyError, TypeError, AttributeError) as error:  # also ConfigErrors
      raise ConfigError(f"{path}: {error}") from error
    return loaded


@dataclasses.dataclass(frozen=True)
class _BesideConfig:
  """The content of run.json but for the configuration."""

  datasets: dict[str, dict[str, Any]]
  plan: dict[str, Any]
  history: list[dict[str, Any]] = dataclasses.field(default_factory=list)
  tokenizer: str = ""
  digests_since: int | None = None
  prompts: dict[str, str] | None = None


@dataclasses.dataclass(frozen=True)
class StepScores:
  """The held-out scores of one step, content of eval/step_N.json."""

  step: typed.Count
  tasks: dict[str, str]  # the digest of each held-out task that was scored
  scores: list[SliceScore]

  def of_task(self, task: str) -> list[SliceScore]:
    """Returns the scores of one task."""
    return [s for s in self.scores if s.task == task]

  def save(self, workdir: pathlib.Path) -> None:
    """Writes eval/step_N.json."""
    value = {"format_version": SCORES_FORMAT} | dataclasses.asdict(self)
    files.write_object(scores_path(workdir, self.step), value)

  @classmethod
  def load(cls, workdir: pathlib.Path, step: int) -> "StepScores":
    """Returns the scores of a step, none where it was not evaluated.

    Raises:
      ConfigError: the file is damaged, or a newer version of the package wrote it.
    """
    path = scores_path(workdir, step)
    if not path.exists():
      return cls(step, {}, [])
    value = files.read_object(path, SCORES_FORMAT)
    value.pop("format_version", None)
    try:
      scores = [with_depth(score) for score in typed.listed(value, "scores")]
      return typed.from_json(cls, {"tasks": {}} | value | {"scores": scores})
    except ValueError as error:
      raise ConfigError(f"{path}: {error}") from error


def scored_steps(workdir: pathlib.Path) -> list[int]:
  """Returns the steps that have held-out scores, ascending."""
  names = [path.stem.removeprefix("step_") for path in (workdir / "eval").glob("step_*.json")]
  return sorted(int(name) for name in names if name.isdigit())


def scores_path(workdir: pathlib.Path, step: int) -> pathlib.Path:
  """Returns the file of the held-out scores of a step."""
  return workdir / "eval" / f"step_{step}.json"


def mean_scores(workdir: pathlib.Path) -> dict[int, float]:
  """Returns {step: mean over the held-out tasks of the whole model's scores}, the best step first.

  Of equal ones the earliest comes first. Steps that were scored on other tasks than the newest are
  left out, as their means are not comparable, and so are damaged files.
  """
  found = {}
  for step in scored_steps(workdir):
    with contextlib.suppress(ConfigError):  # a damaged file is told where its scores are shown
      found[step] = StepScores.load(workdir, step)
  newest = found[max(found)].tasks if found else {}
  means = {step: _mean(scored) for step, scored in found.items() if scored.tasks == newest}
  ranked = sorted(means, key=lambda step: (-means[step], step))
  return {step: means[step] for step in ranked if math.isfinite(means[step])}


def _mean(scored: StepScores) -> float:
  ascending = sorted(scored.scores, key=lambda s: (s.depth, s.rank, s.dim))
  whole = {s.task: s.score for s in ascending}  # the last one of a task is that of all sizes
  return statistics.fmean(whole.values()) if whole else math.nan


def early_end(workdir: pathlib.Path, patience: int, step: int) -> str | None:
  """Returns why a run that has come to `step` is over by its held-out scores; None: it is not."""
  means = {at: mean for at, mean in mean_scores(workdir).items() if at <= step}
  best = next(iter(means), step)
  since = [at for at in means if at > best]
  if len(since) < patience:
    return None
  return (
    f"no score of the last {len(since)} evaluations is better than {100 * means[best]:.2f} of step "
    f"{best}; the run ends at step {step}, and goes on with a larger eval.patience"
  )
