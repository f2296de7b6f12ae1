"""What a train step needs per device as the global batch grows, and the head alone at 65,536 rows.

    JAX_PLATFORMS=cpu python -m tests.benchmarks.memory
    JAX_PLATFORMS=cpu python -m tests.benchmarks.memory --topology v5p:4x4x4 \\
      --config configs/0_6b.py

Nothing runs: programs are compiled, for simulated CPU devices or, with --topology, for a TPU that
need not be there (libtpu must), and the compiler says what one device needs. Two tables:

step: GradCache with data.micro_batch fixed, against the same step with the whole batch encoded at
  once, one block with a sheet for every text. Total is arguments + outputs + temporaries, outputs
  in the place of arguments counted once.
head: value and gradient of the objective alone, states and their gradient included.

A micro-batch has at least one sheet for each device along data x fsdp. Each program of a TPU takes
one to two minutes of compile time.
"""

import argparse
import functools
import importlib
import importlib.metadata
import os
import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mlembed_jax.batch import Kind
from mlembed_jax.config_fields import Config
from mlembed_jax.matryoshka import Matryoshka, default_dims, dim_weights
from mlembed_jax.parallel.sharding import batch_sharding, make_mesh
from mlembed_jax.training import lowering
from tests.benchmarks import common
from tests.benchmarks.head import ours

STEPS = 1000  # of the schedule
STEP_HEADER = (
  *("global batch", "arguments MiB", "temporaries MiB", "total MiB", "to first row"),
  *("at once: arguments MiB", "temporaries MiB", "total MiB", "to first row"),
)
HEAD_HEADER = (
  *("rows", "exits", "dims", "states MiB", "temporaries MiB", "with gradient MiB"),
  "logits of all exits and dims MiB",
)


def topology_devices(name: str) -> list[Any]:
  """Returns the devices of a TPU that is only compiled for."""
  # Otherwise libtpu asks the cloud's metadata server, which takes minutes where there is none.
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
  try:
    importlib.import_module("libtpu")
  except ImportError as error:
    known = importlib.metadata.requires("jax") or []
    wanted = [line.split(";")[0].strip() for line in known if line.startswith("libtpu")]
    raise SystemExit(f"--topology: pip install '{(wanted or ['libtpu'])[0]}'") from error
  from jax.experimental import topologies

  return topologies.get_topology_desc(platform="tpu", topology_name=name).devices


def simulated_devices(count: int) -> list[Any]:
  jax.config.update("jax_num_cpu_devices", count)
  return jax.devices("cpu")


def compile_or_reason(lowered: Any) -> Any:
  """Returns the program, or what the compiler says of one that no device can hold."""
  try:
    return lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    found = re.search(r"\(([\d.]+)([MG])\)", str(error))
    size = float(found[1]) * {"M": 1, "G": 1024}[found[2]] if found else None
    return "too large" if size is None else f"{size:,.0f}: too large"


def step_program(config: Config, mesh: Mesh, negatives: int) -> Any:
  kind = Kind("retrieval", 1, negatives, config.data.lengths[-1], None)
  with common.on_mesh(mesh):
    return compile_or_reason(lowering.lowered_step(config, kind, STEPS, mesh))


def load(args: Any, global_batch: int, micro_batch: int) -> Config:
  changes = {"data.global_batch": global_batch, "data.micro_batch": micro_batch}
  changes |= {"data.lengths": (args.tokens,), "model.dtype": args.dtype}
  return common.load_config(args.config, **changes)


def cells(program: Any, first: int | None) -> tuple[list[str], int | None]:
  """Returns the columns arguments, temporaries, total and its ratio to `first`, and the total."""
  if isinstance(program, str):
    return ["-", program, "-", "-"], None
  m, total = program.memory_analysis(), lowering.needed_bytes(program)
  sizes = (m.argument_size_in_bytes, m.temp_size_in_bytes, total)
  return [*map(common.mib, sizes), f"{total / (first or total):.3f}"], total


def step_rows(devices: list[Any], args: Any) -> Iterator[list[str]]:
  first = None
  for batch in args.batches:
    whole = batch * (2 + args.negatives) * args.tokens
    micro_batches = dict.fromkeys((min(args.micro_batch, whole), whole))
    configs = [load(args, batch, micro) for micro in micro_batches]
    mesh = make_mesh(configs[0], devices)
    programs = [step_program(config, mesh, args.negatives) for config in configs]
    cached, total = cells(programs[0], first)
    first = first or total
    at_once, _ = cells(programs[-1], first)
    yield [f"{batch:,}", *cached, *at_once]


def head_program(config: Config, axes: Matryoshka, mesh: Mesh, args: Any) -> Any:
  rows = batch_sharding(mesh)
  layout = NamedSharding(mesh, PartitionSpec(None, *rows.spec))
  texts = 2 + args.negatives
  shape = (len(axes.exits), args.head_rows, texts, axes.dims[-1])
  states = jax.ShapeDtypeStruct(shape, args.dtype, sharding=layout)
  hashes = jax.ShapeDtypeStruct((args.head_rows, texts, 2), jnp.uint32, sharding=rows)
  loss = functools.partial(ours, axes=axes, config=config)
  with common.on_mesh(mesh):
    run = jax.jit(jax.value_and_grad(loss), out_shardings=(None, layout))
    return compile_or_reason(run.lower(states, hashes))


def head_row(devices: list[Any], args: Any) -> list[str]:
  dims = default_dims(args.head_width)
  axes = Matryoshka(dims, dim_weights(dims), tuple(range(1, args.head_exits + 1)), (), ())
  config = load(args, args.head_rows, args.micro_batch)
  program = head_program(config, axes, make_mesh(config, devices), args)
  (states, *found, _), _ = cells(program, None)
  logits = 4 * len(axes.exits) * len(dims) * args.head_rows**2 / len(devices)  # float32
  size = (f"{args.head_rows:,}", str(args.head_exits), f"{len(dims)} to {dims[-1]:,}")
  return [*size, states, *found, common.mib(logits)]


def parse() -> argparse.Namespace:
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--parts", nargs="+", choices=("step", "head"), default=("step", "head"))
  parser.add_argument("--topology", default="", help="such as v5p:4x4x4; empty: simulated devices")
  parser.add_argument("--devices", type=int, default=64, help="simulated ones")
  parser.add_argument("--config", default=common.CONFIGS / "140m.py", help="FILE[:variant]")
  parser.add_argument("--dtype", default="", help="bfloat16 on a TPU, float32 on CPU")
  parser.add_argument("--batches", type=int, nargs="+", default=(64, 256, 1024, 4096))
  parser.add_argument("--micro-batch", type=int, default=262_144, help="tokens over all devices")
  parser.add_argument("--negatives", type=int, default=7, help="stored negatives per row")
  parser.add_argument("--tokens", type=int, default=512, help="of a sheet")
  parser.add_argument("--head-rows", type=int, default=65_536)
  parser.add_argument("--head-width", type=int, default=4096)
  parser.add_argument("--head-exits", type=int, default=8)
  args = parser.parse_args()
  # The CPU compiler computes in float32 and would add a copy of every bfloat16 array.
  args.dtype = args.dtype or ("bfloat16" if args.topology else "float32")
  return args


def main() -> None:
  args = parse()
  devices = topology_devices(args.topology) if args.topology else simulated_devices(args.devices)
  print(
    f"{len(devices)} x {devices[0].device_kind}, compiled only; {args.dtype}, "
    f"{2 + args.negatives} texts per row\n"
  )
  if "step" in args.parts:
    print(
      f"step: {args.config}, micro-batch {args.micro_batch:,} tokens, sheets of {args.tokens}\n"
    )
    common.print_table(STEP_HEADER, step_rows(devices, args))
    print()
  if "head" in args.parts:
    common.print_table(HEAD_HEADER, [head_row(devices, args)])


if __name__ == "__main__":
  main()
