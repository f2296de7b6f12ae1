"""The loader on a dataset of the size of a release: memory, start, seeking, tokens per second.

    python -m tests.benchmarks.loader --rows 20000000 --steps 100000

Writes a synthetic dataset once (short texts, 20 files of 40 languages, 24 negatives per row; 0.5 kB
of disk per row), then reads it with real worker processes. Memory is what the kernel counts for a
worker (RSS) with everything it imported. `--dataset` measures a real prepared one instead.
"""

import argparse
import functools
import itertools
import multiprocessing
import os
import pathlib
import subprocess
import sys
import time

import numpy as np

from mlembed_jax.data import catalog, file_digests, loader, names, read_ahead, records
from mlembed_jax.data.manifest import File
from mlembed_jax.data.mixture import per_epoch
from mlembed_jax.data.plan import Plan
from mlembed_jax.data.records import Row, Text
from mlembed_jax.data.store import open_split
from mlembed_jax.data.tokenizer import Tokenizer
from mlembed_jax.data.transforms import LanguageRun, RowShard, Written
from tests.benchmarks.common import print_table
from tests.material import train_tokenizer

FILES, LANGUAGES, NEGATIVES = 20, 40, 24
SHARD = 65_536
ENTRY = {
  "task_type": "retrieval",
  "instruction": "Find.",
  "query_has_instruction": False,
  "negatives": NEGATIVES,
}


def _texts(rng, count):
  """Yields texts of 4 to 12 tokens."""
  for i, length in enumerate(rng.integers(4, 13, count)):
    tokens = rng.integers(0, 500, length, np.int32)
    yield Text(tokens, tokens[:3], 1, np.array([i, length], np.uint32))


def write_documents(folder, shard, shards, count):
  path = folder / names.shard_name(records.DOCUMENTS, shard, shards)
  texts = _texts(np.random.default_rng(shard), count)
  records.write_shard(path, records.DOCUMENTS, map(records.encode_record, texts))


def write_rows(folder, documents, rows, shards, shard):
  """Writes one shard; its rows are grouped by language as in a real one."""
  rng = np.random.default_rng([1, shard])
  count = min(SHARD, rows - shard * SHARD)
  each = np.diff(np.linspace(0, count, LANGUAGES + 1).astype(int))
  name = f"file_{shard * min(FILES, shards) // shards:02d}"
  languages = np.repeat(np.arange(LANGUAGES), each)
  places = rng.integers(0, documents, (count, 1 + NEGATIVES))
  path = folder / names.shard_name(records.TRAIN, shard, shards)
  records.write_shard(
    path,
    records.TRAIN,
    (
      records.encode_record(text, Row(name, f"l{language}", i, 0.0, place[:1], place[1:]))
      for i, (text, language, place) in enumerate(
        zip(_texts(rng, count), languages, places, strict=True)
      )
    ),
  )
  lengths = rng.integers(4, 13, (count, 2 + NEGATIVES)).astype(np.uint16)
  np.save(path.with_name(path.name + names.LENGTHS), lengths)
  rows = list(map(int, each))
  runs = [LanguageRun(f"l{i}", n, 8 * n, 8 * n, 192 * n) for i, n in enumerate(rows)]
  return RowShard(name, Written(count, 0, str(shard)), 15, runs)


def synthesize(folder, rows, documents):
  """Writes the dataset, unless it is there."""
  if catalog.read_catalog(folder):
    return
  folder.mkdir(parents=True, exist_ok=True)
  shards = -(-rows // SHARD)
  with multiprocessing.get_context("spawn").Pool() as pool:
    parts = [(folder, i, 8, documents // 8) for i in range(8)]
    pool.starmap(write_documents, parts)
    write = functools.partial(write_rows, folder, documents, rows, shards)
    made = pool.map(write, range(shards), chunksize=1)
  train_tokenizer(600).save(str(folder / names.TOKENIZER))
  files = [File(f"file_{i:02d}", ENTRY, "") for i in range(min(FILES, shards))]
  recipe = catalog.Recipe(files, {}, "", 2047, 8)
  written = [Written(documents // 8, 0, str(i)) for i in range(8)]
  digests = {path.name: file_digests.digest_of(path) for path in folder.iterdir()}
  catalog.save(folder, recipe, {records.TRAIN: made, records.VALIDATION: []}, written, digests, {})


def open_batches(folder, args) -> loader.Batches:
  opened = catalog.load_catalog(folder)
  split = open_split(opened, records.TRAIN, list(opened.files))
  rows = per_epoch(
    split.units, max_rows=0, size_exponent=1.0, language_temperature=1.0, max_repeats=4.0
  )
  plan = Plan(split.files, split.units, rows, args.batch, 0, opened.fingerprint)
  tasks = ("retrieval", "bitext", "clustering", "classification")
  options = loader.Options(
    negatives=dict.fromkeys(tasks, args.negatives),
    inbatch=dict.fromkeys(tasks, True),
    query_instructions=True,
    document_instructions=0.3,
    teacher_vectors=False,
    lengths=tuple(args.lengths),
    packing=getattr(args, "packing", True),
    batch_size=args.batch,
    seed=0,
  )
  tokenizer = Tokenizer(opened.tokenizer, "<|endoftext|>")
  placement = loader.Placement(args.block, args.shards)
  return loader.Batches(split, plan.order(), tokenizer, options, placement, 10**9)


def rss_mib(pid):
  pages = int(pathlib.Path(f"/proc/{pid}/statm").read_text().split()[1])
  return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def cpu_seconds(pid):
  fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
  return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measured(batches, args):
  """Yields a line at some of the steps, read by real workers."""
  marks = {10, 1000, 10_000, 100_000, args.steps}
  tokens, start = 0, time.perf_counter()
  for number, batch in enumerate(read_ahead.iterate(batches, 0, args.workers), 1):
    tokens += batch.real_tokens
    if number == 1:
      print(f"first batch {time.perf_counter() - args.started:.1f} s after the start\n", flush=True)
      pids = [process.pid for process in multiprocessing.active_children()]
      start, tokens, before = time.perf_counter(), 0, sum(map(cpu_seconds, pids))
    if number in marks and number > 1:
      used = sum(map(cpu_seconds, pids)) - before
      rates = (tokens / seconds for seconds in (time.perf_counter() - start, used))
      yield number, *(f"{rss_mib(pid):,.0f}" for pid in pids), *(f"{r:,.0f}" for r in rates)
    if number == args.steps:
      return


def measure(folder, args):
  """Prints memory and speed of the workers, and the time that any step takes."""
  batches = open_batches(folder, args)
  names = [f"RSS of worker {i + 1}, MiB" for i in range(args.workers)]
  header = ["step", *names, "tokens/s", "tokens/s and core of the workers"]
  lines = measured(batches, args)
  first = next(lines)
  print_table(header, itertools.chain([first], lines))
  times = []
  for step in np.random.default_rng(0).integers(0, 5_000_000, 20).tolist():
    begin = time.perf_counter()
    batches[step]
    times.append(time.perf_counter() - begin)
  print(f"\nany step: {np.median(times):.3f} s in the median, {max(times):.3f} s at most")


def main(argv=None):
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--rows", type=int, default=20_000_000)
  parser.add_argument("--documents", type=int, default=1_000_000)
  parser.add_argument("--folder", type=pathlib.Path, default=pathlib.Path("/tmp/mlembed_rows"))
  parser.add_argument("--dataset", type=pathlib.Path, help="a prepared one instead")
  parser.add_argument("--steps", type=int, default=100_000)
  parser.add_argument("--batch", type=int, default=32)
  parser.add_argument("--negatives", type=int, default=1)
  parser.add_argument("--lengths", type=int, nargs="+", default=[64])
  parser.add_argument("--block", type=int, default=1024)
  parser.add_argument("--shards", type=int, default=1)
  parser.add_argument("--workers", type=int, default=2)
  parser.add_argument("--started", type=float, help=argparse.SUPPRESS)
  args = parser.parse_args(argv)
  if not args.dataset:
    synthesize(args.folder / str(args.rows), args.rows, args.documents)
  if args.started is None:  # again in a fresh process, so that its start is part of the time
    flags = sys.argv[1:] if argv is None else argv
    command = [sys.executable, "-m", "tests.benchmarks.loader", *map(str, flags)]
    subprocess.run([*command, "--started", str(time.perf_counter())], check=True)
  else:
    measure(args.dataset or args.folder / str(args.rows), args)


if __name__ == "__main__":
  main()
