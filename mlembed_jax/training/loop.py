"""The loop of one run: from its inputs to the last checkpoint and the export. It knows no flags.

The same call with the same workdir goes on from the newest checkpoint, bit for bit as if the run
had never stopped. SIGTERM and Ctrl-C during training save a checkpoint first.
"""

import dataclasses
import functools
import os
import pathlib
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import Mesh

from mlembed_jax import __version__
from mlembed_jax.config import flatten
from mlembed_jax.config_fields import Config
from mlembed_jax.data import loader, read_ahead
from mlembed_jax.data.sample import sample_ids
from mlembed_jax.devices import compiler
from mlembed_jax.errors import ConfigError, TrainingError
from mlembed_jax.eval import grid, summary
from mlembed_jax.files import copy_file, make_writable_folder
from mlembed_jax.hf import stored_ranges
from mlembed_jax.hf.export import TrainedModel, check_target, export_folder
from mlembed_jax.hf.folder import resolve
from mlembed_jax.hf.load import load_params
from mlembed_jax.matryoshka import Slice
from mlembed_jax.parallel import processes
from mlembed_jax.parallel.sharding import batch_shards, logical_rules, make_mesh, put_batch, rows_of
from mlembed_jax.parallel.stop import StopSignals
from mlembed_jax.training import (
  inputs,
  lowering,
  metrics,
  micro_batch,
  optimizer,
  train_state,
  train_step,
)
from mlembed_jax.training.checkpoint import Checkpoints, check_same_run
from mlembed_jax.training.inputs import Inputs
from mlembed_jax.training.teacher import Teacher
from mlembed_jax.training.train_state import TrainState
from mlembed_jax.workdir import Run, StepScores


@dataclasses.dataclass(frozen=True)
class Training:
  """A run that is under way: all but its state."""

  config: Config  # data.micro_batch is chosen
  inputs: Inputs
  workdir: pathlib.Path
  mesh: Mesh
  checkpoints: Checkpoints
  stop: StopSignals
  step: Callable[..., Any]  # step(state, batch, kind=...) -> (state, metrics)
  batches: loader.Batches


def make_batches(config: Config, inputs: Inputs, mesh: Mesh, steps: int) -> loader.Batches:
  """Returns this process's part of every batch of the run."""
  part, parts = rows_of(jax.process_index(), mesh)
  placement = loader.Placement(config.data.micro_batch, batch_shards(mesh.shape), part, parts)
  order = inputs.plan.order()
  return loader.Batches(inputs.split, order, inputs.tokenizer, inputs.options, placement, steps)


def initial_state(training: Training) -> TrainState:
  """Returns the state to go on from: newest checkpoint, else `train.init_from`, else random."""
  config, mesh, checkpoints = training.config, training.mesh, training.checkpoints
  tx = optimizer.make(config.optimizer, len(training.batches))
  if (latest := checkpoints.latest()) is not None:
    return checkpoints.restore(latest, train_state.abstract(config, tx, mesh))
  state = train_state.create(config, tx, mesh)
  if config.train.init_from:
    like = train_state.abstract(config, tx, mesh).params
    state = state.replace(params=None)  # their memory is needed
    state = state.replace(params=load_params(resolve(config.train.init_from), config.model, like))
  return state


def make_step(
  config: Config, steps: int, mesh: Mesh, teacher: Teacher | None
) -> Callable[..., Any]:
  """Returns `step(state, batch, kind=...)`; a teacher's weights are read here."""
  step = train_step.make(config, steps, mesh, teacher.shape if teacher else None)
  return functools.partial(step, teacher_params=teacher.params(mesh) if teacher else None)


def timed(batches: Iterator[loader.Batch]) -> Iterator[tuple[loader.Batch, float]]:
  """Yields each batch and the seconds it was waited for."""
  start = time.perf_counter()
  for batch in batches:
    yield batch, time.perf_counter() - start
    start = time.perf_counter()


def fit(training: Training, state: TrainState, recorder: metrics.Recorder) -> TrainState:
  """Returns the state after the last step.

  A stop signal ends the program after its step (status 128 + signal). Both states are saved.

  The device is never waited for: the numbers of a step are read while the next one runs, and so
  is its batch fetched and sent to the device.
  """
  config, stop, batches = training.config, training.stop, training.batches
  pending, start = None, int(state.step)
  with jax.transfer_guard("disallow"):
    for batch, waited_s in timed(read_ahead.iterate(batches, start, config.data.workers)):
      # To jax, parts of global arrays are implicit transfers.
      with jax.transfer_guard_host_to_device("allow"):
        arrays, signals = put_batch(batch.arrays(), training.mesh), stop.exchange()
      state, values = training.step(state, arrays, kind=batch.kind)
      if pending:
        recorder.record(*pending)
      pending = batch, values, waited_s
      done, stopping = batch.step + 1, stop.agreed(signals)
      last = done == len(batches)
      # A machine that is taken away has seconds left; the next start evaluates. One that is taken
      # away while it evaluates finds this step saved.
      scored = evaluated_at(config, done) and not last and not stopping
      if done % config.train.checkpoint_every == 0 or last or stopping or scored:
        recorder.record(*pending)  # a diverged state is noticed here, before it is saved
        pending = None
        training.checkpoints.save(done, state)
      if scored:
        with recorder.paused(), jax.transfer_guard("allow"):
          evaluate(training, state)
      if stopping:
        training.checkpoints.close()
        stop.leave(stopping, f"step {done} is saved")
  return state


def evaluated_at(config: Config, step: int) -> bool:
  """Returns whether held-out scores of a step are wanted, before training and on the way."""
  return step == 0 or (config.eval.every > 0 and step % config.eval.every == 0)


def evaluate(training: Training, state: TrainState) -> None:
  """Writes the held-out scores of every slice at this step, unless they are there."""
  step, read = int(state.step), training.inputs
  wanted = {task.name: task.digest for task in read.tasks}
  with processes.agreed():
    found = StepScores.load(training.workdir, step)
  if processes.gather(found.tasks != wanted)[0]:
    print(f"scoring every slice on {len(read.tasks)} held-out files, step {step}", flush=True)
    scores = grid.score_slices(
      training.config, state.params, read.tasks, read.tokenizer, training.mesh
    )
    made = StepScores(step, wanted, scores)
    processes.on_first(lambda: _write_scores(training.workdir, made))


def _write_scores(workdir: pathlib.Path, evaluation: StepScores) -> None:
  evaluation.save(workdir)
  metrics.write_scores(workdir, evaluation.step, evaluation.scores)


def report(training: Training, state: TrainState) -> None:
  """Prints the held-out table, and writes and prints the export where `export.at_end` asks."""
  params = processes.fetch(state.params) if training.config.export.at_end else None
  processes.on_first(lambda: _report(training, int(state.step), params))


def _report(training: Training, step: int, params: Any) -> None:
  workdir, read = training.workdir, training.inputs
  before, after = StepScores.load(workdir, 0), StepScores.load(workdir, step)
  for task in read.tasks:
    print(f"\n{task.name}, {task.metric} in percent, before → after training\n")
    print(summary.change_table(before.of_task(task.name), after.of_task(task.name)))
  if training.config.export.at_end:
    sample = sample_ids(read.split, read.tokenizer, *stored_ranges.texts(training.config.model))
    trained = TrainedModel(Run.load(workdir), step, params, read.tokenizer, after, sample)
    folder = export_folder(export_path(training.config, workdir), trained, Slice())
    print(f"\nexported to {folder}; use it with\n\n{usage(folder)}")


def export_path(config: Config, workdir: pathlib.Path) -> pathlib.Path:
  """Returns the folder of `export.at_end`."""
  return workdir / "export" / config.export.name


def usage(folder: pathlib.Path) -> str:
  """Returns the lines that use an exported folder."""
  return (
    "  from sentence_transformers import SentenceTransformer\n"
    f'  model = SentenceTransformer("{folder}")\n'
    '  vectors = model.encode(["How are you?", "¿Cómo estás?"], prompt_name="query")\n'
  )


def chosen_before(
  run: Run, workdir: pathlib.Path, checkpoints: Checkpoints, accept_changed_data: bool
) -> int:
  """Returns the micro-batch of the run that the workdir holds, 0 for a new run.

  Another size would fit other memory as well, but round in another way.

  Raises:
    ConfigError: the workdir holds a checkpoint of another run.
  """
  if checkpoints.latest() is None:
    # Scores of a run that was stopped before its first checkpoint.
    processes.on_first(lambda: shutil.rmtree(workdir / "eval", ignore_errors=True))
    return 0
  with processes.agreed():
    stored = Run.load(workdir)
    check_same_run(stored, run, workdir, accept_changed_data)
  return processes.gather(stored.config.data.micro_batch)[0]


def train_model(
  config: Config, workdir: str | os.PathLike[str], *, accept_changed_data: bool = False
) -> None:
  """Runs or continues one training run, with evaluation before and after, and the export.

  On several machines every process calls it, inside `join.joined`.

  Args:
    config: a checked configuration, see `mlembed_jax.config.from_mapping`.
    workdir: the folder of the run, made if it does not exist.
    accept_changed_data: go on from the newest checkpoint although rows, mixture or batches changed.

  Raises:
    ConfigError, DataError: before any work, where configuration, files or workdir cannot be used.
    SystemExit: after SIGTERM (143) or Ctrl-C (130); the checkpoint is written.
  """
  if threading.current_thread() is not threading.main_thread():
    raise ConfigError("train_model: call it in the main thread, which alone hears signals")
  with processes.agreed():
    workdir = make_writable_folder(workdir, "workdir")
  processes.check_shared(workdir)
  versions = {"jax": jax.__version__, "mlembed_jax": __version__}
  options = {"accept_changed_data": accept_changed_data}
  processes.check_same(versions | options | flatten(config))
  with processes.agreed():
    mesh = _checked_mesh(config, workdir)
    read = inputs.load(config, workdir)
    run, steps = inputs.describe(config, read), inputs.steps(config, read)
    if config.export.at_end:
      check_target(export_path(config, workdir))
  processes.check_same(run.plan)
  checkpoints = Checkpoints(workdir, config.train.keep_checkpoints)
  chosen = chosen_before(run, workdir, checkpoints, accept_changed_data)
  processes.on_first(lambda: copy_file(read.tokenizer.path, workdir / "tokenizer.json"))
  with jax.set_mesh(mesh), nn.logical_axis_rules(logical_rules()):
    with StopSignals(mesh) as stop:
      processes.on_first(lambda: inputs.report(read, steps, workdir))
      config = micro_batch.with_micro_batch(
        config, chosen, read.kinds, read.tokens_per_step, steps, mesh, read.teacher
      )
      sized = dataclasses.replace(run, config=config)
      processes.on_first(lambda: sized.save(workdir))
      step = make_step(config, steps, mesh, read.teacher)
      batches = make_batches(config, read, mesh, steps)
      training = Training(config, read, workdir, mesh, checkpoints, stop, step, batches)
      state = _trained(training)
    checkpoints.close()
    evaluate(training, state)
  report(training, state)


def _checked_mesh(config: Config, workdir: pathlib.Path) -> Mesh:
  """Returns the mesh of a run; what it cannot do is refused here, before any work."""
  mesh = make_mesh(config)
  device = mesh.devices.flat[0]
  lowering.check_attention(config, device.platform)
  compiler.cache(workdir / "compiled", device.platform)
  compiler.check_known(device)
  rows_of(jax.process_index(), mesh)
  return mesh


def _trained(training: Training) -> TrainState:
  """Returns the state after the last step, which is being saved."""
  state, checkpoints = initial_state(training), training.checkpoints
  if evaluated_at(training.config, int(state.step)):
    evaluate(training, state)
  training.stop.leave_if_received("no step is lost")
  span = int(state.step), len(training.batches), training.config.train.log_every
  with metrics.Recorder(training.workdir, *span, training.config.model) as recorder:
    try:
      state = fit(training, state, recorder)
    except TrainingError:
      checkpoints.close()  # one may still be on its way to the disk
      raise
  return state
