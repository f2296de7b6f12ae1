"""Numbers of a run: metrics.jsonl, TensorBoard files and the progress bar."""

import json
import math
import pathlib
import statistics
import sys
import time
from typing import Any

import jax
import tensorboardX
import tqdm

from mlembed_jax.data.loader import Batch
from mlembed_jax.workdir import write_text

# Numbers of a step that a line gives as their mean over the steps since the line before.
AVERAGED = ("loss", "hard_loss", "inbatch_loss", "gradient_norm")


class Window:
  """Numbers of the steps since the last logged line."""

  def __init__(self) -> None:
    self._reset()

  def _reset(self) -> None:
    self._start = time.perf_counter()
    self._steps: list[tuple[Batch, dict[str, float]]] = []

  def add(self, batch: Batch, metrics: dict[str, float]) -> None:
    """Counts one finished step."""
    self._steps.append((batch, metrics))

  def summary(self) -> dict[str, Any]:
    """Returns one line, and starts anew.

    Losses and gradient norm are means, learning rate and rank those of the last step. Tokens are
    real ones; padding is not work.
    """
    real = sum(batch.real_tokens for batch, _ in self._steps)
    padded = sum(batch.tokens.size for batch, _ in self._steps)
    by_dataset: dict[str, list[float]] = {}
    for batch, metrics in self._steps:
      by_dataset.setdefault(batch.dataset, []).append(metrics["loss"])
    last_batch, last = self._steps[-1]
    line = {
      "step": last_batch.step + 1,
      **{name: statistics.fmean(m[name] for _, m in self._steps) for name in AVERAGED},
      "loss_by_dataset": {name: statistics.fmean(v) for name, v in sorted(by_dataset.items())},
      "learning_rate": last["learning_rate"],
      "rank": last["rank"],
      "tokens_per_second": real / (time.perf_counter() - self._start),
      "padding_share": 1.0 - real / padded,
    }
    self._reset()
    return line


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
    """Flushes both."""
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


class TrainingError(RuntimeError):
  """A run that cannot go on; the message names step and file."""


class Recorder:
  """Takes the numbers of each finished step; writes and shows every `every`-th and the last."""

  def __init__(self, workdir: pathlib.Path, start: int, total: int, every: int):
    """`start` and `total` count updates of the whole run."""
    self._writer, self._window = Writer(workdir, start), Window()
    self._total, self._every = total, every
    self._bar = tqdm.tqdm(
      initial=start,
      total=total,
      desc="training",
      unit="step",
      dynamic_ncols=True,
      mininterval=0.5 if sys.stderr.isatty() else 10.0,  # a log file need not hold every step
    )

  def __enter__(self) -> "Recorder":
    return self

  def __exit__(self, *_: Any) -> None:
    self._bar.close()
    self._writer.close()

  def record(self, batch: Batch, device_metrics: Any) -> None:
    """Reads one step's metrics from the device; call it when a later step has been started.

    Raises:
      TrainingError: loss or gradient are no longer finite.
    """
    values = {name: value.item() for name, value in jax.device_get(device_metrics).items()}
    step = batch.step + 1
    if not math.isfinite(values["loss"] + values["gradient_norm"]):
      raise TrainingError(
        f"step {step} ({batch.dataset}): the loss is {values['loss']}, its gradient norm "
        f"{values['gradient_norm']}. Lower optimizer.learning_rate and start "
        "again in a new --workdir, or look at that file"
      )
    self._window.add(batch, values)
    if step % self._every == 0 or step == self._total:
      line = self._window.summary()
      self._writer.write(line)
      self._bar.set_postfix_str(
        f"loss {line['loss']:.3f}, {line['tokens_per_second']:,.0f} tokens/s, "
        f"padding {line['padding_share']:.0%}",
        refresh=False,
      )
    self._bar.update()
