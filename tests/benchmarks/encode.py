"""Texts per second of our encoder and of sentence-transformers, with the same exported folder.

    python -m tests.benchmarks.encode --folder DIR --texts FILE.parquet

Both give float32 vectors of the same texts, in turn, best of `--repeats`; ours also at half the
trained depths and with a quarter of the dimensions. Before, every eighth text is encoded, and the
longest, which compiles the programs.
"""

import argparse
import pathlib
import time
from collections.abc import Callable, Iterator

import numpy as np
import pyarrow.parquet as pq
import sentence_transformers
import torch

from mlembed_jax.inference import Encoder
from tests.benchmarks.common import print_table

HEADER = ("encoder", "texts/s", "times sentence-transformers", "least cosine to it")
Encode = Callable[[list[str]], np.ndarray]


def read_texts(path: pathlib.Path, count: int) -> list[str]:
  """Returns texts of a file's string columns, in an order that mixes short and long ones."""
  table = pq.read_table(path)
  columns = [n for n in table.column_names if n in ("query", "passage", "text", "title", "en")]
  texts = [text for name in columns for text in table[name].to_pylist()]
  chosen = np.random.default_rng(0).permutation(len(texts))[:count]
  return [texts[i] for i in chosen.tolist()]


def encoders(args: argparse.Namespace) -> Iterator[tuple[str, Encode]]:
  theirs = sentence_transformers.SentenceTransformer(
    str(args.folder), device="cpu", model_kwargs={"dtype": torch.float32}
  )
  options = {"batch_size": args.batch, "normalize_embeddings": True, "show_progress_bar": False}
  yield "sentence-transformers", lambda texts: np.asarray(theirs.encode(texts, **options))
  ours = Encoder.load(args.folder, dtype="float32")
  yield "ours", ours.encode
  depth = ours.sizes.depths[(len(ours.sizes.depths) - 1) // 2]
  yield f"ours, depth {depth}", lambda texts: ours.encode(texts, depth=depth)
  dim = ours.sizes.dims[max(0, len(ours.sizes.dims) - 3)]
  yield f"ours, dim {dim}", lambda texts: ours.encode(texts, dim=dim)


def rows(args: argparse.Namespace) -> Iterator[tuple[str, ...]]:
  texts = read_texts(args.texts, args.count)
  made = dict(encoders(args))
  for encode in made.values():
    encode([*texts[::8], max(texts, key=len)])
  vectors: dict[str, np.ndarray] = {}
  seconds: dict[str, list[float]] = {name: [] for name in made}
  for _ in range(args.repeats):
    for name, encode in made.items():
      start = time.perf_counter()
      vectors[name] = encode(texts)
      seconds[name].append(time.perf_counter() - start)
  reference, base = vectors["sentence-transformers"], min(seconds["sentence-transformers"])
  for name, found in vectors.items():
    cosine = "-"
    if found.shape == reference.shape and "depth" not in name:
      cosine = f"{np.sum(found * reference, axis=1).min():.6f}"
    best = min(seconds[name])
    yield name, f"{len(texts) / best:,.1f}", f"{base / best:.2f}", cosine


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--folder", type=pathlib.Path, required=True, help="that export wrote")
  parser.add_argument("--texts", type=pathlib.Path, required=True, help="parquet file")
  parser.add_argument("--count", type=int, default=2000)
  parser.add_argument("--batch", type=int, default=32, help="of sentence-transformers")
  parser.add_argument("--repeats", type=int, default=2)
  print_table(HEADER, rows(parser.parse_args()))


if __name__ == "__main__":
  main()
