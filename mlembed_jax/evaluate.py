"""Scores an exported model on held-out tasks, whole, cut, or in every trained slice.

  python -m mlembed_jax.evaluate --model DIR --tasks FOLDER --out OUT
  python -m mlembed_jax.evaluate --model DIR --tasks FOLDER,mteb:STS17 --grid --out OUT

Writes OUT/scores.json and OUT/report.html, one file that any browser shows. The same command goes
on after a stop: tasks that were scored with the same settings are not scored again.
"""

import dataclasses
import hashlib
import json
import pathlib
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from absl import flags
from tqdm import tqdm

from mlembed_jax import __version__, cli
from mlembed_jax.errors import ConfigError, DataError
from mlembed_jax.eval import grid, report, summary
from mlembed_jax.eval.grid import Axes, Record
from mlembed_jax.eval.tasks import Task, load_folder
from mlembed_jax.files import make_writable_folder, write_json
from mlembed_jax.inference import Encoder
from mlembed_jax.matryoshka import Slice
from mlembed_jax.models import flops
from mlembed_jax.models.encoder import parameter_count
from mlembed_jax.quantize import PRECISIONS

MODEL = flags.DEFINE_string(
  "model", None, "Folder in Hugging Face layout, or hf:ORG/NAME.", required=True
)
TASKS = flags.DEFINE_list(
  "tasks",
  None,
  "Folders of held-out files with a manifest.json in or above them, and mteb:NAME for tasks of "
  "MTEB, separated by commas.",
  required=True,
)
OUT = flags.DEFINE_string("out", None, "Folder to write.", required=True)
GRID = flags.DEFINE_bool("grid", False, "Score every trained depth, dim, rank, and 3 precisions.")
DEPTH = flags.DEFINE_integer("depth", None, "Layers to use; a trained exit. Default: all.")
RANK = flags.DEFINE_integer("rank", None, "Rank of the token table; a trained one. Default: all.")
DIM = flags.DEFINE_integer("dim", None, "Dimensions; a trained size. Default: all.")
UNTRAINED = flags.DEFINE_bool("untrained", False, "Allow sizes that were not trained.")
PRECISION = flags.DEFINE_enum("precision", "float32", PRECISIONS, "Of the vectors.")
POOLED_TOKEN = flags.DEFINE_string(
  "pooled_token", None, "Token that ends every text, of a folder that does not say which."
)
MAX_TOKENS = flags.DEFINE_integer(
  "max_tokens", None, "Of a text, longer ones are cut. Default: what the model allows.", 2
)

MTEB = "mteb:"  # begins the name of a task of MTEB
MTEB_LACKS = (PRECISION, UNTRAINED)
GRID_PRECISIONS = ("float32", "int8", "binary")
TIMED_TOKENS, TIMED_RUNS = 32, 9  # of the text whose latency is measured


def axes_of(encoder: Encoder) -> Axes:
  """Returns the slices that the flags ask for.

  Raises:
    ConfigError: a size that the model lacks or that was not trained; --grid beside a slice.
  """
  if GRID.value:
    if flag := next((f.name for f in (DEPTH, RANK, DIM, PRECISION, UNTRAINED) if f.present), None):
      raise ConfigError(f"--{flag}: --grid scores all trained sizes; give one of the two")
    trained = encoder.sizes
    return Axes(trained.ranks or (0,), trained.depths, trained.dims, GRID_PRECISIONS)
  try:
    encoder.check(DEPTH.value, RANK.value, DIM.value, UNTRAINED.value)
  except ValueError as error:
    raise ConfigError(f"--{error}") from error
  depth = DEPTH.value or encoder.config().layers
  return Axes((RANK.value or 0,), (depth,), (DIM.value or encoder.dim,), (PRECISION.value,))


def score(encoder: Encoder, task: Task, axes: Axes) -> dict[str, Any]:
  """Returns the records of a task, and how many of its texts were cut.

  Raises:
    DataError: a vector is not finite.
  """
  before, bar = encoder.truncated, sys.stderr.isatty()
  # A single exit needs no layer above it.
  depth = axes.exits[-1] if len(axes.exits) == 1 else None

  def encode(ids: grid.Ids, rank: int) -> Any:
    return encoder.states(ids, axes.exits, depth, rank or None, show_progress_bar=bar)

  try:
    with warnings.catch_warnings(action="ignore"):  # texts that are cut are counted
      ids = encoder.ids(task.texts, "")
    records = grid.score(task, ids, axes, encode)
    return {"records": records, "truncated": encoder.truncated - before}
  except ValueError as error:
    raise DataError(f"{task.name}: {error}") from error


def kept(path: pathlib.Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
  """Returns the JSON object of a file, which is made if it is not there."""
  if not path.is_file():
    write_json(path, make())
  return json.loads(path.read_text(encoding="utf-8"))


def costs(encoder: Encoder, axes: Axes) -> dict[str, Any]:
  """Returns what slices cost: parameters and FLOPs by formula, the latency of a text measured."""
  sizes = [(rank, depth) for rank in axes.ranks for depth in axes.exits]
  configs = {size: encoder.config(size[1], size[0] or None) for size in sizes}
  return {
    "parameters": [
      {
        "rank": rank,
        "exit": depth,
        "count": parameter_count(config),
        "flops_per_token": flops.forward_flops(config, 1.0, 0.0),
      }
      for (rank, depth), config in configs.items()
    ],
    "latency_ms": [
      {"exit": depth, "ms": _latency_ms(encoder, depth), "tokens": TIMED_TOKENS}
      for depth in axes.exits
    ],
    "device": f"{jax.local_device_count()} x {jax.local_devices()[0].device_kind}",
  }


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


def _of_mteb(encoder: Encoder, names: Sequence[str], axes: Axes, out: pathlib.Path) -> list[Record]:
  from mlembed_jax.eval import mteb

  slices = [
    Slice(rank=rank or None, depth=depth, dim=dim)
    for rank in axes.ranks
    for depth in axes.exits
    for dim in axes.dims
  ]
  return mteb.evaluate(encoder, names, slices, out)


def evaluate(
  encoder: Encoder, tasks: Sequence[Task], named: Sequence[str], axes: Axes, out: pathlib.Path
) -> dict[str, Any]:
  """Returns scores.json: what was scored, the records of every slice, and what slices cost."""
  settings = [__version__, encoder.fingerprint, encoder.config().dtype, encoder.max_seq_length]
  settings += [POOLED_TOKEN.value, dataclasses.asdict(axes)]
  scored = []
  for task in tqdm(tasks, desc="tasks", disable=None):
    digest = hashlib.sha256(json.dumps([*settings, task.name, task.digest]).encode()).hexdigest()
    file = out / "tasks" / f"{digest[:24]}.json"
    scored.append(kept(file, lambda task=task: score(encoder, task, axes)))
  records = [record for task in scored for record in task["records"]]
  records += _of_mteb(encoder, named, axes, out / "mteb") if named else []
  texts = {task.name: {"type": task.type, "texts": len(task.texts)} for task in tasks}
  return {
    "model": encoder.name,
    "precisions": list(axes.precisions),
    "tasks": _described(records, texts),
    "scores": records,
    "costs": costs(encoder, axes),
    "skipped": {"texts_truncated": sum(task["truncated"] for task in scored)},
  }


def _described(records: Sequence[Record], texts: Mapping[str, Any]) -> list[dict[str, Any]]:
  """Returns what was scored; how many texts MTEB has is not known here."""
  first = {record["task"]: record for record in reversed(records)}
  return [
    {"name": name, "type": "mteb", "metric": record["metric"], "texts": None}
    | texts.get(name, {})
    | {"languages": len(record["by_language"])}
    for name, record in reversed(first.items())
  ]


def _read_tasks() -> tuple[list[Task], list[str]]:
  """Returns the tasks of folders, and the names of those of MTEB."""
  if not TASKS.value or not all(TASKS.value):
    raise ConfigError("--tasks: an empty name; give folders, or mteb:NAME")
  named = [name.removeprefix(MTEB) for name in TASKS.value if name.startswith(MTEB)]
  folders = [name for name in TASKS.value if not name.startswith(MTEB)]
  if named and (flag := next((f.name for f in MTEB_LACKS if f.value != f.default), None)):
    raise ConfigError(f"--{flag}: tasks of MTEB have trained sizes in float32 alone")
  tasks = [task for folder in folders for task in load_folder(pathlib.Path(folder))]
  names = [*(task.name for task in tasks), *named]
  if twice := [name for name in names if names.count(name) > 1]:
    raise ConfigError(f"--tasks: {twice[0]} comes twice; score one at a time")
  if named:
    check_named(named)  # before hours of work
  return tasks, named


def main() -> None:
  """Reads the flags."""
  tasks, named = _read_tasks()
  encoder = Encoder.load(MODEL.value, pooled_token=POOLED_TOKEN.value)
  if pathlib.Path(OUT.value).resolve().is_relative_to(encoder.folder.resolve()):
    raise ConfigError(f"--out: {OUT.value} lies in the model's folder; choose another")
  out = make_writable_folder(OUT.value, "--out")
  if MAX_TOKENS.value:
    encoder.max_seq_length = min(encoder.max_seq_length, MAX_TOKENS.value)
  evaluation = evaluate(encoder, tasks, named, axes_of(encoder), out)
  write_json(out / "scores.json", evaluation)
  report.write(out / "report.html", evaluation)
  print(summary.text_table(evaluation))
  if cut := evaluation["skipped"]["texts_truncated"]:
    print(f"\n{cut:,} texts were cut to {encoder.max_seq_length} tokens")
  print(f"\n{out / 'scores.json'}\n{out / 'report.html'}")


if __name__ == "__main__":
  cli.run(main)
