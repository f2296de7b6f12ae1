"""Run by two processes: tries each function of processes.py, and fails where one is wrong."""

import os
import pathlib
import sys

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mlembed_jax.batch import Arrays, Sheets
from mlembed_jax.errors import ConfigError
from mlembed_jax.parallel import join, processes
from mlembed_jax.parallel.sharding import put_batch, rows_of


def raised(act):
  try:
    act()
  except ConfigError as error:
    return str(error)
  raise AssertionError("nothing was raised")


def one_fails(me):
  with processes.agreed():
    if me == 1:
      with processes.agreed():
        raise ConfigError("the disk is full")
    processes.gather("an exchange that process 1 does not come to")


def check_exchange(me, folder):
  assert processes.gather({"ü": me}) == [{"ü": 0}, {"ü": 1}]
  told = raised(lambda: one_fails(me))
  assert told == ("the disk is full" if me == 1 else "process 1: the disk is full")
  processes.check_same({"a": 1, "b": 2})
  other = raised(lambda: processes.check_same({"a": 1, "seed": me}))
  assert other.startswith("process 1: not the same run as process 0; ")
  assert other.endswith("versions:\n  seed: 0 on process 0, 1 on process 1")
  processes.check_shared(folder)
  processes.SEEN_WITHIN_S = 0.0
  own = folder / str(me)
  own.mkdir()
  assert "storage that all machines share" in raised(lambda: processes.check_shared(own))
  processes.gather(None)
  assert not list(folder.glob("**/.shared_*"))
  seen = []
  squares = processes.shared(range(5), lambda x: seen.append(x) or x * x)
  assert squares == [0, 1, 4, 9, 16] and seen == [[0, 2, 4], [1, 3]][me]
  processes.on_first(lambda: (folder / f"by_{me}").touch())
  assert (folder / "by_0").exists() and not (folder / "by_1").exists()


def mesh_of(order, shape):
  devices = np.array(jax.devices())[order].reshape(shape)
  return Mesh(devices, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)


def check_arrays(me):
  mesh = mesh_of(range(4), (1, 4, 1))
  full = {"x": np.arange(24.0).reshape(8, 3), "y": np.arange(4.0)}
  layout = NamedSharding(mesh, PartitionSpec("fsdp"))
  made = processes.place(full, {"x": layout, "y": layout})
  assert not made["x"].is_fully_addressable
  processes.PIECE_BYTES = 30  # less than three rows
  for name, array in processes.fetch(made).items():
    np.testing.assert_array_equal(array, full[name] if me == 0 else np.empty(0))
  first = processes.from_first({"x": full["x"] + me})
  np.testing.assert_array_equal(first["x"], full["x"])


def check_rows(me):
  """Each row of a batch is read once, wherever the mesh puts the devices of a process."""
  for order, shape, expected in (
    (range(4), (1, 4, 1), (me, 2)),
    ([2, 0, 3, 1], (1, 4, 1), (1 - me, 2)),  # shards 0 and 2 on process 1
    (range(4), (1, 2, 2), (me, 2)),
    ([0, 2, 1, 3], (1, 2, 2), (0, 1)),  # both processes hold half of each shard
  ):
    mesh = mesh_of(order, shape)
    part, parts = rows_of(me, mesh)
    assert (part, parts) == expected
    rows = np.arange(8).reshape(parts, -1)[part]
    batch = put_batch(Arrays(rows, sheets=(Sheets(*[rows[None, :, None]] * 3),)), mesh)
    whole = NamedSharding(mesh, PartitionSpec())
    hashes, texts = jax.jit(lambda *x: x, out_shardings=whole)(batch.hashes, batch.sheets[0].texts)
    np.testing.assert_array_equal(np.sort(hashes), np.arange(8))
    np.testing.assert_array_equal(texts[0, :, 0], hashes)
  uneven = mesh_of([0, 1, 2], (1, 3, 1))
  assert "splits rows unevenly over 2 processes" in raised(lambda: rows_of(me, uneven))


def main():
  with join.joined(60):
    me = int(os.environ["JAX_PROCESS_ID"])
    check_exchange(me, pathlib.Path(sys.argv[1]))
    check_arrays(me)
    check_rows(me)
    print("all is well")


if __name__ == "__main__":
  main()
