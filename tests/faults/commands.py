"""Command lines that are killed or run out of disk, and the digests of what they write."""

import hashlib
import pathlib
import re
import sys


def module(name: str, *flags: object) -> list[str]:
  """Returns the command line of a module of the package."""
  return [sys.executable, "-m", f"mlembed_jax.{name}", *map(str, flags)]


def prepare(data: pathlib.Path, out: pathlib.Path) -> list[str]:
  """Returns the command that prepares the text of a folder."""
  source = ("--manifest", data / "manifest.json", "--tokenizer", data / "tokenizer.json")
  return module("prepare", *source, "--out", out)


def encode(model: pathlib.Path, data: pathlib.Path, out: pathlib.Path, *flags: str) -> list[str]:
  """Returns the command that embeds the queries of a folder, in 25 parts."""
  texts = ("--input", data / "train/bitext.parquet", "--column", "query", "--part", 16)
  return module("encode", "--model", model, *texts, "--out", out, *flags)


TIMES = re.compile(rb'"(ms|sha256)": [^,\n]+')  # of scores.json, whose own digest covers them


def digests(folder: pathlib.Path, pattern: str) -> dict[str, str]:
  """Returns the digest of every file that a pattern names, of scores without their times."""
  paths = sorted(path for path in folder.glob(pattern) if path.is_file())
  return {str(path.relative_to(folder)): _digest(path) for path in paths}


def _digest(path: pathlib.Path) -> str:
  content = path.read_bytes()
  return hashlib.sha256(
    TIMES.sub(b"", content) if path.name == "scores.json" else content
  ).hexdigest()
