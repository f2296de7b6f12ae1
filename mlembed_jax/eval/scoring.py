"""Scores of an encoder in many slices, kept by task, and what the slices cost."""

import dataclasses
import hashlib
import json
import os
import pathlib
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Self

import jax

from mlembed_jax import __version__, progress, typed
from mlembed_jax.data import languages
from mlembed_jax.errors import ConfigError, DataError
from mlembed_jax.eval import grid, report
from mlembed_jax.eval.evaluation import BodyCost, Costs, Evaluation, Latency, TaskSummary
from mlembed_jax.eval.grid import Axes
from mlembed_jax.eval.tasks import HeldoutTask, load_folder
from mlembed_jax.files import make_writable_folder, read_object, write_json
from mlembed_jax.inference import Encoder
from mlembed_jax.matryoshka import Slice
from mlembed_jax.models import flops
from mlembed_jax.models.encoder import parameter_count
from mlembed_jax.slice_scores import AsymmetricScore, SliceScore, with_depth

FORMAT = 1  # of a file of a finished task, which states none yet
GRID_PRECISIONS = ("float32", "int8", "binary")
TIMED_TOKENS, TIMED_RUNS = 32, 9  # of the text whose latency is measured


def trained_axes(encoder: Encoder) -> Axes:
  """Returns every trained depth, rank and dim, in all precisions that are scored."""
  trained = encoder.sizes
  return Axes(trained.ranks or (0,), trained.depths, trained.dims, GRID_PRECISIONS)


def one_slice(encoder: Encoder, cut: Slice, precision: str, untrained: bool) -> Axes:
  """Returns the axes of a single slice.

  Raises:
    ValueError: a size that the model lacks, or that was not trained unless `untrained` is True.
  """
  encoder.check(cut.depth, cut.rank, cut.dim, untrained)
  depth = cut.depth or encoder.config().layers
  return Axes((cut.rank or 0,), (depth,), (cut.dim or encoder.dim,), (precision,))


@dataclasses.dataclass(frozen=True)
class TaskScores:
  """The scores of a finished task, kept in a file until all tasks are finished."""

  scores: list[SliceScore]
  truncated: typed.Count  # of its texts were cut
  asymmetric: list[AsymmetricScore] = dataclasses.field(default_factory=list)

  @classmethod
  def load(cls, path: pathlib.Path) -> Self:
    """Returns the content of a file, also of one that version 0.1.0 wrote.

    Raises:
      DataError: it is damaged.
    """
    value = read_object(path, FORMAT, DataError)
    scores = value.pop("records", None)  # version 0.1.0 wrote `records`
    value |= {} if scores is None else {"scores": scores}
    try:
      value["scores"] = [with_depth(score) for score in typed.listed(value, "scores")]
      return typed.from_json(cls, value)
    except ValueError as error:
      raise DataError(f"{path}: {error}; delete it, and the task is scored again") from error


def score_task(encoder: Encoder, task: HeldoutTask, axes: Axes) -> TaskScores:
  """Returns the scores of a task, and how many of its texts were cut.

  Raises:
    DataError: a vector is not finite.
  """
  before = encoder.truncated
  # A single depth needs no layer above it.
  depth = axes.depths[-1] if len(axes.depths) == 1 else None

  def encode(ids: grid.Ids, rank: int) -> Any:
    return encoder.states(ids, axes.depths, depth, rank or None, show_progress_bar=True)

  try:
    with warnings.catch_warnings(action="ignore"):  # texts that are cut are counted
      ids = encoder.ids(task.texts, "")
    scores, asymmetric = grid.score_task_slices(task, ids, axes, encode, pairs=True)
    return TaskScores(scores, encoder.truncated - before, asymmetric)
  except ValueError as error:
    raise DataError(f"{task.name}: {error}") from error


def kept(path: pathlib.Path, make: Callable[[], TaskScores]) -> TaskScores:
  """Returns the scores that a file keeps, which is made if it is not there."""
  if not path.is_file():
    write_json(path, dataclasses.asdict(make()))
  return TaskScores.load(path)


def measure_costs(encoder: Encoder, axes: Axes) -> Costs:
  """Returns what slices cost: parameters and FLOPs by formula, the latency of a text measured."""
  latency_ms = [Latency(depth, _latency_ms(encoder, depth), TIMED_TOKENS) for depth in axes.depths]
  device = f"{jax.local_device_count()} x {jax.local_devices()[0].device_kind}"
  parameters = [_body_cost(encoder, rank, depth) for rank in axes.ranks for depth in axes.depths]
  return Costs(parameters, latency_ms, device)


def _body_cost(encoder: Encoder, rank: int, depth: int) -> BodyCost:
  config = encoder.config(depth, rank or None)
  return BodyCost(rank, depth, parameter_count(config), flops.forward_flops(config, 1.0, 0.0))


def _latency_ms(encoder: Encoder, depth: int) -> float:
  """Returns the median time to encode one text, the program being compiled."""
  times = []
  for _ in range(TIMED_RUNS + 1):
    start = time.perf_counter()
    encoder.states([[0] * TIMED_TOKENS], (depth,), depth)
    times.append(1000 * (time.perf_counter() - start))
  return statistics.median(times[1:])


def check_named(names: Sequence[str]) -> None:
  """Raises DataError where MTEB has no such task, ConfigError where it is not installed."""
  try:
    from mlembed_jax.eval import mteb  # an extra of the package
  except ImportError as error:
    raise ConfigError(f"--tasks: {error}") from error
  for name in names:
    mteb.find_task(name)


def _score_mteb(
  encoder: Encoder, names: Sequence[str], axes: Axes, out: pathlib.Path, language_key: str
) -> list[SliceScore]:
  from mlembed_jax.eval import mteb

  slices = [
    Slice(rank=rank or None, depth=depth, dim=dim)
    for rank in axes.ranks
    for depth in axes.depths
    for dim in axes.dims
  ]
  return mteb.evaluate(encoder, names, slices, out, language_key)


def evaluate_model(
  model: str,
  tasks: Sequence[str | os.PathLike[str]],
  out: str | os.PathLike[str],
  cut: Slice | None = None,
  language_key: str = languages.LANGUAGE_SCRIPT,
) -> Evaluation:
  """Scores an exported model, and writes scores.json and report.html; a notebook's way in.

  Args:
    model: a folder in Hugging Face layout, or hf:ORG/NAME.
    tasks: folders of held-out files with a manifest.json in or above them.
    out: the folder to write.
    cut: the one slice to score, in float32; None: every trained slice, in three precisions.
    language_key: language-script: tags of one language and script, as he, iw and heb_Hebr, count
      as one language; as-written: equal tags alone.

  Raises:
    ConfigError: tasks, out, cut or language_key cannot be used; the tasks are read before the model
      is loaded.
    LoadError, DataError: the model or a file of the tasks cannot be read.
  """
  read = read_tasks(tasks, (), language_key)
  encoder = Encoder.load(model)
  folder = make_out(encoder, out)
  try:
    axes = one_slice(encoder, cut, "float32", untrained=False) if cut else trained_axes(encoder)
  except ValueError as error:
    raise ConfigError(f"cut: {error}") from error
  evaluation = evaluate_encoder(encoder, read, (), axes, folder, None, language_key)
  write_report(evaluation, folder)
  return evaluation


def read_tasks(
  folders: Sequence[str | os.PathLike[str]],
  named: Sequence[str] = (),
  language_key: str = languages.LANGUAGE_SCRIPT,
) -> list[HeldoutTask]:
  """Returns the tasks of folders, which are scored beside those that MTEB calls `named`.

  `language_key` says what counts as one language, as in `evaluate_model`.

  Raises:
    ConfigError: there is no task, or one comes twice; the message names `tasks`.
    DataError: a folder or a file of it cannot be read.
  """
  if isinstance(folders, str | os.PathLike):
    raise ConfigError(f"tasks: {str(folders)!r} is a single name; give a list of folders")
  if not (folders or named) or "" in folders:
    raise ConfigError("tasks: an empty list or name; give folders")
  paths = map(pathlib.Path, folders)
  tasks = [task for path in paths for task in load_folder(path, language_key)]
  names = [*(task.name for task in tasks), *named]
  if twice := [name for name in names if names.count(name) > 1]:
    raise ConfigError(f"tasks: {twice[0]} comes twice; score one at a time")
  for task in tasks:
    if task.unknown:
      said = f"tags of no known language are scored as one each: {task.unknown}"
      print(f"note: {task.name}: {said}", file=sys.stderr, flush=True)
  return tasks


def make_out(encoder: Encoder, out: str | os.PathLike[str]) -> pathlib.Path:
  """Returns the folder of an evaluation, made if needed.

  Raises:
    ConfigError: it lies in the model's folder, or cannot be written; the message names `out`.
  """
  if pathlib.Path(out).resolve().is_relative_to(encoder.folder.resolve()):
    raise ConfigError(f"out: {out} lies in the model's folder; choose another")
  return make_writable_folder(out, "out")


def write_report(evaluation: Evaluation, out: pathlib.Path) -> None:
  """Writes scores.json and report.html, a page about them."""
  evaluation.save(out / "scores.json")
  report.write_page(out / "report.html", evaluation)


def evaluate_encoder(
  encoder: Encoder,
  tasks: Sequence[HeldoutTask],
  named: Sequence[str],
  axes: Axes,
  out: pathlib.Path,
  pooled_token: str | None = None,
  language_key: str = languages.LANGUAGE_SCRIPT,
) -> Evaluation:
  """Returns what was scored, the score of every slice in every task, and what slices cost.

  Args:
    encoder: the model.
    tasks: held-out tasks that are scored here.
    named: names of tasks of MTEB, scored by MTEB.
    axes: depths, ranks, dims and precisions to score.
    out: folder where the scores of finished tasks are kept; those of the same settings are read.
    pooled_token: the token that was given to `Encoder.load`, if any.
    language_key: how the tasks were read, see `read_tasks`.

  Raises:
    LoadError: the model's vectors are not compared by their cosine.
  """
  encoder.check_similarity()
  settings = _settings(encoder, axes, pooled_token)
  if language_key == languages.AS_WRITTEN:
    settings.append(language_key)
  scored = []
  with progress.count("scoring", len(tasks), " tasks") as bar:
    for task in tasks:
      digest = hashlib.sha256(json.dumps([*settings, task.name, task.digest]).encode()).hexdigest()
      file = out / "tasks" / f"{digest[:24]}.json"
      scored.append(kept(file, lambda task=task: score_task(encoder, task, axes)))
      bar.update()
  _say_unpaired(tasks, scored, axes, out)
  scores = [_with_keys(found, language_key) for task in scored for found in task.scores]
  scores += _score_mteb(encoder, named, axes, out / "mteb", language_key) if named else []
  return Evaluation(
    model=encoder.name,
    precisions=list(axes.precisions),
    tasks=_summaries(tasks, scores),
    scores=scores,
    costs=measure_costs(encoder, axes),
    skipped={"texts_truncated": sum(task.truncated for task in scored)},
    asymmetric=[found for task in scored for found in task.asymmetric],
  )


def _say_unpaired(
  tasks: Sequence[HeldoutTask], scored: Sequence[TaskScores], axes: Axes, out: pathlib.Path
) -> None:
  """Says which kept scores an earlier version wrote, without those of queries at another size."""
  several = max(len(axes.ranks), len(axes.depths)) > 1
  both = zip(tasks, scored, strict=True)
  if old := [t.name for t, s in both if several and t.has_documents and not s.asymmetric]:
    print(
      f"note: {', '.join(old)}: kept as an earlier version scored them, without queries at another "
      f"size than documents; remove {out / 'tasks'} to have them scored again",
      file=sys.stderr,
      flush=True,
    )


def _with_keys(score: SliceScore, language_key: str) -> SliceScore:
  """Returns a score with keys for languages; 0.1.0 kept their tags."""
  by_language = {
    languages.language_key(tag, language_key): value for tag, value in score.by_language.items()
  }
  return dataclasses.replace(score, by_language=by_language)


def _settings(encoder: Encoder, axes: Axes, pooled_token: str | None) -> list[Any]:
  """Returns what decides the scores of any task, in the words of 0.1.0, as hashes depend on them.

  So an evaluation that 0.1.0 began goes on.
  """
  slices = {"exits" if k == "depths" else k: v for k, v in dataclasses.asdict(axes).items()}
  settings = [__version__, encoder.fingerprint, encoder.config().dtype, encoder.max_seq_length]
  return [*settings, pooled_token, slices]


def _summaries(tasks: Sequence[HeldoutTask], scores: Sequence[SliceScore]) -> list[TaskSummary]:
  """Returns what was scored; how many texts MTEB has is not known here."""
  held_out = {task.name: task for task in tasks}
  first = {score.task: score for score in reversed(scores)}
  return [_summary(score, held_out.get(score.task)) for score in reversed(first.values())]


def _summary(score: SliceScore, task: HeldoutTask | None) -> TaskSummary:
  task_type, texts = (task.type, len(task.texts)) if task else ("mteb", None)
  return TaskSummary(score.task, task_type, score.metric, texts, len(score.by_language))
