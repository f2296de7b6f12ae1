"""Where the numbers of a run go beside metrics.jsonl: TensorBoard, Weights & Biases, MLflow.

Each tracker works in a thread of its own, with what it is given in a queue: one that is slow or
fails neither delays nor ends the training. Only process 0 has any. WORKDIR/trackers.json keeps the
names of the runs, so that the same command goes on in the same ones.
"""

import contextlib
import importlib
import os
import pathlib
import queue
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from mlembed_jax import progress
from mlembed_jax.config import flatten
from mlembed_jax.config_fields import Config
from mlembed_jax.errors import ConfigError
from mlembed_jax.files import read_object, write_object
from mlembed_jax.parallel import processes
from mlembed_jax.slice_scores import SliceScore
from mlembed_jax.training.saved import first_line

FILE = "trackers.json"
FORMAT = 1
PROJECT = "mlembed_jax"  # of W&B, and the experiment of MLflow, unless their variables name another
CLOSE_S = 60.0  # so long the end of a run waits for what is on its way
MOST_WAITING = 10_000  # lines that wait for a tracker; of about 1 KB each
BATCH = 100  # MLflow takes so many parameters at a time, and more metrics

Values = Mapping[str, float]


class Tracker(Protocol):
  """A program that shows the numbers of runs. All methods are called in one thread."""

  def set_config(self, config: Config) -> None:
    """Shows the settings of the run."""

  def resume(self, step: int) -> None:
    """Goes on from a step: what was logged of later ones is of no worth."""

  def log(self, step: int, values: Values) -> None:
    """Shows the numbers of a line of metrics.jsonl."""

  def log_scores(self, step: int, scores: Sequence[SliceScore]) -> None:
    """Shows held-out scores of slices."""

  def close(self, finished: bool) -> None:
    """Ends the run, or leaves it to the next start."""


def flat_values(line: Mapping[str, Any]) -> dict[str, float]:
  """Returns the numbers of a line of metrics.jsonl but its step, those in groups as GROUP/NAME."""
  flat: dict[str, float] = {}
  for name, value in line.items():
    inner = value if isinstance(value, Mapping) else {"": value}
    flat |= {f"{name}/{key}" if key else name: number for key, number in inner.items()}
  flat.pop("step", None)
  return flat


def score_values(scores: Sequence[SliceScore], most_cuts: int = 3) -> dict[str, float]:
  """Returns {TASK/METRIC/CUTS: score} of slices with at most so many axes cut; `full` has none."""
  axes = ("rank", "depth", "dim")
  full = {axis: max((getattr(s, axis) for s in scores), default=0) for axis in axes}
  found: dict[str, float] = {}
  for s in scores:
    cuts = [f"{axis}_{getattr(s, axis)}" for axis in axes if getattr(s, axis) != full[axis]]
    if len(cuts) <= most_cuts:
      found[f"{s.task}/{s.metric}/{'-'.join(cuts) or 'full'}"] = s.score
  return found


class TensorBoard:
  """Files in WORKDIR/tensorboard."""

  def __init__(self, workdir: pathlib.Path):
    # It brings torch, where that is installed, which takes 1.6 s.
    self._library = importlib.import_module("tensorboardX")
    self._folder = workdir / "tensorboard"
    self._board: Any = None

  def set_config(self, config: Config) -> None:
    """Shows nothing: run.json beside the files has the settings."""

  def resume(self, step: int) -> None:
    """Begins a file that hides the steps after `step` of the files before."""
    self.close(finished=False)
    self._board = self._library.SummaryWriter(str(self._folder), purge_step=step + 1)

  def log(self, step: int, values: Values) -> None:
    """Shows numbers of a step."""
    assert self._board, "it was not told where the run goes on"
    for name, value in values.items():
      self._board.add_scalar(name, value, step)

  def log_scores(self, step: int, scores: Sequence[SliceScore]) -> None:
    """Shows the scores of the whole model, and with one axis cut at a time."""
    # In a folder TensorBoard follows the newest file alone: beside those of the steps, this one
    # would end their curves.
    folder = str(self._folder / "eval")
    with self._library.SummaryWriter(folder, filename_suffix=f".{step}") as board:
      for name, value in score_values(scores, most_cuts=1).items():
        board.add_scalar(name, value, step)

  def close(self, finished: bool) -> None:
    """Writes what is left."""
    if self._board:
      self._board.close()


class WandB:
  """A run of Weights & Biases, with its own variables (WANDB_MODE, WANDB_PROJECT, ...)."""

  remedy = "log in by `wandb login`, or set WANDB_MODE=offline"

  def __init__(self, workdir: pathlib.Path, run_id: str | None):
    wandb, env = importlib.import_module("wandb"), os.environ
    self._run = wandb.init(
      id=run_id or env.get("WANDB_RUN_ID") or secrets.token_hex(4),
      resume="allow",
      reinit="create_new",  # else a run of the program that calls us would be taken, and ended
      dir=env.get("WANDB_DIR", str(workdir)),
      project=env.get("WANDB_PROJECT", PROJECT),
      name=env.get("WANDB_NAME", workdir.name),
      settings=wandb.Settings(finish_timeout=0.8 * CLOSE_S),  # 0 would wait for ever
    )
    self.run_id = self._run.id
    # W&B counts steps by itself and drops what it is given of earlier ones, as they come where a
    # run goes back to a checkpoint. With an axis of our own all are kept.
    self._run.define_metric("*", step_metric="step")

  def set_config(self, config: Config) -> None:
    """Shows the settings of the run, which may differ from those of an earlier start."""
    self._run.config.update(flatten(config), allow_val_change=True)

  def resume(self, step: int) -> None:
    """Nothing is to be done: of a step that comes again, both lines are kept."""

  def log(self, step: int, values: Values) -> None:
    """Shows numbers of a step."""
    self._run.log({"step": step, **values})

  def log_scores(self, step: int, scores: Sequence[SliceScore]) -> None:
    """Shows the scores of all slices."""
    self.log(step, _under_eval(score_values(scores)))

  def close(self, finished: bool) -> None:
    """Ends the run; one that goes on later counts as failed until then."""
    self._run.finish(exit_code=0 if finished else 1)


class MLflow:
  """A run of MLflow, with its own variables (MLFLOW_TRACKING_URI, ...); else in WORKDIR/mlflow.db.

  The run is held by a client of its own: it is no active run, and disturbs none of a notebook.
  """

  remedy = "see MLFLOW_TRACKING_URI and MLFLOW_EXPERIMENT_NAME"

  def __init__(self, workdir: pathlib.Path, run_id: str | None):
    mlflow, env = importlib.import_module("mlflow"), os.environ
    self._error: Any = importlib.import_module("mlflow.exceptions").MlflowException
    self._entities: Any = importlib.import_module("mlflow.entities")
    uri = env.get("MLFLOW_TRACKING_URI") or f"sqlite:///{workdir.absolute()}/mlflow.db"
    self._client = mlflow.MlflowClient(uri)
    run_id = run_id or env.get("MLFLOW_RUN_ID")
    self.run_id = self._go_on(run_id, workdir) if run_id else self._create(workdir)

  def _go_on(self, run_id: str, workdir: pathlib.Path) -> str:
    try:
      self._client.update_run(run_id, status="RUNNING")
    except self._error as error:
      if error.error_code != "RESOURCE_DOES_NOT_EXIST":
        raise
      progress.say(f"mlflow: {self._client.tracking_uri} has no run {run_id}; it gets a new one")
      return self._create(workdir)
    return run_id

  def _create(self, workdir: pathlib.Path) -> str:
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
    experiment = self._client.get_experiment_by_name(name)
    number = experiment.experiment_id if experiment else self._client.create_experiment(name)
    return self._client.create_run(number, run_name=workdir.name).info.run_id

  def set_config(self, config: Config) -> None:
    """Shows the settings that the run was begun with: MLflow lets none be changed."""
    there = self._client.get_run(self.run_id).data.params
    new = [(name, value) for name, value in flatten(config).items() if name not in there]
    params = [self._entities.Param(name, str(value)) for name, value in new]
    self._send(params=params)

  def resume(self, step: int) -> None:
    """Nothing is to be done: of a step that comes again, both numbers are kept."""

  def log(self, step: int, values: Values) -> None:
    """Shows numbers of a step."""
    now = int(1000 * time.time())
    metric = self._entities.Metric
    metrics = [metric(_mlflow_name(k), float(v), now, step) for k, v in values.items()]
    self._send(metrics=metrics)

  def _send(self, **items: list[Any]) -> None:
    ((kind, values),) = items.items()
    for start in range(0, len(values), BATCH):
      self._client.log_batch(self.run_id, **{kind: values[start : start + BATCH]})

  def log_scores(self, step: int, scores: Sequence[SliceScore]) -> None:
    """Shows the scores of all slices."""
    self.log(step, _under_eval(score_values(scores)))

  def close(self, finished: bool) -> None:
    """Ends the run; one that goes on later counts as killed until then."""
    self._client.set_terminated(self.run_id, "FINISHED" if finished else "KILLED")


def _under_eval(values: Values) -> dict[str, float]:
  return {f"eval/{name}": value for name, value in values.items()}


def _mlflow_name(name: str) -> str:
  """Returns a name that MLflow takes; it has other characters as code points: a_23_b for a#b."""
  return re.sub(r"[^\w\-. :/]", lambda found: f"_{ord(found[0]):x}_", name)


# Those that are services have packages of their own, by extras of these names in pyproject.toml.
SERVICES = {"wandb": WandB, "mlflow": MLflow}


def check_installed(names: Sequence[str]) -> None:
  """Raises ConfigError, with the command of pip, where a package of a tracker is not installed."""
  for name in SERVICES.keys() & names:
    try:
      importlib.import_module(name)
    except ImportError as error:
      command = f'pip install "mlembed_jax[{name}]"'
      raise ConfigError(f"train.trackers: {name} is not installed: {command}") from error


class _Feed:
  """A tracker with its thread."""

  def __init__(self, name: str, tracker: Tracker):
    self.name, self._tracker, self._failed = name, tracker, 0
    self._waiting: queue.Queue[Callable[[Tracker], None] | None] = queue.Queue(MOST_WAITING)
    self._thread = threading.Thread(target=self._work, name=name, daemon=True)
    self._thread.start()

  def put(self, act: Callable[[Tracker], None] | None) -> None:
    """Lets the thread do something with the tracker; None ends it."""
    try:
      self._waiting.put_nowait(act)
    except queue.Full:
      self._fail("it is too slow")

  def _work(self) -> None:
    while act := self._waiting.get():
      try:
        act(self._tracker)
      except Exception as error:  # whatever a library raises, training goes on
        self._fail(f"{type(error).__name__}: {first_line(error)}")

  def _fail(self, why: str) -> None:
    self._failed += 1
    if self._failed == 1:
      progress.say(f"WARNING: {self.name}: {why}. Training goes on; metrics.jsonl has all lines")

  def join(self, seconds: float) -> None:
    """Waits for the thread, and says what is missing."""
    self._thread.join(max(0.0, seconds))
    missing = self._failed + self._waiting.qsize()
    if missing or self._thread.is_alive():
      progress.say(f"WARNING: {self.name}: at least {max(1, missing)} entries were not taken")


class Trackers:
  """All trackers of a run."""

  def __init__(self, trackers: Mapping[str, Tracker]):
    self._feeds = [_Feed(name, tracker) for name, tracker in trackers.items()]

  def _each(self, act: Callable[[Tracker], None]) -> None:
    for feed in self._feeds:
      feed.put(act)

  def set_config(self, config: Config) -> None:
    """Shows the settings of the run."""
    self._each(lambda tracker: tracker.set_config(config))

  def resume(self, step: int) -> None:
    """Goes on from a step."""
    self._each(lambda tracker: tracker.resume(step))

  def log(self, line: Mapping[str, Any]) -> None:
    """Shows a line of metrics.jsonl."""
    step, values = line["step"], flat_values(line)
    self._each(lambda tracker: tracker.log(step, values))

  def log_scores(self, step: int, scores: Sequence[SliceScore]) -> None:
    """Shows held-out scores."""
    self._each(lambda tracker: tracker.log_scores(step, scores))

  def close(self, finished: bool) -> None:
    """Ends all trackers, and waits `CLOSE_S` seconds for them at most."""
    self._each(lambda tracker: tracker.close(finished))
    end = time.monotonic() + CLOSE_S
    for feed in self._feeds:
      feed.put(None)
    for feed in self._feeds:
      feed.join(end - time.monotonic())


@contextlib.contextmanager
def tracked(config: Config, workdir: pathlib.Path, *, resumed: bool) -> Iterator[Trackers]:
  """Yields the trackers of a run: on process 0 those of `train.trackers`, else none.

  Raises:
    ConfigError: one cannot begin. Where the run is `resumed`, that is a sentence: a service that is
      gone keeps no run from going on.
  """
  trackers: dict[str, Tracker] = {}
  try:
    with processes.agreed():
      for name in config.train.trackers if processes.is_first() else ():
        with _told(name, resumed):
          trackers[name] = _begun(name, workdir)
  except BaseException:  # those that have begun are not left open
    Trackers(trackers).close(finished=False)
    raise
  opened, finished = Trackers(trackers), False
  try:
    yield opened
    finished = True
  finally:
    opened.close(finished)


@contextlib.contextmanager
def _told(name: str, resumed: bool) -> Iterator[None]:
  try:
    yield
  except ConfigError:
    raise
  except Exception as error:  # whatever a library raises
    said = f"{name} cannot begin ({type(error).__name__}: {first_line(error)})"
    if not resumed:
      raise ConfigError(f"train.trackers: {said}; {SERVICES[name].remedy}") from error
    progress.say(f"WARNING: {said}. The run goes on without it; metrics.jsonl has all lines")


def _begun(name: str, workdir: pathlib.Path) -> Tracker:
  if name not in SERVICES:
    return TensorBoard(workdir)
  path = workdir / FILE
  runs = read_object(path, FORMAT)["runs"] if path.is_file() else {}
  tracker = SERVICES[name](workdir, runs.get(name))
  write_object(path, {"format_version": FORMAT, "runs": runs | {name: tracker.run_id}})
  return tracker
