"""Numbers of a run: metrics.jsonl, TensorBoard files and the progress bar."""

import json
import os
import pathlib
import time
from typing import Any

import jax
import tensorboardX
import tqdm

from mlembed_jax.data.loader import Batch


class Window:
  """Losses, tokens and padding of the steps since the last logged line."""

  def __init__(self) -> None:
    self._reset()

  def _reset(self) -> None:
    self._start = time.perf_counter()
    self._losses: dict[str, list[float]] = {}
    self._real = self._padded = 0

  def add(self, batch: Batch, metrics: dict[str, Any]) -> None:
    """Counts one finished step."""
    self._losses.setdefault(batch.dataset, []).append(float(metrics["loss"]))
    self._real += batch.real_tokens
    self._padded += batch.tokens.size

  def summary(self) -> dict[str, Any]:
    """Returns loss (mean), loss by dataset, tokens per second and padding share; starts anew.

    Tokens are real ones; padding is not work.
    """
    values = [loss for dataset in self._losses.values() for loss in dataset]
    result = {
      "loss": sum(values) / len(values),
      "loss_by_dataset": {name: sum(v) / len(v) for name, v in sorted(self._losses.items())},
      "tokens_per_second": self._real / (time.perf_counter() - self._start),
      "padding_share": 1.0 - self._real / self._padded,
    }
    self._reset()
    return result


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
  temporary = path.with_name(f".{path.name}.{os.getpid()}")
  temporary.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
  temporary.replace(path)


def _step(line: str) -> float:
  try:
    return json.loads(line)["step"]
  except json.JSONDecodeError:  # the last line of a killed run may be cut short
    return float("inf")


class Recorder:
  """Takes the numbers of each finished step; writes and shows every `every`-th and the last."""

  def __init__(self, workdir: pathlib.Path, start: int, total: int, every: int):
    """`start` and `total` count updates of the whole run."""
    self._writer, self._window = Writer(workdir, start), Window()
    self._total, self._every = total, every
    self._bar = tqdm.tqdm(
      initial=start, total=total, desc="training", unit="step", dynamic_ncols=True, mininterval=0.5
    )

  def __enter__(self) -> "Recorder":
    return self

  def __exit__(self, *_: Any) -> None:
    self._bar.close()
    self._writer.close()

  def record(self, batch: Batch, device_metrics: Any) -> None:
    """Reads one step's metrics from the device; call it when a later step has been started."""
    values = {name: value.item() for name, value in jax.device_get(device_metrics).items()}
    self._window.add(batch, values)
    step = batch.step + 1
    if step % self._every == 0 or step == self._total:
      line = {"step": step} | values | self._window.summary()
      self._writer.write(line)
      self._bar.set_postfix_str(
        f"loss {line['loss']:.3f}, {line['tokens_per_second']:,.0f} tokens/s, "
        f"padding {line['padding_share']:.0%}",
        refresh=False,
      )
    self._bar.update()
