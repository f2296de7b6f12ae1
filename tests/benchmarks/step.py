"""What all of 3D-ML adds to a train step: against the same step with plain InfoNCE.

    JAX_PLATFORMS=cpu python -m tests.benchmarks.step
    python -m tests.benchmarks.step --config configs/0_6b.py --dtype bfloat16 --tokens 512

Measures the whole step (forward, backward, AdamW), with all default dims, exits and ranks and with
only the full ones, rematerialisation as the configuration has it, every text as long as its sheet
and all of them in one block. The two steps run in turn. `head` is the objective with its gradient
to the states, timed by itself.

FLOPs are those of the products of encoder and objective, counted by hand: XLA's cost analysis
counts the body of a loop once, and layers are a loop. Recomputed ones count. Memory is what a
device needs for the step by the compiler: state, batch and temporaries.
"""

import argparse
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mlembed_jax.batch import Arrays, Kind
from mlembed_jax.config_fields import Config, ModelConfig
from mlembed_jax.data import packing
from mlembed_jax.matryoshka import Matryoshka, plan
from mlembed_jax.parallel.sharding import batch_sharding, batch_shards, make_mesh, put_batch
from mlembed_jax.training import lowering, optimizer, train_state, train_step
from tests.benchmarks import common
from tests.benchmarks.head import head_flops, ours
from tests.material import kind_of

STEPS = 1000  # of the schedule
HEADER = (
  *("step", "dims", "exits", "ranks", "seconds", "tokens/s", "head s", "head / step"),
  *("TFLOP", "MiB per device"),
)


def only_full(config: Config) -> Config:
  """Returns the configuration with every axis of 3D-ML switched off."""
  model = config.model
  ranks = (model.rank,) if model.rank else ()
  axes = dataclasses.replace(
    config.matryoshka, dims=(model.width,), exits=(model.layers,), ranks=ranks
  )
  return dataclasses.replace(config, matryoshka=axes)


def random_ids(config: Config, texts: int) -> np.ndarray:
  """Returns random tokens [B, C, T], every text as long as its sheet."""
  shape = (config.data.global_batch, texts, config.data.lengths[-1])
  return np.random.default_rng(0).integers(0, config.model.vocab, shape, np.int32)


def random_batch(config: Config, texts: int, mesh: Mesh) -> Arrays:
  shards, rows, tokens = batch_shards(mesh.shape), config.data.global_batch, config.data.lengths[-1]
  layout = lowering.kind_layout(config, Kind("retrieval", 1, texts - 2, tokens, None), shards)
  ids: Any = random_ids(config, texts).reshape(shards, layout.texts, tokens)
  sheets = packing.whole(packing.pack(ids, layout), layout)
  return put_batch(Arrays(common.random_hashes(rows, texts), sheets=sheets), mesh)


class Stepper:
  """A compiled step with its state, which each call replaces."""

  def __init__(self, config: Config, mesh: Mesh, batch: Arrays):
    self.batch = batch
    tx = optimizer.make(config.optimizer, STEPS)
    step: Any = train_step.make(config, STEPS, mesh)
    abstract = train_state.abstract(config, tx, mesh)
    self.compiled = step.lower(abstract, batch, None, kind=kind_of("retrieval")).compile()
    self.state = train_state.create(config, tx, mesh)

  def __call__(self) -> Any:
    self.state, metrics = self.compiled(self.state, self.batch, None)
    return self.state, metrics


def head_of(config: Config, mesh: Mesh, batch: Arrays) -> Any:
  """Returns the objective with its gradient to random states of the batch, ready to run."""
  axes = plan(config.model, config.matryoshka)
  shape = (len(axes.exits), *batch.hashes.shape[:2], config.model.width)
  layout = NamedSharding(mesh, PartitionSpec(None, *batch_sharding(mesh).spec))
  draw = functools.partial(jax.random.normal, shape=shape, dtype=jnp.dtype(config.model.dtype))
  states = jax.jit(draw, out_shardings=layout)(jax.random.key(0))
  loss = functools.partial(ours, axes=axes, config=config)
  compiled = jax.jit(jax.value_and_grad(loss)).lower(states, batch.hashes).compile()
  return functools.partial(compiled, states, batch.hashes)


def encoder_flops(model: ModelConfig, texts: int, tokens: int) -> float:
  """Returns the FLOPs of the encoder's products, forward and backward, of texts of one length."""
  m = model
  attention = 2 * m.width * (m.heads + m.kv_heads) * m.head_dim
  scores = 2 * tokens * m.heads * m.head_dim  # causal pairs are masked, not skipped
  layers = m.layers * (attention + 3 * m.width * m.ffn + scores)
  passes = 3 if m.remat != "full" else 4  # forward, twice that backward, forward again
  return 2.0 * texts * tokens * (passes * layers + 3 * m.rank * m.width)


def step_flops(config: Config, axes: Matryoshka, texts: int) -> float:
  rows, tokens = config.data.global_batch, config.data.lengths[-1]
  encoder = encoder_flops(config.model, rows * texts, tokens)
  return encoder + head_flops(rows, texts - 1, axes)


def describe(name: str, config: Config, time: dict[str, float], step: Stepper) -> list[Any]:
  axes = plan(config.model, config.matryoshka)
  whole, head = time[name], time[f"head of {name}"]
  texts = step.batch.hashes.shape[1]
  tokens = config.data.global_batch * texts * config.data.lengths[-1]
  return [
    *(name, len(axes.dims), len(axes.exits), len(axes.ranks)),
    *(f"{whole:.4g}", f"{tokens / whole:,.0f}", f"{head:.3g}", f"{head / whole:.2%}"),
    common.tera(step_flops(config, axes, texts)),
    common.mib(lowering.needed_bytes(step.compiled)),
  ]


def measure(config: Config, mesh: Mesh, args: Any) -> None:
  batch = random_batch(config, 2 + args.negatives, mesh)
  configs = {"plain InfoNCE": only_full(config), "3D-ML": config}
  steps = {name: Stepper(config, mesh, batch) for name, config in configs.items()}
  heads = {f"head of {name}": head_of(config, mesh, batch) for name, config in configs.items()}
  time = common.seconds(steps | heads, args.repeats)
  lines = [describe(name, config, time, steps[name]) for name, config in configs.items()]
  common.print_table(HEADER, lines)
  print(f"\n3D-ML / plain InfoNCE: {time['3D-ML'] / time['plain InfoNCE']:.3f} of the time")


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--config", default=common.CONFIGS / "140m.py", help="FILE[:variant]")
  parser.add_argument("--dtype", default="float32", help="of the computation")
  parser.add_argument("--batch", type=int, default=32, help="rows")
  parser.add_argument("--negatives", type=int, default=1, help="stored negatives per row")
  parser.add_argument("--tokens", type=int, default=64, help="per text")
  parser.add_argument("--repeats", type=int, default=5)
  args = parser.parse_args()
  changes = {"model.dtype": args.dtype, "data.lengths": (args.tokens,)}
  texts = 2 + args.negatives
  changes |= {"data.global_batch": args.batch, "data.micro_batch": args.batch * texts * args.tokens}
  config = common.load_config(args.config, **changes)
  mesh = make_mesh(config)
  print(
    f"{common.machine()}; {args.config}, {args.dtype}, remat {config.model.remat}, "
    f"{args.batch} rows x {texts} texts x {args.tokens} tokens\n"
  )
  with common.on_mesh(mesh):
    measure(config, mesh, args)


if __name__ == "__main__":
  main()
