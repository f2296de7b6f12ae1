"""Numbers of a run: metrics.jsonl and how far the run is; trackers get the same lines."""

import collections
import contextlib
import itertools
import json
import pathlib
import statistics
import time
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import jax

from mlembed_jax import progress
from mlembed_jax.config_fields import Config
from mlembed_jax.data.loader import Batch
from mlembed_jax.devices import chips
from mlembed_jax.devices.chips import Chip
from mlembed_jax.errors import TrainingError
from mlembed_jax.files import storage_errors, write_text
from mlembed_jax.models import flops
from mlembed_jax.parallel import processes
from mlembed_jax.training import frozen, goodput
from mlembed_jax.training.goodput import Goodput
from mlembed_jax.training.trackers import Trackers

# Numbers of a step that a line gives as their mean over the steps since the line before; so are
# all terms of the loss, of which a step has those of its task type.
AVERAGED = ("loss", "gradient_norm", "negatives")
ROWS_SHOWN = 8  # so many rows are named of a batch that is not finite
NONFINITE = "nonfinite.jsonl"
SPIKE_WINDOW, SPIKE_FEWEST = 64, 16  # steps of a file


class Window:
  """Numbers of the steps since the last logged line."""

  def __init__(self, config: Config, devices: int, chip: Chip | None):
    """Counts steps on `devices` devices over all processes, each a `chip` (None: unknown)."""
    self._model, self._devices, self._chip = config.model, devices, chip
    self._skipped = frozen.skipped_products(config)
    self._reset()

  def _reset(self) -> None:
    self._start = time.perf_counter()
    self._steps: list[tuple[Batch, dict[str, float]]] = []
    self._waited_s = 0.0
    self._nonfinite = 0

  def count_nonfinite(self) -> None:
    """Counts a step that changed nothing."""
    self._nonfinite += 1

  def add(self, batch: Batch, metrics: dict[str, float], waited_s: float) -> None:
    """Counts one finished step, whose batch was waited for so long."""
    self._steps.append((batch, metrics))
    self._waited_s += waited_s

  @contextlib.contextmanager
  def paused(self) -> Iterator[None]:
    """Runs a block whose time does not count as that of the steps."""
    start = time.perf_counter()
    yield
    self._start += time.perf_counter() - start

  def summary(self, step: int) -> dict[str, Any]:
    """Returns the metrics since the last line, and starts a new line, that of `step`.

    Losses, gradient norm and negatives per row are means; learning rate, temperature and rank
    those of the last step; rows without any negative are counted. Texts and tokens are those of
    all processes; padding does not count. Steps that were not finite are counted alone; where no
    other was done, there is nothing else to say.
    """
    line = {"step": step, "nonfinite_steps": self._nonfinite}
    if self._steps:
      line |= self._measured()
    self._reset()
    return line

  def _measured(self) -> dict[str, Any]:
    elapsed = time.perf_counter() - self._start
    by_dataset: dict[str, list[float]] = {}
    for batch, metrics in self._steps:
      by_dataset.setdefault(batch.dataset, []).append(metrics["loss"])
    _, last = self._steps[-1]
    return {
      **self._means(),
      "loss_by_dataset": {name: statistics.fmean(v) for name, v in sorted(by_dataset.items())},
      "learning_rate": last["learning_rate"],
      "temperature": last["temperature"],
      "rank": last["rank"],
      "empty_rows": int(sum(m["empty_rows"] for _, m in self._steps)),
      **self._speed(elapsed),
      "padding_share": 1.0 - self._sum("tokens") / self._sum("computed_tokens"),
      "data_wait_share": self._waited_s / elapsed,
    }

  def _sum(self, name: str) -> float:
    return sum(metrics[name] for _, metrics in self._steps)

  def _speed(self, elapsed: float) -> dict[str, float]:
    """Returns what all devices did per second.

    There is no `mfu` on an unknown chip, nor in float32: those products have another peak, on
    GPUs that of TF32, on TPUs one by the number of bfloat16 passes. FLOPs are given in any case.
    """
    tokens = self._sum("tokens")
    work = flops.step_flops(self._model, tokens, self._sum("squares"), self._skipped)
    rate = work / elapsed
    known = self._chip if self._model.dtype == "bfloat16" else None
    return {
      "tokens_per_second": tokens / elapsed,
      "tokens_per_second_per_chip": tokens / elapsed / self._devices,
      "sequences_per_second": self._sum("texts") / elapsed,
      "model_flops_per_second": rate,
      **({"mfu": rate / (self._devices * known.bf16_flops)} if known else {}),
    }

  def _means(self) -> dict[str, float]:
    seen = dict.fromkeys(name for _, m in self._steps for name in m)
    names = [name for name in seen if name in AVERAGED or name.endswith("_loss")]
    return {name: statistics.fmean(m[name] for _, m in self._steps if name in m) for name in names}


class Writer:
  """Writes one line per logged step; rows beyond `start` from an earlier, killed run go first."""

  def __init__(self, workdir: pathlib.Path, start: int, every: int, skipped: Collection[int] = ()):
    """Opens the file; `start` is the step the run continues from, `every` the steps of a line.

    What is known of the rows of `skipped` steps stays, for they are not done again.
    """
    self._path = workdir / "metrics.jsonl"
    for fault in faults(self._path, start, every):
      print(f"WARNING: {self._path}: {fault}", flush=True)
    _keep_lines_to(self._path, start)
    _keep_lines_to(workdir / NONFINITE, start, skipped)
    self._nonfinite = workdir / NONFINITE
    self._file = self._path.open("a", encoding="utf-8")

  def write(self, line: dict[str, Any]) -> None:
    """Appends one JSON object."""
    with storage_errors(self._path):
      self._file.write(json.dumps(line, ensure_ascii=False) + "\n")
      self._file.flush()

  def write_nonfinite(self, batch: Batch, values: dict[str, float], rows: Sequence[int]) -> None:
    """Appends the rows of a step that was not finite to their own file."""
    numbers = {name: str(values[name]) for name in ("loss", "gradient_norm")}  # NaN is no JSON
    line = {"step": batch.step + 1, "dataset": batch.dataset} | numbers | {"rows": list(rows)}
    with storage_errors(self._nonfinite), self._nonfinite.open("a", encoding="utf-8") as file:
      file.write(json.dumps(line, ensure_ascii=False) + "\n")

  def close(self) -> None:
    """Closes the file."""
    self._file.close()


def faults(path: pathlib.Path, start: int, every: int) -> list[str]:
  """Returns what is wrong with the lines of a file up to step `start`: damaged and missing ones.

  Earlier starts may have written a line at another interval than `every` steps, that of now. So
  lines are missing where the steps between two are more than `every` and than those beside them.
  """
  found = _lines(path)
  damaged = sum(at is None for at, _ in found[:-1])  # a kill may cut the last one
  steps = [0, *(at for at, _ in found if at is not None and at <= start)]
  last = max([every, *(b - a for a, b in itertools.pairwise(steps[-2:]))])
  steps.append(start // last * last + last)  # where the next line will be
  gaps = [b - a for a, b in itertools.pairwise(steps)]
  usual = [max([every, *gaps[max(0, i - 1) : i], *gaps[i + 1 : i + 2]]) for i in range(len(gaps))]
  holes = [
    f"{before + 1} to {at - interval}"
    for (before, at), gap, interval in zip(itertools.pairwise(steps), gaps, usual, strict=True)
    if gap > interval
  ]
  return [f"damaged lines: {damaged}"] * (damaged > 0) + [
    f"there are no lines of steps {', '.join(holes)}"
  ] * bool(holes)


def _keep_lines_to(path: pathlib.Path, step: int, others: Collection[int] = ()) -> None:
  """Drops the lines of later steps but `others`, and those that are damaged."""
  if path.exists():
    kept = [line for at, line in _lines(path) if at is not None and (at <= step or at in others)]
    write_text(path, "".join(line + "\n" for line in kept))


def _lines(path: pathlib.Path) -> list[tuple[int | None, str]]:
  """Returns the lines of a file with their steps, None of those that cannot be read."""
  lines = path.read_text("utf-8", "replace").splitlines() if path.exists() else []
  return [(_step(line), line) for line in lines]


def _step(line: str) -> int | None:
  try:
    step = json.loads(line)["step"]
  except (ValueError, KeyError, TypeError, RecursionError):
    return None
  return step if type(step) is int else None


def _postfix(line: dict[str, Any]) -> str:
  """Returns what the progress bar shows of a line."""
  mfu = f"MFU {line['mfu']:.1%}, " if "mfu" in line else ""
  return (
    f"loss {line['loss']:.3f}, {line['tokens_per_second']:,.0f} tokens/s, {mfu}"
    f"padding {line['padding_share']:.0%}, waiting {line['data_wait_share']:.0%}"
  )


class RollBack(TrainingError):
  """The state of a step is not to be kept: the run goes back to its newest checkpoint."""

  def __init__(self, message: str, step: int, *, alone: bool):
    """`alone`: only `step` is passed over then, else all steps since the checkpoint."""
    super().__init__(message)
    self.step, self.alone = step, alone


class SpikeWatch:
  """Finds losses far above the median of the steps of their file since this start."""

  def __init__(self, factor: float):
    """`factor` 0 finds none."""
    self._factor = factor
    self._losses: dict[str, collections.deque[float]] = {}

  def check(self, batch: Batch, loss: float) -> None:
    """Raises RollBack where the loss of a step is one; else remembers it."""
    losses = self._losses.setdefault(batch.dataset, collections.deque(maxlen=SPIKE_WINDOW))
    if self._factor and len(losses) >= SPIKE_FEWEST:
      usual = statistics.median(losses)
      if loss > self._factor * usual:
        raise RollBack(
          f"step {batch.step + 1} ({batch.dataset}): the loss {loss:.3f} is more than "
          f"{self._factor:g} times {usual:.3f}, the median of this file",
          batch.step + 1,
          alone=False,
        )
    losses.append(loss)


class Recorder:
  """Takes the numbers of each finished step; writes and shows every `every`-th and the last."""

  def __init__(
    self,
    workdir: pathlib.Path,
    start: int,
    total: int,
    config: Config,
    goodput: Goodput,
    trackers: Trackers,
    skipped: Collection[int] = (),
  ):
    """`start` and `total` count updates of the whole run; `skipped` steps are passed over."""
    self._workdir, self._warned, self._goodput = workdir, False, goodput
    self._trackers = trackers
    trackers.resume(start)
    chip = chips.find_chip(jax.devices()[0].device_kind)
    # Every process reads the numbers, and so notices what is not finite; the first one writes them.
    every = config.train.log_every
    self._writer = Writer(workdir, start, every, skipped) if processes.is_first() else None
    self._window = Window(config, jax.device_count(), chip)
    self._total, self._every = total, every
    self._spikes = SpikeWatch(config.train.spike_factor)
    self._in_a_row, self._most_in_a_row = 0, config.train.max_nonfinite_steps
    self._bar = progress.count(
      "training", total, " steps", initial=start, shown=processes.is_first()
    )

  def __enter__(self) -> "Recorder":
    return self

  def __exit__(self, *_: Any) -> None:
    self._bar.close()
    if self._writer:
      self._writer.close()

  def record(self, batch: Batch, device_metrics: Any, waited_s: float) -> None:
    """Reads one step's metrics from the device; call it when a later step has been started.

    `device_metrics` None: the step was passed over, as `--skip_steps` asks.

    Raises:
      TrainingError: too many steps in a row were not finite.
      RollBack: a loss is a spike, or the update of the step has overflowed.
    """
    if device_metrics is not None:
      values = {name: value.item() for name, value in jax.device_get(device_metrics).items()}
      self._counted(batch, values, waited_s)
    step = batch.step + 1
    if step % self._every == 0 or step == self._total:
      self._write(step)
    self._goodput.write_now_and_then()
    self._bar.update()

  def _counted(self, batch: Batch, values: dict[str, float], waited_s: float) -> None:
    if not values.pop("finite"):
      self._not_finite(batch, values)
      return
    if not values.pop("state_finite"):
      raise RollBack(
        f"step {batch.step + 1} ({batch.dataset}): the update has overflowed, loss and gradient "
        "are finite",
        batch.step + 1,
        alone=True,
      )
    self._in_a_row = 0
    self._spikes.check(batch, values["loss"])
    if values["empty_rows"] == batch.global_rows:
      self._without_negatives(batch)
    self._window.add(batch, values, waited_s)

  def _write(self, step: int) -> None:
    line = self._window.summary(step) | {"goodput": self._goodput.shares()[goodput.TRAINING]}
    if self._writer:
      self._writer.write(line)
      self._trackers.log(line)
    if "loss" in line:
      self._bar.set_postfix_str(_postfix(line), refresh=False)

  def paused(self) -> contextlib.AbstractContextManager[None]:
    """Returns a block whose time does not count as that of the steps."""
    return self._window.paused()

  def _not_finite(self, batch: Batch, values: dict[str, float]) -> None:
    """Notes a step that left the state as it was.

    Raises:
      TrainingError: so many in a row end the run.
    """
    self._in_a_row += 1
    self._window.count_nonfinite()
    # Processes that share shards of the batch have the same rows.
    rows = list(dict.fromkeys(itertools.chain(*processes.gather(batch.rows.tolist()))))
    if self._writer:
      self._writer.write_nonfinite(batch, values, rows)
    shown = ", ".join(map(str, rows[:ROWS_SHOWN])) + (" ..." if len(rows) > ROWS_SHOWN else "")
    said = (
      f"step {batch.step + 1} ({batch.dataset}, rows {shown}) is not finite: loss "
      f"{values['loss']}, gradient norm {values['gradient_norm']}. The state is left as it was; "
      f"all rows are in {self._workdir / NONFINITE}"
    )
    if self._in_a_row >= self._most_in_a_row:
      raise TrainingError(
        f"{said}. That were {self._in_a_row} in a row. Pass over the data with --skip_steps, or "
        "go on with a lower optimizer.learning_rate and --accept_changed_learning_rate"
      )
    if self._writer:
      progress.say(f"WARNING: {said}")

  def _without_negatives(self, batch: Batch) -> None:
    """Warns of the first such step; the others are counted in `empty_rows`."""
    if not self._warned and processes.is_first():
      progress.say(
        f"warning: step {batch.step + 1} ({batch.dataset}) had nothing to compare: every negative "
        "of every row has the text of its query or positive, or all scores are equal. "
        "metrics.jsonl counts such rows as empty_rows"
      )
    self._warned = True
