"""Which rows make up each step: a pure function of (rows per epoch, seed, step).

All rows of a step come from one file. An epoch visits every batch of every file once, in an order
of its own; what is left of a file after its last whole batch, other rows each time, is left out,
or completed to a batch with rows from the beginning of the file's epoch.
Within a file the rows of its languages are mixed at random. There is no iterator state: any step
costs the same, on any number of processes. Shuffles are keyed permutations that are computed for
one index at a time, so nothing of the size of the data is held in memory.
"""

import dataclasses

import numpy as np
from jaxtyping import Int64

VERSION = 1  # raise it when the same plan and seed would give other rows
# These constants separate every use of the seed from the others.
BATCHES, ROWS, PASSES = 0x42, 0x52, 0x50
ROUNDS = 6  # of the Feistel network; 4 already give an order that looks random


def mix(*values: int | np.ndarray) -> np.ndarray:
  """Returns 64 well-mixed bits of the values, element by element (splitmix64)."""
  state = np.zeros(np.broadcast_shapes(*(np.shape(v) for v in values)), np.uint64)
  with np.errstate(over="ignore"):
    for value in values:
      state = (state ^ np.asarray(value).astype(np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
      state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
      state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
      state ^= state >> np.uint64(31)
  return state


def permute(index: np.ndarray, size: np.ndarray | int, key: np.ndarray) -> Int64[np.ndarray, "N"]:
  """Returns the place of each index (below `size`) in the shuffle that belongs to `key`.

  A Feistel network over the next power of four; places beyond `size` are permuted again until they
  are below it.
  """
  size, key = np.broadcast_to(size, index.shape), np.broadcast_to(key, index.shape)
  half = np.maximum(
    1, (np.ceil(np.log2(np.maximum(size, 2))).astype(np.uint64) + np.uint64(1)) // 2
  )
  place, beyond = index.astype(np.uint64), np.ones(index.shape, bool)
  while beyond.any():
    place[beyond] = _feistel(place[beyond], half[beyond].astype(np.uint64), key[beyond])
    beyond = place >= size.astype(np.uint64)
  return place.astype(np.int64)


def _feistel(value: np.ndarray, half: np.ndarray, key: np.ndarray) -> np.ndarray:
  mask = (np.uint64(1) << half) - np.uint64(1)
  left, right = value >> half, value & mask
  for number in range(ROUNDS):
    left, right = right, left ^ (mix(key, number, right) & mask)
  return (left << half) | right


@dataclasses.dataclass(frozen=True)
class Chosen:
  """The rows of a step."""

  file: int
  units: Int64[np.ndarray, "B"]
  rows: Int64[np.ndarray, "B"]  # numbers within their units


class Order:
  """Random access: `order[n]` is what step n reads."""

  def __init__(
    self,
    files: np.ndarray,
    rows: np.ndarray,
    per_epoch: np.ndarray,
    batch_size: int,
    seed: int,
    complete: bool = False,
  ):
    """Lays out an epoch of U units, the rows of one language in one file each.

    Args:
      files: number of each unit's file, [U], ascending.
      rows: rows that each unit has, [U].
      per_epoch: rows of each unit in an epoch, [U]; more than `rows` repeats some.
      batch_size: rows of a step over all processes.
      seed: of the run.
      complete: whether what is left of a file is completed to a batch.
    """
    self._rows, self._per_epoch, self._seed = rows, per_epoch, seed
    self._batch_size = batch_size
    self._units = np.concatenate([[0], np.cumsum(per_epoch)])  # in the list of an epoch
    bounds = np.searchsorted(files, np.arange(files.max() + 2))
    self._files = self._units[bounds]
    in_epoch = np.diff(self._files) + (batch_size - 1 if complete else 0)
    self._batches = np.concatenate([[0], np.cumsum(in_epoch // batch_size)])

  @property
  def steps_per_epoch(self) -> int:
    """Batches of all files in an epoch."""
    return int(self._batches[-1])

  def batches(self) -> np.ndarray:
    """Returns the batches of each file in an epoch."""
    return np.diff(self._batches)

  def __getitem__(self, step: int) -> Chosen:
    epoch, place = divmod(step, self.steps_per_epoch)
    key = mix(self._seed, BATCHES, epoch)
    number = int(permute(np.array([place]), self.steps_per_epoch, key)[0])
    file = int(np.searchsorted(self._batches, number, side="right")) - 1
    first = (number - int(self._batches[file])) * self._batch_size
    start, end = self._files[file], self._files[file + 1]
    places = np.arange(first, first + self._batch_size) % (end - start)
    in_file = permute(places, end - start, mix(self._seed, ROWS, epoch, file))
    units = np.searchsorted(self._units, start + in_file, side="right") - 1
    # Rows taken of the unit since the run began; each pass over them has its own shuffle.
    taken = epoch * self._per_epoch[units] + start + in_file - self._units[units]
    passes, place_in_pass = np.divmod(taken, self._rows[units])
    keys = mix(self._seed, PASSES, units, passes)
    return Chosen(file, units, permute(place_in_pass, self._rows[units], keys))
