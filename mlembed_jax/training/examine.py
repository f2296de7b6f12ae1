"""What `mlembed_jax.doctor` says of a workdir: whether each of its files is what was written."""

import dataclasses
import pathlib
from collections.abc import Callable, Iterator

from mlembed_jax import files
from mlembed_jax.errors import ConfigError
from mlembed_jax.hf.checks.finding import ERROR, OK, WARNING, Finding
from mlembed_jax.training import goodput, metrics, saved
from mlembed_jax.training.checkpoint import DAMAGED
from mlembed_jax.workdir import Run, StepScores, scored_steps

Findings = Iterator[Finding]


def examine(workdir: pathlib.Path) -> list[Finding]:
  """Returns what every check finds, at least one finding of each."""
  found: list[Finding] = []
  for code, (name, check) in CHECKS.items():
    if code != "W01" and found[0].level == ERROR:
      break  # all others need run.json
    of_check = list(check(workdir)) or [Finding(OK, "", (check.__doc__ or "").rstrip("."))]
    found += [dataclasses.replace(finding, check=code, name=name) for finding in of_check]
  return found


def _check_run(workdir: pathlib.Path) -> Findings:
  """run.json can be read."""
  try:
    Run.load(workdir)
  except ConfigError as error:
    yield Finding(ERROR, "run.json", str(error), "Restore it from a copy: nothing can be exported.")


def _check_tokenizer(workdir: pathlib.Path) -> Findings:
  """tokenizer.json is the one that the run reads."""
  try:
    Run.load(workdir).check_tokenizer(workdir)
  except ConfigError as error:
    yield Finding(ERROR, "tokenizer.json", str(error), "Start training again: it is written anew.")


def _check_checkpoints(workdir: pathlib.Path) -> Findings:
  """every checkpoint is whole."""
  steps = saved.steps_of(workdir)
  if not steps:
    yield Finding(WARNING, "checkpoints", "none is there", "The next start begins at step 0.")
  for step in steps:
    folder = saved.folder_of(workdir, step)
    name = folder.relative_to(workdir).as_posix()
    with saved.holding(workdir, step):
      fault = saved.damage(folder)
      if fault and folder.is_dir():  # else the run has deleted it meanwhile
        yield Finding(ERROR, name, fault, "Training passes it over and sets it aside.")
      elif not fault and (why := saved.unchecked(folder)):
        yield Finding(WARNING, name, why, "Damage of its bytes cannot be found.")
  for folder in sorted((workdir / DAMAGED).glob("*")):
    yield Finding(WARNING, f"{DAMAGED}/{folder.name}", "was set aside", "Delete it to free space.")


def _check_scores(workdir: pathlib.Path) -> Findings:
  """the held-out scores can be read."""
  for step in scored_steps(workdir):
    try:
      StepScores.load(workdir, step)
    except ConfigError as error:
      yield Finding(ERROR, f"eval/step_{step}.json", str(error), "Delete it: it is made again.")


def _check_metrics(workdir: pathlib.Path) -> Findings:
  """metrics.jsonl has a line of every logged step."""
  every = Run.load(workdir).config.train.log_every
  said = metrics.faults(workdir / "metrics.jsonl", max(saved.steps_of(workdir), default=0), every)
  for fault in said:
    yield Finding(WARNING, "metrics.jsonl", fault, "Curves have a gap there; updates have none.")


def _check_goodput(workdir: pathlib.Path) -> Findings:
  """goodput.json can be read."""
  path = workdir / goodput.FILE
  if path.is_file():
    try:
      files.read_object(path, goodput.FORMAT)
    except ConfigError as error:
      yield Finding(WARNING, path.name, str(error), "The next start begins a new one.")


def _check_frozen(workdir: pathlib.Path) -> Findings:
  """frozen parameters, if there are any, are what was written."""
  try:
    saved.check_frozen(workdir, Run.load(workdir).config)
  except ConfigError as error:
    yield Finding(ERROR, saved.FROZEN, str(error), "Without them nothing can be exported.")


CHECKS: dict[str, tuple[str, Callable[[pathlib.Path], Findings]]] = {
  "W01": ("run", _check_run),
  "W02": ("tokenizer", _check_tokenizer),
  "W03": ("checkpoints", _check_checkpoints),
  "W04": ("scores", _check_scores),
  "W05": ("metrics", _check_metrics),
  "W06": ("goodput", _check_goodput),
  "W07": ("frozen parameters", _check_frozen),
}
