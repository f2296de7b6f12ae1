"""Numbers of a run: metrics.jsonl, TensorBoard files and the progress bar."""

import contextlib
import itertools
import json
import math
import pathlib
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import tensorboardX
import tqdm

from mlembed_jax.config_fields import ModelConfig
from mlembed_jax.data.loader import Batch
from mlembed_jax.devices import chips
from mlembed_jax.devices.chips import Chip
from mlembed_jax.errors import TrainingError
from mlembed_jax.files import write_json, write_text
from mlembed_jax.models import flops
from mlembed_jax.parallel import processes
from mlembed_jax.slice_scores import SliceScore

# Numbers of a step that a line gives as their mean over the steps since the line before; so are
# all terms of the loss, of which a step has those of its task type.
AVERAGED = ("loss", "gradient_norm", "negatives")
ROWS_SHOWN = 8  # so many rows are named of the batch that made the loss infinite


class Window:
  """Numbers of the steps since the last logged line."""

  def __init__(self, model: ModelConfig, devices: int, chip: Chip | None):
    """Counts steps on `devices` devices over all processes, each a `chip` (None: unknown)."""
    self._model, self._devices, self._chip = model, devices, chip
    self._reset()

  def _reset(self) -> None:
    self._start = time.perf_counter()
    self._steps: list[tuple[Batch, dict[str, float]]] = []
    self._waited_s = 0.0

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

  def summary(self) -> dict[str, Any]:
    """Returns the metrics since the last line, and starts a new line.

    Losses, gradient norm and negatives per row are means; learning rate, temperature and rank
    those of the last step; rows without any negative are counted. Texts and tokens are those of
    all processes; padding does not count.
    """
    elapsed = time.perf_counter() - self._start
    by_dataset: dict[str, list[float]] = {}
    for batch, metrics in self._steps:
      by_dataset.setdefault(batch.dataset, []).append(metrics["loss"])
    last_batch, last = self._steps[-1]
    line = {
      "step": last_batch.step + 1,
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
    self._reset()
    return line

  def _sum(self, name: str) -> float:
    return sum(metrics[name] for _, metrics in self._steps)

  def _speed(self, elapsed: float) -> dict[str, float]:
    """Returns what all devices did per second.

    There is no `mfu` on an unknown chip, nor in float32: those products have another peak, on
    GPUs that of TF32, on TPUs one by the number of bfloat16 passes. FLOPs are given in any case.
    """
    tokens = self._sum("tokens")
    rate = flops.step_flops(self._model, tokens, self._sum("squares")) / elapsed
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

  def __init__(self, workdir: pathlib.Path, start: int):
    """Opens both files; `start` is the step the run continues from."""
    path = workdir / "metrics.jsonl"
    _drop_lines_after(path, start)
    self._file = path.open("a", encoding="utf-8")
    # Steps after `purge_step` that a killed run wrote are hidden by TensorBoard.
    self._board = tensorboardX.SummaryWriter(str(workdir / "tensorboard"), purge_step=start + 1)

  def write(self, line: dict[str, Any]) -> None:
    """Appends one JSON object; its numbers also go to TensorBoard under the same names."""
    self._file.write(json.dumps(line, ensure_ascii=False) + "\n")
    self._file.flush()
    for name, value in line.items():
      for key, scalar in value.items() if isinstance(value, dict) else [("", value)]:
        self._board.add_scalar(f"{name}/{key}" if key else name, scalar, line["step"])

  def close(self) -> None:
    """Flushes and closes both files."""
    self._file.close()
    self._board.close()


def _drop_lines_after(path: pathlib.Path, step: int) -> None:
  if not path.exists():
    return
  lines = [line for line in path.read_text(encoding="utf-8").splitlines() if _step(line) <= step]
  write_text(path, "".join(line + "\n" for line in lines))


def _step(line: str) -> float:
  try:
    return json.loads(line)["step"]
  except json.JSONDecodeError:  # the last line of a killed run may be cut short
    return float("inf")


def write_scores(workdir: pathlib.Path, step: int, scores: Sequence[SliceScore]) -> None:
  """Writes held-out scores to TensorBoard: of the whole model, and with one axis cut at a time."""
  axes = ("rank", "depth", "dim")
  # In a folder TensorBoard follows the newest file alone: beside those of the steps, this one would
  # end their curves.
  folder = workdir / "tensorboard" / "eval"
  full = {axis: max(getattr(s, axis) for s in scores) for axis in axes}
  with tensorboardX.SummaryWriter(str(folder), filename_suffix=f".{step}") as board:
    for s in scores:
      sizes = {axis: getattr(s, axis) for axis in axes}
      cut = [f"{axis}_{size}" for axis, size in sizes.items() if size != full[axis]]
      if len(cut) < 2:
        board.add_scalar(f"{s.task}/{s.metric}/{cut[0] if cut else 'full'}", s.score, step)


def _postfix(line: dict[str, Any]) -> str:
  """Returns what the progress bar shows of a line."""
  mfu = f"MFU {line['mfu']:.1%}, " if "mfu" in line else ""
  return (
    f"loss {line['loss']:.3f}, {line['tokens_per_second']:,.0f} tokens/s, {mfu}"
    f"padding {line['padding_share']:.0%}, waiting {line['data_wait_share']:.0%}"
  )


class Recorder:
  """Takes the numbers of each finished step; writes and shows every `every`-th and the last."""

  def __init__(self, workdir: pathlib.Path, start: int, total: int, every: int, model: ModelConfig):
    """`start` and `total` count updates of the whole run."""
    self._workdir, self._warned = workdir, False
    chip = chips.find_chip(jax.devices()[0].device_kind)
    # Every process reads the numbers, and so notices a diverged loss; the first one writes them.
    self._writer = Writer(workdir, start) if processes.is_first() else None
    self._window = Window(model, jax.device_count(), chip)
    self._total, self._every = total, every
    self._bar = tqdm.tqdm(
      initial=start,
      total=total,
      desc="training",
      unit="step",
      dynamic_ncols=True,
      disable=not processes.is_first(),
      mininterval=0.5 if sys.stderr.isatty() else 10.0,  # a log file need not hold every step
    )

  def __enter__(self) -> "Recorder":
    return self

  def __exit__(self, *_: Any) -> None:
    self._bar.close()
    if self._writer:
      self._writer.close()

  def record(self, batch: Batch, device_metrics: Any, waited_s: float) -> None:
    """Reads one step's metrics from the device; call it when a later step has been started.

    Raises:
      TrainingError: loss or gradient are no longer finite.
    """
    values = {name: value.item() for name, value in jax.device_get(device_metrics).items()}
    step = batch.step + 1
    if not math.isfinite(values["loss"] + values["gradient_norm"]):
      raise TrainingError(self._diverged(batch, values))
    if values["empty_rows"] == batch.global_rows:
      self._without_negatives(batch)
    self._window.add(batch, values, waited_s)
    if step % self._every == 0 or step == self._total:
      line = self._window.summary()
      if self._writer:
        self._writer.write(line)
      self._bar.set_postfix_str(_postfix(line), refresh=False)
    self._bar.update()

  def paused(self) -> contextlib.AbstractContextManager[None]:
    """Returns a block whose time does not count as that of the steps."""
    return self._window.paused()

  def _diverged(self, batch: Batch, values: dict[str, float]) -> str:
    # Processes that share shards of the batch have the same rows.
    rows = list(dict.fromkeys(itertools.chain(*processes.gather(batch.rows.tolist()))))
    path = self._workdir / "diverged.json"
    if processes.is_first():
      write_json(path, {"step": batch.step + 1, "dataset": batch.dataset, "rows": rows})
    shown = ", ".join(map(str, rows[:ROWS_SHOWN])) + (" ..." if len(rows) > ROWS_SHOWN else "")
    return (
      f"step {batch.step + 1} ({batch.dataset}, rows {shown}): the loss is {values['loss']}, its "
      f"gradient norm {values['gradient_norm']}. All rows are in {path}. Lower "
      "optimizer.learning_rate and start again in a new --workdir, or look at those rows"
    )

  def _without_negatives(self, batch: Batch) -> None:
    """Warns of the first such step; the others are counted in `empty_rows`."""
    if not self._warned and processes.is_first():
      self._bar.write(
        f"warning: step {batch.step + 1} ({batch.dataset}) had nothing to compare: every negative "
        "of every row has the text of its query or positive, or all scores are equal. "
        "metrics.jsonl counts such rows as empty_rows",
        file=sys.stderr,
      )
    self._warned = True
