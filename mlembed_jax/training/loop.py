"""The loop of one run: from its inputs to the last checkpoint and the export. It knows no flags.

The same call with the same workdir goes on from the newest checkpoint, bit for bit as if the run
had never stopped. SIGTERM and Ctrl-C during training save a checkpoint first.
"""

import contextlib
import dataclasses
import functools
import os
import pathlib
import shutil
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import Mesh

from mlembed_jax import __version__, programs, progress
from mlembed_jax.batch import Kind
from mlembed_jax.config import flatten
from mlembed_jax.config_fields import Config
from mlembed_jax.data import loader, read_ahead
from mlembed_jax.data.names import CATALOG, MANIFEST
from mlembed_jax.data.sample import sample_ids
from mlembed_jax.devices import compiler
from mlembed_jax.devices.start import start_devices
from mlembed_jax.errors import ConfigError, TrainingError
from mlembed_jax.eval import grid, summary
from mlembed_jax.files import copy_file, make_writable_folder
from mlembed_jax.hf import stored_ranges
from mlembed_jax.hf.export import TrainedModel, check_target, export_folder
from mlembed_jax.hf.file_names import CONFIG, TOKENIZER_CONFIG
from mlembed_jax.hf.folder import resolve
from mlembed_jax.hf.load import load_params
from mlembed_jax.matryoshka import Slice
from mlembed_jax.parallel import maintenance, processes
from mlembed_jax.parallel.sharding import batch_shards, logical_rules, make_mesh, put_batch, rows_of
from mlembed_jax.parallel.stop import StopSignals
from mlembed_jax.training import (
  announce,
  frozen,
  frozen_store,
  goodput,
  inputs,
  lowering,
  metrics,
  micro_batch,
  optimizer,
  profile,
  trackers,
  train_state,
  train_step,
)
from mlembed_jax.training.checkpoint import Checkpoints, Retention
from mlembed_jax.training.export import say_rounding
from mlembed_jax.training.goodput import COMPILING, TRAINING, Goodput
from mlembed_jax.training.inputs import Inputs
from mlembed_jax.training.lock import WorkdirLock
from mlembed_jax.training.profile import Profile
from mlembed_jax.training.resume import (
  LENGTH,
  Resume,
  changed_settings,
  check_same_run,
  parse_steps,
)
from mlembed_jax.training.saved import BEST, chosen_step, load_newest_params, steps_of
from mlembed_jax.training.teacher import Teacher
from mlembed_jax.training.trackers import Trackers
from mlembed_jax.training.train_state import TrainState
from mlembed_jax.workdir import (
  RUN,
  Run,
  StepScores,
  early_end,
  scored_steps,
  scores_path,
)

# What no run writes to its workdir.
FOREIGN = {
  CONFIG: "a model",
  TOKENIZER_CONFIG: "a tokenizer",
  CATALOG: "a prepared dataset",
  MANIFEST: "files to prepare",
}


@dataclasses.dataclass(frozen=True)
class Training:
  """A run that is under way: all but its state."""

  run: Run  # data.micro_batch is chosen
  inputs: Inputs
  workdir: pathlib.Path
  mesh: Mesh
  checkpoints: Checkpoints
  stop: StopSignals
  lock: WorkdirLock | None  # of process 0
  goodput: Goodput
  step: Callable[..., Any]  # step(state, batch, kind=...) -> (state, metrics)
  batches: loader.Batches
  trackers: Trackers
  frozen_params: Any  # None: all are trained

  @property
  def config(self) -> Config:
    """The configuration of the run."""
    return self.run.config

  def check_lock(self) -> None:
    """Raises TrainingError on all processes where another run took over the workdir."""
    with processes.agreed():
      if self.lock:
        self.lock.check()

  def save(self, step: int, state: TrainState) -> None:
    """Saves a step in the background, unless another run took over the workdir."""
    with self.goodput.during(goodput.SAVING):
      self.check_lock()
      self.checkpoints.save(step, state)
    self.goodput.save(step)


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
  like = frozen.without_adapter(train_state.abstract(config, tx, mesh).params)
  if config.train.init_from and like:
    own = frozen.adapter(state.params)
    state = state.replace(params=None)  # their memory is needed
    state = state.replace(params=frozen.whole(own, _start(config, training.inputs, like)))
  return state


def _start(config: Config, read: Inputs, like: Any) -> Any:
  """Returns the parameters of `like` as the folder of `train.init_from` has them."""
  folder = resolve(config.train.init_from)
  ids = inputs.check_start(folder, config, read.tokenizer)
  return load_params(folder, config.model, like, ids)


def _frozen(config: Config, read: Inputs, workdir: pathlib.Path, mesh: Mesh, *, begun: bool) -> Any:
  """Returns the frozen parameters, None where all are trained."""
  like = frozen.abstract(config, mesh)
  load = functools.partial(_start, config, read)
  return frozen_store.placed(workdir, config, like, load, begun=begun) if like else None


def make_step(
  config: Config, steps: int, mesh: Mesh, teacher: Teacher | None, frozen_params: Any
) -> Callable[..., Any]:
  """Returns `step(state, batch, kind=...)`; a teacher's weights are read here.

  `frozen_params` is None where all are trained.
  """
  step = train_step.make(config, steps, mesh, teacher.shape if teacher else None)
  params = teacher.params(mesh) if teacher else None
  return functools.partial(step, teacher_params=params, frozen_params=frozen_params)


def timed(
  batches: Iterator[loader.Batch], training: Training
) -> Iterator[tuple[loader.Batch, float]]:
  """Yields each batch and the seconds it was waited for."""
  while True:
    start = time.perf_counter()
    with training.goodput.during(goodput.WAITING):
      batch = next(batches, None)
    if batch is None:
      return
    yield batch, time.perf_counter() - start


def compiling(kind: Kind, compiled: Collection[Kind]) -> contextlib.AbstractContextManager[None]:
  """Returns a block that compiles a step on process 0 with a clock, unless that is done."""
  shown = processes.is_first() and kind not in compiled
  return progress.clocked(f"compiling {kind.task_type} of {kind.texts} texts a row", shown=shown)


def close(training: Training) -> None:
  """Waits for running saves."""
  with training.goodput.during(goodput.SAVING):
    training.checkpoints.close()
  training.goodput.write()


def fit(training: Training, state: TrainState, recorder: metrics.Recorder) -> TrainState:
  """Returns the state after the last step.

  A stop signal ends the program after its step (status 128 + signal). Both states are saved.

  The device is never waited for: the numbers of a step are read while the next one runs, and so
  is its batch fetched and sent to the device.
  """
  config, stop, batches = training.config, training.stop, training.batches
  pending, start, compiled = None, int(state.step), set[Kind]()
  with jax.transfer_guard("disallow"), Profile(config, training.workdir) as profiled:
    for batch, waited_s in timed(read_ahead.iterate(batches, start, config.data.workers), training):
      # To jax, parts of global arrays are implicit transfers.
      with jax.transfer_guard_host_to_device("allow"):
        arrays, signals = put_batch(batch.arrays(), training.mesh), stop.exchange()
      with training.goodput.during(TRAINING if batch.kind in compiled else COMPILING):
        if batch.step + 1 in training.run.skipped_steps:
          state, values = train_state.passed_over(state), None
        else:
          clock = compiling(batch.kind, compiled)
          with clock, profiled.step(batch.step + 1, state):
            state, values = training.step(state, arrays, kind=batch.kind)
          if batch.kind not in compiled:
            compiled.add(batch.kind)
            processes.on_first(programs.note_new)
      profiled.end(batch.step + 1, state)
      if pending:
        recorder.record(*pending)
      pending = batch, values, waited_s
      done, stopping = batch.step + 1, stop.agreed(signals)
      last = done == len(batches)
      # A machine that is taken away has seconds left; the next start evaluates. One that is taken
      # away while it evaluates finds this step saved.
      scored = evaluated_at(config, done) and not last and not stopping
      if done % config.train.checkpoint_every == 0 or last or stopping or scored:
        recorder.record(*pending)  # a loss spike is noticed here, before its state is saved
        pending = None
        training.save(done, state)
      if scored:
        with recorder.paused(), jax.transfer_guard("allow"):
          evaluate(training, state)
          if ends_early(training, done):
            return state
      if stopping:
        close(training)
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
    with training.goodput.during(goodput.EVALUATING):
      scores = grid.score_slices(
        training.config,
        frozen.whole(state.params, training.frozen_params),
        read.tasks,
        read.tokenizer,
        training.mesh,
        lambda: training.stop.leave_if_received("no step is lost"),
      )
    made = StepScores(step, wanted, scores)
    processes.on_first(lambda: made.save(training.workdir))
    training.trackers.log_scores(step, scores)


def ends_early(training: Training, step: int) -> bool:
  """Returns whether held-out scores say that the run is over (`eval.patience`), and prints why."""
  patience, why = training.config.eval.patience, None
  with processes.agreed():
    if patience and processes.is_first():
      why = early_end(training.workdir, patience, step)
  if why := processes.gather(why)[0]:
    processes.on_first(lambda: print(f"eval.patience: {why}", flush=True))
  return bool(why)


def report(training: Training, state: TrainState) -> None:
  """Prints the held-out table, and writes and prints the export where `export.at_end` asks."""
  step, params = int(state.step), None
  processes.on_first(lambda: _report_scores(training, step))
  if training.config.export.best:
    with processes.agreed():
      step = chosen_step(training.workdir, BEST)
    step, params = load_newest_params(training.workdir, [step])
  elif training.config.export.at_end:
    params = processes.fetch(frozen.whole(state.params, training.frozen_params))
  processes.on_first(lambda: _export(training, step, params))


def _report_scores(training: Training, step: int) -> None:
  before, after = (StepScores.load(training.workdir, at) for at in (0, step))
  for task in training.inputs.tasks:
    same = before.tasks.get(task.name) == after.tasks.get(task.name)
    when = "before → after training" if same else "after training; it was another file before"
    print(f"\n{task.name}, {task.metric} in percent, {when}\n")
    print(summary.change_table(before.of_task(task.name) * same, after.of_task(task.name)))


def _export(training: Training, step: int, params: Any) -> None:
  """Writes the export of a step, or says how to write one."""
  workdir, read = training.workdir, training.inputs
  if params is None:
    print(f"\ntrained to step {step:,}; this writes a model that any program loads:\n")
    print(f"  python -m mlembed_jax.export --checkpoint {workdir} --out DIR\n", flush=True)
    return
  sample = sample_ids(read.split, read.tokenizer, *stored_ranges.texts(training.config.model))
  scores = StepScores.load(workdir, step)
  run = Run.load(workdir)
  say_rounding(run, params)
  served = frozen.merged(run.config.model, params)
  trained = TrainedModel(run, step, served, read.tokenizer, scores, sample)
  folder = export_folder(export_path(training.config, workdir), trained, Slice())
  print(f"\nstep {step:,} is exported to {folder}; use it with\n\n{usage(folder)}")


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


def resumed(
  run: Run, steps: int, workdir: pathlib.Path, checkpoints: Checkpoints, resume: Resume
) -> tuple[Run, bool]:
  """Returns the run as the workdir goes on with it, and whether the workdir holds one.

  Its history tells what was changed on the way, by earlier starts and by this one, and it keeps its
  micro-batch: another size would fit other memory as well, but round in another way.

  Raises:
    ConfigError: the workdir holds a checkpoint of another run or one beyond its `steps`, or none to
      go back to.
  """
  latest = checkpoints.newest_whole(strict=resume.strict_restore)
  if latest is None:
    if resume.from_step is not None or resume.skip_steps:
      raise ConfigError(f"--from_step, --skip_steps: {workdir} holds no checkpoint to go on from")
    # Scores of a run that was stopped before its first checkpoint.
    processes.on_first(lambda: shutil.rmtree(workdir / "eval", ignore_errors=True))
    return dataclasses.replace(run, digests_since=0), False
  with processes.agreed():
    stored = Run.load(workdir)
    check_same_run(stored, run, workdir, resume)
    same = not changed_settings(stored.config, run.config)
    asked, resume = resume, resume.remaining(stored.history, latest, same_settings=same)
    start = latest if resume.from_step is None else resume.from_step
    if start > steps:
      raise ConfigError(
        f"train.steps, train.epochs: they make {steps} steps, and {workdir} is at step {start}; "
        "--from_step goes back to an earlier checkpoint"
      )
    entry = resume.entry(stored.config, run.config, start)
  if asked.from_step != resume.from_step:
    said = f"--from_step={asked.from_step} was done by an earlier start, see run.json"
    processes.on_first(lambda: print(f"{said}; the run goes on from step {latest}", flush=True))
  if resume.from_step is not None:
    checkpoints.go_back(resume.from_step)
  data = dataclasses.replace(run.config.data, micro_batch=stored.config.data.micro_batch)
  run = dataclasses.replace(
    run,
    config=dataclasses.replace(run.config, data=data),
    history=[*stored.history, *([entry] if entry else [])],
    digests_since=start + 1 if stored.digests_since is None else stored.digests_since,
    prompts=stored.prompts,
  )
  if entry:
    processes.on_first(lambda: (run.save(workdir), _drop_scores_after(workdir, start)))
  if any(name in (entry or {}) for name in LENGTH):
    rate = float(optimizer.schedule(run.config.optimizer, steps)(start))
    said = f"the run has {steps:,} steps now, and the schedules of one that was so long from the "
    said += f"start: the learning rate of step {start + 1:,} is {rate:.2g}"
    processes.on_first(lambda: print(said, flush=True))
  return run, True


def _drop_scores_after(workdir: pathlib.Path, step: int) -> None:
  for later in [at for at in scored_steps(workdir) if at > step]:
    scores_path(workdir, later).unlink()


def train_model(
  config: Config,
  workdir: str | os.PathLike[str],
  *,
  accept_changed_data: bool = False,
  accept_changed_learning_rate: bool = False,
  accept_changed_length: bool = False,
  strict_restore: bool = False,
  from_step: int | None = None,
  skip_steps: str | Sequence[int] = (),
  grace_s: float = 0.0,
) -> None:
  """Runs or continues one training run, with evaluation before and after, and the export.

  On several machines every process calls it, inside `join.joined`.

  Args:
    config: a checked configuration, see `mlembed_jax.config.from_mapping`.
    workdir: the folder of the run, made if it does not exist.
    accept_changed_data: go on from the newest checkpoint although rows, mixture or batches changed.
    accept_changed_learning_rate: go on with another `optimizer.learning_rate`.
    accept_changed_length: go on with another `train.steps` or `train.epochs`.
    strict_restore: end where the newest checkpoint is damaged; else the one before is taken.
    from_step: go on from this checkpoint; later ones are set aside. None: the newest.
    skip_steps: steps whose rows are passed over from now on, as numbers or as "120-140,150".
    grace_s: seconds between a stop signal and the end of the process, whatever it does; 0: it ends
      when its checkpoint is written.

  Raises:
    ConfigError, DataError: before any work, where configuration, files or workdir cannot be used,
      or where another process trains in the workdir.
    StorageError: a disk is full or gone.
    TrainingError: too many steps in a row were not finite, or another process took over.
    SystemExit: after SIGTERM (143) or Ctrl-C (130); the checkpoint is written.
  """
  if threading.current_thread() is not threading.main_thread():
    raise ConfigError("train_model: call it in the main thread, which alone hears signals")
  resume = Resume(
    accept_changed_data,
    accept_changed_learning_rate,
    accept_changed_length,
    strict_restore,
    from_step,
    parse_steps(skip_steps),
  )
  with processes.agreed():
    start_devices()  # what is missing of them is said first
    workdir = make_writable_folder(workdir, "workdir")
    _check_free(workdir)
  processes.check_shared(workdir)
  versions = {"jax": jax.__version__, "mlembed_jax": __version__}
  processes.check_same(versions | dataclasses.asdict(resume) | flatten(config))
  with contextlib.ExitStack() as held:
    with processes.agreed():
      lock = held.enter_context(WorkdirLock(workdir)) if processes.is_first() else None
    _train_locked(config, workdir, resume, lock, grace_s)


def _check_free(folder: pathlib.Path) -> None:
  """Raises ConfigError where a folder is something else than a workdir, or one to be."""
  for name, what in FOREIGN.items():
    if (folder / name).exists() and not (folder / RUN).exists():
      raise ConfigError(
        f"workdir: {folder} holds {what} ({name}) and no {RUN}; name another folder"
      )


def _train_locked(
  config: Config, workdir: pathlib.Path, resume: Resume, lock: WorkdirLock | None, grace_s: float
) -> None:
  clock = Goodput(workdir, writes=processes.is_first())
  with processes.agreed():
    mesh = _checked_mesh(config, workdir)
    trackers.check_installed(config.train.trackers)
    read = inputs.load(config, workdir)
    run, steps = inputs.describe(config, read), inputs.steps(config, read)
    if (last := max(resume.skip_steps, default=0)) > steps:
      raise ConfigError(f"--skip_steps: the run has {steps} steps, and none that is step {last}")
    profile.check_within(config, steps)
    if config.export.at_end:
      check_target(export_path(config, workdir))
  processes.check_same(run.plan)
  kept = config.train.keep_checkpoints, config.train.keep_every, config.train.keep_best
  checkpoints = Checkpoints(Retention(workdir, *kept))
  run, stored = resumed(run, steps, workdir, checkpoints, resume)
  processes.on_first(lambda: copy_file(read.tokenizer.path, workdir / "tokenizer.json"))
  with (
    jax.set_mesh(mesh),
    nn.logical_axis_rules(logical_rules()),
    StopSignals(mesh, grace_s, lock.release if lock else None) as stop,
    maintenance.watched(mesh, stop),
    trackers.tracked(config, workdir, resumed=stored) as tracking,
  ):
    tx = optimizer.make(config.optimizer, steps)
    said = announce.description(config, tx, mesh, read.teacher)
    processes.on_first(lambda: (print(f"\n{said}"), inputs.report(read, steps, workdir)))
    before = processes.gather(run.config.data.micro_batch if stored else 0)[0]
    sized = micro_batch.with_micro_batch(
      config, before, read.kinds, read.tokens_per_step, steps, mesh, read.teacher
    )
    run = dataclasses.replace(run, config=sized)
    processes.on_first(lambda: run.save(workdir))
    tracking.set_config(sized)
    frozen_params = _frozen(config, read, workdir, mesh, begun=stored)
    step = make_step(sized, steps, mesh, read.teacher, frozen_params)
    batches = make_batches(sized, read, mesh, steps)
    training = Training(
      *(run, read, workdir, mesh, checkpoints, stop, lock, clock),
      *(step, batches, tracking, frozen_params),
    )
    state, training = _trained(training)
    close(training)
    evaluate(training, state)
  report(training, state)
  clock.write()
  processes.on_first(lambda: print(clock.summary(), flush=True))


def _checked_mesh(config: Config, workdir: pathlib.Path) -> Mesh:
  """Returns the mesh of a run; what it cannot do is refused here, before any work."""
  mesh = make_mesh(config)
  device = mesh.devices.flat[0]
  lowering.check_attention(config, device.platform)
  if device.platform != "cpu":  # those compile in seconds and are bound to one kind of processor
    folder = workdir / "compiled"  # no process reads one before it is checked
    if processes.gather(processes.is_first() and programs.remove_damaged(folder))[0]:
      programs.keep(folder)
  compiler.check_known(device)
  rows_of(jax.process_index(), mesh)
  return mesh


def _trained(training: Training) -> tuple[TrainState, Training]:
  """Returns the state after the last step, which is being saved, and the run as it was at last."""
  while True:
    state = initial_state(training)
    start = int(state.step)
    training.goodput.resume(start)
    if evaluated_at(training.config, start):
      evaluate(training, state)
    training.stop.leave_if_received("no step is lost")
    if ends_early(training, start):
      return state, training
    span = start, len(training.batches)
    skipped = training.run.skipped_steps
    with metrics.Recorder(
      training.workdir, *span, training.config, training.goodput, training.trackers, skipped
    ) as recorder:
      try:
        with training.goodput.during(TRAINING):
          return fit(training, state, recorder), training
      except metrics.RollBack as fault:
        training = _rolled_back(training, fault)
      except TrainingError as error:
        close(training)  # one may still be on its way to the disk
        raise TrainingError(f"{error}. {_goes_on_from(training.workdir)}") from error


def _goes_on_from(workdir: pathlib.Path) -> str:
  if saved := steps_of(workdir):
    return f"The newest checkpoint is step {saved[-1]}"
  return (
    "There is no checkpoint yet, which --skip_steps needs: the next start begins anew, with any "
    "optimizer.learning_rate"
  )


def _rolled_back(training: Training, fault: metrics.RollBack) -> Training:
  """Returns the run that goes back to its newest checkpoint and passes over the faulty steps."""
  newest = training.checkpoints.newest_whole() or 0
  skipped = [fault.step] if fault.alone else list(range(newest + 1, fault.step + 1))
  entry = {"step": newest, "skip_steps": skipped, "why": str(fault)}
  run = dataclasses.replace(training.run, history=[*training.run.history, entry])
  said = f"WARNING: {fault}. Back to step {newest}; passed over: {skipped[0]} to {skipped[-1]}"
  processes.on_first(lambda: (run.save(training.workdir), print(said, flush=True)))
  processes.on_first(lambda: _drop_scores_after(training.workdir, newest))
  return dataclasses.replace(training, run=run)
