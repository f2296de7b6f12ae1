"""A run of `encode` on a model that is a formula, killed before any operation on files.

  python -m tests.faults.encode_run OUT.npy

Prints, for every k: what stood in the folder after a kill before operation k, and what the same
command made of it. A kill ends a forked process at once; it is one of this script, which has no
threads. Ends with 1 where anything is half written or wrong.
"""

import os
import pathlib
import shutil
import sys

import numpy as np

from mlembed_jax import encode, vector_parts
from mlembed_jax.quantize import quantize
from mlembed_jax.vector_files import Encoding

PARTS, SIZE, DIM = 4, 100, 8
TEXTS = [f"text {i}" for i in range(PARTS * SIZE)]
OPERATIONS = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree")


def model(texts):
  """Returns vectors whose ranges differ between parts."""
  numbers = np.array([int(text.split()[1]) for text in texts], np.float32)
  return np.sin(numbers[:, None] * np.arange(1, DIM + 1)) * (1 + numbers[:, None] // SIZE)


def run(out, given=None, texts=TEXTS, precision="int8"):
  """Encodes the texts to `out`."""
  parts = vector_parts.Parts(out)
  texts = vector_parts.parts_of(iter(texts), SIZE)
  settings = {"precision": precision}
  with parts.held():
    files, calibration = encode.encode_parts(texts, parts, model, settings, given)
    # The prompt names the precision, to be compared with the vectors.
    encode.finish(parts, files, calibration, Encoding(precision, None, None, False, None), out)


def ranges_of(out):
  return out.with_name(out.stem + ".ranges.npy")


def killed(out, number, precision):
  """Runs in a process that ends before operation `number`; returns whether it came to that."""
  child = os.fork()
  if not child:
    left = [number]

    def count(event, arguments):
      writes = event == "open" and isinstance(arguments[1], str) and arguments[1][:1] in "wx"
      if event in OPERATIONS or writes:
        left[0] -= 1
        if left[0] < 0:
          os._exit(9)

    sys.addaudithook(count)
    run(out, precision=precision)
    os._exit(0)
  return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


def content(out):
  """Returns the vectors and their ranges, if they have some; None where there are no vectors."""
  found = [out, ranges_of(out)] if ranges_of(out).is_file() else [out]
  return tuple(map(np.load, found)) if out.is_file() else None


def encoded(out, precision):
  """Returns whether the encoding beside vectors is that of a run with this precision."""
  found = Encoding.read(out)
  return found is not None and found.prompt == precision


def same(first, second):
  return len(first) == len(second) and all(map(np.array_equal, first, second))


def right(precision, ranges):
  """Returns what a whole run leaves: vectors, and the ranges if they are rounded by some."""
  vectors = model(TEXTS)
  return (vectors,) if precision == "float32" else (quantize(vectors, precision, ranges), ranges)


def main(out):
  """Prints the lines of all kills; returns whether anything is wrong after one."""
  changes = (("int8", "int8"), ("int8", "float32"), ("float32", "int8"))
  return not all([fine for change in changes for fine in kill_at_each(out, *change)])


def kill_at_each(out, before, after):
  """Kills a run over vectors of an earlier one, before each of its operations.

  Yields whether each kill left whole vectors, and the same command the right ones after it.
  """
  other = np.array([[-9.0] * DIM, [9.0] * DIM], np.float32) if before == "int8" else None
  wanted = np.stack([model(TEXTS[:SIZE]).min(0), model(TEXTS[:SIZE]).max(0)]).astype(np.float32)
  new, old = right(after, wanted), right(before, other)
  number, more = 0, True
  while more:
    shutil.rmtree(out.parent, ignore_errors=True)
    out.parent.mkdir()
    run(out, other, precision=before)
    more = killed(out, number, after)
    found = content(out)
    state = "none" if found is None else "old" if same(found, old) else "new"
    whole = found is None or any(
      same(found, wanted) and encoded(out, of) for wanted, of in ((old, before), (new, after))
    )
    run(out, precision=after)
    again = (
      same(content(out), new)
      and encoded(out, after)
      and not vector_parts.Parts(out).folder.exists()
    )
    left, made = "whole" if whole else "TORN", "right" if again else "WRONG"
    print(f"{before}-{after}-{number}", state, left, made, flush=True)
    yield whole and again
    number += 1


if __name__ == "__main__":
  sys.exit(main(pathlib.Path(sys.argv[1]).absolute()))
