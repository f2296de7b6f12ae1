"""Runs what the pages show and anyone can run: python -m tests.release.docs_commands FOLDER.

FOLDER holds `quickstart`, the workdir of configs/quickstart.py or of its variant `smoke`. Commands
and Python blocks run as they stand in the pages, with FOLDER in place of /tmp, but for blocks that
are marked with what they need. Ends with status 1 at the first one that fails.
"""

import argparse
import pathlib
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator

from tests.pages import PAGES, ROOT, all_blocks, commands, is_after_quickstart


def examples() -> Iterator[list[str]]:
  """Yields the words of every command, of Python blocks too, in the order of each page."""
  for page in PAGES:
    for _, of, content in (block for block in all_blocks(page) if not block[0]):
      if of == "python":
        yield ["python", "-c", content]
      elif of == "sh":
        yield from filter(is_after_quickstart, commands(content))


def run(words: list[str], folder: pathlib.Path) -> None:
  """Runs one command; ends the program where it fails."""
  words = [word.replace("/tmp/", f"{folder}/") for word in words]
  start = time.monotonic()
  done = subprocess.run([sys.executable, *words[1:]], cwd=ROOT, capture_output=True, text=True)
  seconds, shown = time.monotonic() - start, shlex.join(words).splitlines()[0]
  print(f"{seconds:5.1f} s  {shown}", flush=True)
  if done.returncode:
    sys.exit(f"{done.stdout}{done.stderr}\nended with status {done.returncode}")


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("folder", type=pathlib.Path)
  folder = parser.parse_args().folder.resolve()
  if not (folder / "quickstart").is_dir():
    sys.exit(f"error: {folder / 'quickstart'} is not there; train configs/quickstart.py into it")
  for words in dict.fromkeys(map(tuple, examples())):
    run(list(words), folder)


if __name__ == "__main__":
  main()
