"""What every size needs on pods that are not here: memory, and an estimate of time.

    python -m tests.benchmarks.pods
    python -m tests.benchmarks.pods --configs configs/8b.py --topologies v6e:16x16 --batches 512

Needs the extra [tpu]. Each row is one compilation of the real update, of half a minute to four.
Texts have 1,024 tokens each; 512 rows are the setting of the second stage, 4,096 a large batch, of
which not all activations can be kept. How the estimate is made: `mlembed_jax.pod`.
"""

import argparse
import pathlib
from collections.abc import Iterator

import jax

from mlembed_jax import pod
from mlembed_jax.config_fields import ConfigError
from tests.benchmarks import common

SIZES = [common.CONFIGS / f"{name}.py" for name in ("0_6b", "1_7b", "4b", "8b")]
TOPOLOGIES = ["v5e:16x16", "v5p:4x4x4", "v6e:16x16"]
HEADER = (
  *("config", "topology", "rows", "mesh", "remat", "block", "GiB", "free"),
  *("s", "MFU", "tokens/s/chip", "compiled in s"),
)


def measure(path: pathlib.Path, topology: str, batch: int) -> tuple[str, ...]:
  """Returns one row."""
  variant = topology.partition(":")[0]
  config = common.load_config(f"{path}:{variant}", **{"data.global_batch": batch})
  target, step = pod.Target.parse(topology, 1), pod.Step("retrieval", 0)
  try:
    e = pod.estimate(config, target, step)
  except ConfigError as error:
    raise SystemExit(f"error: {path}:{variant} on {topology}: {error}") from error
  return (
    *(f"{path.stem}:{variant}", topology, f"{batch:,}", e.mesh, e.remat),
    *(f"{e.micro_batch // e.devices:,}", pod.gib(e.hbm_bytes_per_device), f"{e.free:.0%}"),
    *(f"{e.estimated_step_seconds:.2f}", f"{e.estimated_mfu:.3f}"),
    *(f"{e.tokens_per_second_per_chip:,.0f}", f"{e.compile_seconds:.0f}"),
  )


def rows(args: argparse.Namespace) -> Iterator[tuple[str, ...]]:
  for batch in args.batches:
    for path in args.configs:
      for topology in args.topologies:
        yield measure(path, topology, batch)


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument("--configs", nargs="+", type=pathlib.Path, default=SIZES)
  parser.add_argument("--topologies", nargs="+", default=TOPOLOGIES)
  parser.add_argument("--batches", nargs="+", type=int, default=[512, 4096])
  jax.config.update("jax_platforms", "cpu")  # the compiler is asked, not a device
  common.print_table(HEADER, rows(parser.parse_args()))


if __name__ == "__main__":
  main()
