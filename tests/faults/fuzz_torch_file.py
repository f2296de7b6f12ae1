"""Reads damaged files of torch.save with little memory: COUNT FOLDER. Needs no torch."""

import io
import pathlib
import resource
import sys
import zipfile

import hypothesis
import numpy as np
from hypothesis import strategies as st

from mlembed_jax.errors import LoadError
from mlembed_jax.hf.torch_file import read_tensor
from tests.faults.mutants import damaged

MEMORY = 300_000_000
NUMBERS = np.arange(12, dtype="<f4").tobytes()


def number(n: int) -> bytes:
  """Returns an integer as pickle writes it."""
  if 0 <= n < 256:
    return b"K" + bytes([n])
  if -(2**31) <= n < 2**31:
    return b"J" + n.to_bytes(4, "little", signed=True)
  size = n.bit_length() // 8 + 1
  return b"\x8a" + bytes([size]) + n.to_bytes(size, "little", signed=True)


def numbers(of: tuple[int, ...]) -> bytes:
  return b"(" + b"".join(map(number, of)) + b"t"


def pickled(offset: int, size: tuple[int, ...], stride: tuple[int, ...], count: int) -> bytes:
  """Returns the pickle of a tensor, as torch.save writes it."""
  storage = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu"
  hooks = b"\x89ccollections\nOrderedDict\n)R"
  made = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(" + storage + number(count) + b"tQ"
  return made + number(offset) + numbers(size) + numbers(stride) + hooks + b"tR."


def file(data: bytes, storage: bytes = NUMBERS) -> bytes:
  made = io.BytesIO()
  with zipfile.ZipFile(made, "w") as archive:
    archive.writestr("t/data.pkl", data)
    archive.writestr("t/byteorder", "little")
    archive.writestr("t/data/0", storage)
  return made.getvalue()


RIGHT = pickled(0, (3, 4), (4, 1), 12)
sizes = st.one_of(st.integers(-2, 13), st.sampled_from([2**31, 2**40, 2**62, 2**64, -(2**40), 256]))
shapes = st.lists(sizes, max_size=4).map(tuple)
files = st.one_of(
  st.builds(pickled, sizes, shapes, shapes, st.just(12)).map(file),
  st.builds(pickled, st.integers(0, 3), st.just((3, 4)), shapes, sizes).map(file),
  damaged(RIGHT).map(file),
  damaged(file(RIGHT)),
  st.binary(max_size=60).map(lambda made: file(b"\x80\x02" + made + b".")),
)


def main() -> None:
  path, counts = pathlib.Path(sys.argv[2]) / "t.pth", {"read": 0, "refused": 0}
  path.write_bytes(file(RIGHT))
  np.testing.assert_array_equal(read_tensor(path), np.arange(12).reshape(3, 4))

  @hypothesis.settings(
    max_examples=int(sys.argv[1]),
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=list(hypothesis.HealthCheck),
  )
  @hypothesis.given(files)
  def one(content: bytes) -> None:
    path.write_bytes(content)
    try:
      found = read_tensor(path).astype(np.float32)
      assert (found.size <= 12 and np.isin(found, np.arange(12)).all()) or found.size == 0
      counts["read"] += 1
    except LoadError as error:
      assert "MemoryError" not in repr(error.__cause__)
      counts["refused"] += 1

  one()
  print(f"{counts['read']:,} read, {counts['refused']:,} refused, 0 crashed")


if __name__ == "__main__":
  used = int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
  resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
  main()
