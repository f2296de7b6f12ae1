"""Looking rows up in a factorised token table against materialising the table.

    JAX_PLATFORMS=cpu python -m tests.benchmarks.table

Measures `U[ids] @ V` (what the encoder does) and `(U @ V)[ids]`, forward and backward with respect
to U and V, for Qwen's 151,936 tokens, rank 512 and random ids. FLOPs are those of the products,
counted by hand; adding up the gradients of repeated ids and writing the gradient of U is in both
times and in neither count. Memory is the compiler's peak of temporaries, without U, V and their
gradients, which both have.
"""

import argparse
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jaxtyping import Array, Float, Int

from tests.benchmarks import common

HEADER = (
  *("width", "tokens", "(U V)[ids] s", "U[ids] V s", "ratio"),
  *("(U V)[ids] TFLOP", "U[ids] V TFLOP", "ratio", "(U V)[ids] MiB", "U[ids] V MiB"),
)


def factored(u: Float[Array, "V R"], v: Float[Array, "R D"], ids: Int[Array, " T"], dtype: Any):
  return u[ids].astype(dtype) @ v.astype(dtype)


def materialised(u: Float[Array, "V R"], v: Float[Array, "R D"], ids: Int[Array, " T"], dtype: Any):
  return (u.astype(dtype) @ v.astype(dtype))[ids]


def with_gradients(embed: Callable[..., Array], u: Array, v: Array, ids: Array, d: Array) -> Any:
  """Returns the vectors and the gradients of U and V, given that of the vectors."""
  out, pull = jax.vjp(lambda u, v: embed(u, v, ids, d.dtype), u, v)
  return out, pull(d)


def inputs(width: int, tokens: int, args: Any) -> tuple[Array, ...]:
  keys = jax.random.split(jax.random.key(0), 4)
  return (
    jax.random.normal(keys[0], (args.vocab, args.rank)),
    jax.random.normal(keys[1], (args.rank, width)),
    jax.random.randint(keys[2], (tokens,), 0, args.vocab),
    jax.random.normal(keys[3], (tokens, width), args.dtype),
  )


def flops(rows: int, width: int, args: Any) -> float:
  """Returns the FLOPs of `rows` rows of U times V: one product forward, two backward."""
  return 6.0 * rows * args.rank * width


def measure(width: int, tokens: int, args: Any) -> list[Any]:
  arrays = inputs(width, tokens, args)
  programs = {
    name: jax.jit(functools.partial(with_gradients, embed)).lower(*arrays).compile()
    for name, embed in (("table", materialised), ("rows", factored))
  }
  runs = {name: functools.partial(run, *arrays) for name, run in programs.items()}
  time = common.seconds(runs, args.repeats)
  table, rows = (flops(n, width, args) for n in (args.vocab, tokens))
  return [
    *(width, f"{tokens:,}"),
    *(f"{time['table']:.3g}", f"{time['rows']:.3g}", f"{time['table'] / time['rows']:.1f}"),
    *(common.tera(table), common.tera(rows), f"{table / rows:.1f}"),
    *(common.mib(common.temporaries(programs[name])) for name in ("table", "rows")),
  ]


def rows(args: Any) -> Iterator[list[Any]]:
  for width, tokens in itertools.product(args.widths, args.tokens):
    yield measure(width, tokens, args)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--vocab", type=int, default=151_936)
  parser.add_argument("--rank", type=int, default=512)
  parser.add_argument("--widths", type=int, nargs="+", default=(640, 1024))
  parser.add_argument("--tokens", type=int, nargs="+", default=(1024, 4096, 16_384))
  parser.add_argument("--dtype", default="float32", help="of the product")
  parser.add_argument("--repeats", type=int, default=3)
  args = parser.parse_args()
  print(f"{common.machine()}; vocabulary {args.vocab:,}, rank {args.rank}, {args.dtype}\n")
  common.print_table(HEADER, rows(args))


if __name__ == "__main__":
  main()
