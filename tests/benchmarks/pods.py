"""What every size needs on pods that are not here: memory, and an estimate of time.

    python -m tests.benchmarks.pods
    python -m tests.benchmarks.pods --configs configs/8b.py --topologies v6e:16x16 --batches 512 \\
      --text_tokens 1024 --block 18432

Needs the extra [tpu]. Each row is one compilation of the real update, of half a minute to four.
512 rows are the setting of the second stage, 4,096 a large batch, of which not all activations can
be kept. How the estimate is made: `mlembed_jax.estimate.estimate`.
"""

import argparse
import math
import pathlib
from collections.abc import Iterator

import jax

from mlembed_jax.devices.tpu import TPUS
from mlembed_jax.errors import ConfigError
from mlembed_jax.estimate.estimate import Step, Target, estimate_step, gib
from tests.benchmarks import common

SIZES = [common.CONFIGS / f"{name}.py" for name in ("0_6b", "1_7b", "4b", "8b")]
TOPOLOGIES = [f"{name}:{'x'.join(map(str, tpu.pod))}" for name, tpu in TPUS.items() if tpu.pod]
HEADER = (
  *("config", "topology", "rows", "mesh", "remat", "block", "GiB", "free"),
  *("s", "MFU", "tokens/s/chip", "compiled in s"),
)


def measure(path: pathlib.Path, topology: str, batch: int, args: argparse.Namespace) -> tuple:
  """Returns one row."""
  variant = topology.partition(":")[0]
  target, step = Target.parse(topology, 1), Step("retrieval", args.text_tokens)
  micro_batch = args.block * math.prod(target.torus)
  fields = {"data.global_batch": batch, "data.micro_batch": micro_batch}
  try:
    e = estimate_step(common.load_config(f"{path}:{variant}", **fields), target, step)
  except ConfigError as error:
    raise SystemExit(f"error: {path}:{variant} on {topology}: {error}") from error
  speed = e.estimated_step_seconds, e.estimated_mfu, e.tokens_per_second_per_chip
  formats = ("{:.2f}", "{:.3f}", "{:,.0f}")
  return (
    *(f"{path.stem}:{variant}", topology, f"{batch:,}", e.mesh, e.remat),
    *(f"{e.block:,}", gib(e.hbm_bytes_per_device), f"{e.free:.0%}"),
    *(f.format(x) if e.fits else "-" for f, x in zip(formats, speed, strict=True)),
    f"{e.compile_seconds:.0f}",
  )


def rows(args: argparse.Namespace) -> Iterator[tuple]:
  for batch in args.batches:
    for path in args.configs:
      for topology in args.topologies:
        yield measure(path, topology, batch, args)


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument("--configs", nargs="+", type=pathlib.Path, default=SIZES)
  parser.add_argument("--topologies", nargs="+", default=TOPOLOGIES)
  parser.add_argument("--batches", nargs="+", type=int, default=[512, 4096])
  parser.add_argument("--text_tokens", type=int, default=256, help="of each text; 0: 1,024")
  parser.add_argument(
    "--block", type=int, default=0, help="tokens encoded at a time per chip; 0: as training chooses"
  )
  jax.config.update("jax_platforms", "cpu")  # the compiler is asked, not a device
  args = parser.parse_args()
  print(f"texts of {args.text_tokens or 'as many as possible'} tokens")
  common.print_table(HEADER, rows(args))


if __name__ == "__main__":
  main()
