"""Our objective against the straightforward loop over exits and output dims.

    JAX_PLATFORMS=cpu python -m tests.benchmarks.head
    python -m tests.benchmarks.head --dtype bfloat16 --cases 4096x7 16384x1

Measures loss and gradient to the states of a retrieval batch: hard and in-batch cross-entropy,
duplicates masked. The loop is what one writes first: for each exit and dim slice, normalise, two
cross-entropies, float32 at the highest precision, all in one program. Both losses must agree
before anything is timed.

FLOPs are those of the products, counted by hand: XLA's cost analysis counts the body of a loop
once, and our head is a loop. Memory is the compiler's peak of temporaries, without states and
gradient, which both have.
"""

import argparse
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, UInt32

from mlembed_jax.batch import Arrays
from mlembed_jax.config_fields import Config
from mlembed_jax.matryoshka import Matryoshka, default_dims, default_exits, dim_weights
from mlembed_jax.objective import losses
from mlembed_jax.objective.losses import Teachers
from mlembed_jax.objective.tiles import TILE_ROWS
from tests.benchmarks import common
from tests.material import kind_of

TEMPERATURE = 0.05
AGREE = 1e-5  # relative; both sum in float32
HEADER = (
  *("batch", "stored negatives", "loop s", "ours s", "loop / ours"),
  *("loop TFLOP", "ours TFLOP", "loop / ours", "loop MiB", "ours MiB", "loop / ours"),
)


def axes_for(width: int, layers: int) -> Matryoshka:
  """Returns all default dims and exits, ranks aside."""
  dims = default_dims(width)
  return Matryoshka(dims, dim_weights(dims), default_exits(layers), (), ())


def ours(
  states: Float[Array, "E B C D"],
  hashes: UInt32[Array, "B C 2"],
  *,
  config: Config,
  axes: Matryoshka,
) -> Float[Array, ""]:
  return losses.objective(
    states,
    Arrays(hashes),
    losses.LossSettings(kind_of("retrieval"), axes, config.losses, config.kd),
    losses.Learnt(TEMPERATURE),
    teachers=Teachers(),
  ).loss


def loop(
  states: Float[Array, "E B C D"], hashes: UInt32[Array, "B C 2"], *, axes: Matryoshka
) -> Float[Array, ""]:
  own_BK, inbatch_BB = masks(hashes)
  total = jnp.zeros(())
  for x_BCD in states.astype(jnp.float32):
    for dim, weight in zip(axes.dims, axes.dim_weights, strict=True):
      x = x_BCD[..., :dim]
      x = x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
      own = product("bd,bkd->bk", x[:, 0], x[:, 1:])
      inbatch = product("bd,nd->bn", x[:, 0], x[:, 1])
      total += weight * cross_entropy(own, own_BK, jnp.zeros(len(x), int))
      total += weight * cross_entropy(inbatch, inbatch_BB, jnp.arange(len(x)))
  return total / len(states)


def product(equation: str, a: Array, b: Array) -> Array:
  return jnp.einsum(equation, a, b, precision=jax.lax.Precision.HIGHEST) / TEMPERATURE


def cross_entropy(logits: Array, mask: Array, labels: Array) -> Array:
  masked = jnp.where(mask, logits, -jnp.inf)
  return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(masked, labels))


def masks(hashes_BC2: UInt32[Array, "B C 2"]) -> tuple[Bool[Array, "B K"], Bool[Array, "B B"]]:
  """Returns which own documents and which positives of the batch each query's softmax holds."""

  def same(a: Array, b: Array) -> Array:
    return jnp.all(a == b, axis=-1)

  query, positive, stored = hashes_BC2[:, :1], hashes_BC2[:, 1:2], hashes_BC2[:, 2:]
  own = ~(same(stored, query) | same(stored, positive))
  queries, positives = query[:, 0][None], positive[:, 0][None]
  repeated = same(query, queries) | same(query, positives) | same(positive, positives)
  first = jnp.ones((len(own), 1), bool)
  return jnp.concatenate([first, own], axis=1), ~repeated | jnp.eye(len(own), dtype=bool)


def head_flops(batch: int, documents: int, axes: Matryoshka) -> float:
  """Returns the FLOPs of our products, forward and backward; `documents` are the row's own.

  All dims share one product over the width: 2 forward and 4 backward. Over several tiles the
  backward pass computes the logits anew, 2 more (once: XLA merges the two places that ask for
  them, and with a single tile the forward pass too).
  """
  per_pair = 8.0 if batch > TILE_ROWS else 6.0
  return len(axes.exits) * axes.dims[-1] * batch * (per_pair * batch + 6.0 * documents)


def loop_flops(batch: int, documents: int, axes: Matryoshka) -> float:
  """Returns the FLOPs of the loop's products: 2 forward and 4 backward, each dim by itself."""
  return len(axes.exits) * sum(axes.dims) * batch * 6.0 * (batch + documents)


def inputs(batch: int, texts: int, axes: Matryoshka, dtype: Any) -> tuple[Array, Array]:
  shape = (len(axes.exits), batch, texts, axes.dims[-1])
  states = jax.jit(lambda key: jax.random.normal(key, shape, dtype))(jax.random.key(0))
  return states, jnp.asarray(common.random_hashes(batch, texts))


def check(programs: dict[str, Any], arrays: tuple[Array, Array]) -> None:
  found = {name: float(run(*arrays)[0]) for name, run in programs.items()}
  if abs(found["ours"] / found["loop"] - 1) > AGREE:
    raise SystemExit(f"the losses differ: {found}")


def measure(case: str, axes: Matryoshka, config: Config, args: Any) -> list[Any]:
  batch, negatives = map(int, case.split("x"))
  arrays = inputs(batch, 2 + negatives, axes, args.dtype)
  ways = {
    "loop": functools.partial(loop, axes=axes),
    "ours": functools.partial(ours, axes=axes, config=config),
  }
  programs = {
    name: jax.jit(jax.value_and_grad(way)).lower(*arrays).compile() for name, way in ways.items()
  }
  check(programs, arrays)
  runs = {name: functools.partial(run, *arrays) for name, run in programs.items()}
  time = common.seconds(runs, args.repeats)
  flops = [count(batch, 1 + negatives, axes) for count in (loop_flops, head_flops)]
  memory = {name: common.temporaries(run) for name, run in programs.items()}
  return [
    *(f"{batch:,}", negatives),
    *(f"{time['loop']:.3g}", f"{time['ours']:.3g}", f"{time['loop'] / time['ours']:.2f}"),
    *(*map(common.tera, flops), f"{flops[0] / flops[1]:.2f}"),
    *(common.mib(memory["loop"]), common.mib(memory["ours"])),
    f"{memory['loop'] / memory['ours']:.2f}",
  ]


def rows(axes: Matryoshka, config: Config, args: Any) -> Iterator[list[Any]]:
  for case in args.cases:
    yield measure(case, axes, config, args)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  # 7 stored negatives at 4096 rows are 1.1 GB per copy of the states in float32.
  cases = ("512x1", "512x7", "4096x1")
  parser.add_argument("--cases", nargs="+", default=cases, help="rows x stored negatives per row")
  parser.add_argument("--width", type=int, default=1024)
  parser.add_argument("--layers", type=int, default=28, help="decide the exits; 28: seven")
  parser.add_argument("--dtype", default="float32", help="of the states")
  parser.add_argument("--repeats", type=int, default=5)
  args = parser.parse_args()
  axes = axes_for(args.width, args.layers)
  config = common.load_config(common.CONFIGS / "base.py")
  print(f"{common.machine()}; {len(axes.exits)} exits, dims {axes.dims}, {args.dtype}\n")
  common.print_table(HEADER, rows(axes, config, args))


if __name__ == "__main__":
  main()
