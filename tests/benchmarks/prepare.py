"""Preparing a corpus against its tokenisation alone, both on one core.

    python -m tests.benchmarks.prepare --manifest FILE --tokenizer FILE

`texts of all rows` is what a trainer tokenises that reads rows as they are; `each text once` leaves
repetitions out, as we do. Ours counts everything: reading, checking, hashing, tokenising, writing.
"""

import argparse
import os
import pathlib
import shutil
import tempfile
import time

import pyarrow.parquet as pq
import tokenizers

from mlembed_jax.data import manifest, prepare, rows
from mlembed_jax.data.tokenizer import Tokenizer
from tests.benchmarks.common import print_table

BATCH = 8192


def texts_of(file):
  table = pq.read_table(file.path, columns=rows.columns(file))
  return [text for name in table.column_names for text in table[name].to_pylist()]


def plain(tokenizer, texts):
  """Returns megabytes and seconds of encoding the texts, nothing else."""
  start = time.perf_counter()
  for i in range(0, len(texts), BATCH):
    tokenizer.encode_batch_fast(texts[i : i + BATCH], add_special_tokens=False)
  return sum(len(text.encode()) for text in texts) / 1e6, time.perf_counter() - start


def ours(files, path, folder):
  """Returns the seconds of the whole preparation."""
  opened = Tokenizer(path, "<|endoftext|>")
  start = time.perf_counter()
  job = prepare.Job(prepare.make_recipe(files, opened, 2047), folder, opened.path, "<|endoftext|>")
  prepare.run(job, processes=1, max_dropped_share=1.0)
  return time.perf_counter() - start


def lines(args):
  files = manifest.select(args.manifest, args.files, "--files")
  tokenizer = tokenizers.Tokenizer.from_file(args.tokenizer)
  all_texts = [text for file in files for text in texts_of(file)]
  once = sorted(set(all_texts))
  megabytes, seconds = plain(tokenizer, all_texts)
  fewer, fewer_seconds = plain(tokenizer, once)
  folder = pathlib.Path(tempfile.mkdtemp(dir=args.folder))
  own = ours(files, args.tokenizer, folder / "dataset")
  shutil.rmtree(folder)
  for name, size, of in (
    ("texts of all rows", megabytes, seconds),
    ("each text once", fewer, fewer_seconds),
  ):
    speeds = f"{size / of:.2f}", f"{size / own:.2f}"
    yield name, f"{size:,.1f}", f"{of:.1f}", f"{own:.1f}", *speeds, f"{of / own:.2f}"


def main(argv=None):
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--manifest", required=True)
  parser.add_argument("--files", nargs="+", default=["train/*"])
  parser.add_argument("--tokenizer", required=True)
  parser.add_argument("--folder", help="where the dataset is written, and deleted")
  args = parser.parse_args(argv)
  os.environ["TOKENIZERS_PARALLELISM"] = "false"
  header = ("text", "MB", "tokenizers s", "ours s", "tokenizers MB/s", "ours MB/s", "ours / it")
  print_table(header, lines(args))


if __name__ == "__main__":
  main()
