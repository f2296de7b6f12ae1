"""What checkpoints with digests cost: against the same ones without, and against the step.

    JAX_PLATFORMS=cpu python -m tests.benchmarks.checkpoint
    python -m tests.benchmarks.checkpoint --config configs/0_6b.py --dtype bfloat16

`blocking` is how long the step loop waits for a save, `whole` until the checkpoint is complete.
`share` is what a save adds to the steps that run beside it, as a share of `--every` steps.
`restore` reads the newest checkpoint onto the mesh; with digests, all files are checked first. The
ways run in turn.
"""

import argparse
import contextlib
import dataclasses
import pathlib
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from typing import Any
from unittest import mock

import jax

from mlembed_jax.config_fields import Config
from mlembed_jax.parallel.sharding import make_mesh
from mlembed_jax.training import checkpoint, saved
from mlembed_jax.training.checkpoint import Checkpoints, Retention
from tests.benchmarks import common, step

WAYS = ("without", "with")


@contextlib.contextmanager
def _digests(way: str) -> Iterator[None]:
  """Makes the checkpoints inside with digests, or as orbax has them."""
  with contextlib.ExitStack() as stack:
    if way == "without":
      plain = checkpoint.ocp.StandardCheckpointHandler.finalize
      stack.enter_context(mock.patch.object(checkpoint.Marked, "finalize", plain))
      stack.enter_context(mock.patch.object(checkpoint, "digest_checkpoint", lambda folder: None))
    yield


@dataclasses.dataclass
class Times:
  """Seconds of one way, one per repeat."""

  blocking: list[float] = dataclasses.field(default_factory=list)
  whole: list[float] = dataclasses.field(default_factory=list)
  restore: list[float] = dataclasses.field(default_factory=list)
  steps: list[float] = dataclasses.field(default_factory=list)


def _steps(stepper: step.Stepper, count: int) -> float:
  start = time.perf_counter()
  for _ in range(count):
    stepper()
  jax.block_until_ready(stepper.state)
  return time.perf_counter() - start


def measure(config: Config, folder: pathlib.Path, steps: int, repeats: int) -> dict[str, Any]:
  """Returns the times of each way, the seconds of the steps alone, and bytes per parameter."""
  mesh = make_mesh(config)
  with common.on_mesh(mesh):
    stepper = step.Stepper(config, mesh, step.random_batch(config, 4, mesh))
    _steps(stepper, 1)
    times, alone = {way: Times() for way in WAYS}, []
    for repeat in range(repeats):
      alone.append(_steps(stepper, steps))
      for way in WAYS:
        with _digests(way):
          _one(times[way], way, stepper, folder / f"{way}{repeat}", steps)
    parameters = sum(x.size for x in jax.tree.leaves(stepper.state.params))
  stored = sum(p.stat().st_size for p in (folder / "with0").rglob("*") if p.is_file())
  return {"times": times, "alone": alone, "bytes": stored / parameters, "parameters": parameters}


def _one(times: Times, way: str, stepper: step.Stepper, workdir: pathlib.Path, steps: int) -> None:
  checkpoints = Checkpoints(Retention(workdir, 1))
  start = time.perf_counter()
  checkpoints.save(1, stepper.state)
  times.blocking.append(time.perf_counter() - start)
  times.steps.append(_steps(stepper, steps) + times.blocking[-1])
  checkpoints.wait()
  times.whole.append(time.perf_counter() - start)
  abstract = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), stepper.state
  )
  assert (workdir / "checkpoints/1/default" / saved.DIGESTS).exists() == (way == "with")
  start = time.perf_counter()
  newest = checkpoints.newest_whole() if way == "with" else 1
  assert newest == 1
  jax.block_until_ready(checkpoints.restore(newest, abstract))
  times.restore.append(time.perf_counter() - start)
  checkpoints.close()
  if not workdir.name.startswith("with0"):
    shutil.rmtree(workdir)


def main() -> None:
  """Prints a table and the ratios."""
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--config", default=common.CONFIGS / "140m.py", help="FILE[:variant]")
  parser.add_argument("--dtype", default="float32", help="of the computation")
  parser.add_argument("--batch", type=int, default=32, help="rows")
  parser.add_argument("--tokens", type=int, default=64, help="per text")
  parser.add_argument("--folder", help="on the disk that is measured; a temporary one if not given")
  parser.add_argument("--repeats", type=int, default=3)
  parser.add_argument("--steps", type=int, default=2, help="that run beside a save")
  parser.add_argument("--every", type=int, default=50, help="steps between two saves")
  args = parser.parse_args()
  changes = {"model.dtype": args.dtype, "data.lengths": (args.tokens,)}
  changes |= {"data.global_batch": args.batch, "data.micro_batch": args.batch * 4 * args.tokens}
  config = common.load_config(args.config, **changes)
  print(f"{common.machine()}; {args.config}, {args.batch} rows x 4 texts x {args.tokens} tokens\n")
  with tempfile.TemporaryDirectory(dir=args.folder) as folder:
    found = measure(config, pathlib.Path(folder), args.steps, args.repeats)
  alone = statistics.median(found["alone"])
  print(f"{found['parameters'] / 1e6:,.0f} M parameters, {found['bytes']:.1f} bytes of each")
  print(f"{args.steps} steps alone: {alone:.2f} s\n")
  print("| digests | blocking ms | whole s | share | restore s |\n| --- | --- | --- | --- | --- |")
  for way, times in found["times"].items():
    extra = max(0.0, statistics.median(times.steps) - alone)
    share = extra / (alone / args.steps * args.every)
    middle = {f.name: statistics.median(getattr(times, f.name)) for f in dataclasses.fields(times)}
    print(
      f"| {way} | {middle['blocking'] * 1e3:,.0f} | {middle['whole']:.2f} | {share:.2%} | "
      f"{middle['restore']:.2f} |"
    )
  ratio = statistics.median(found["times"]["with"].restore) / statistics.median(
    found["times"]["without"].restore
  )
  print(f"\nrestore with checks against without: {ratio:.2f}")


if __name__ == "__main__":
  main()
