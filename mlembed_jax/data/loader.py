"""Batches of token ids, prepared in background threads while the device works."""

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import grain
import numpy as np
from jaxtyping import Float32, Int32, Int64, UInt32

from mlembed_jax.data import batching
from mlembed_jax.data.sources import SCORED, Dataset
from mlembed_jax.data.tokenizer import DataError, Tokenizer

THREADS = 2
# Batches ready ahead of the device. The slowest batch seen costs about three steps' tokenisation.
PREFETCH = 4


@dataclasses.dataclass(frozen=True)
class Batch:
  """One host's rows of one step. Text 0 of a row is its query, then positives, then negatives."""

  step: int
  dataset: str
  task_type: str
  positives: int  # per row
  rows: Int64[np.ndarray, "B"]  # of the file, counted from 0
  tokens: Int32[np.ndarray, "B C T"]
  lengths: Int32[np.ndarray, "B C"]
  hashes: UInt32[np.ndarray, "B C 2"]  # 64 bits of each text without instruction
  scores: Float32[np.ndarray, "B"] | None  # of scored pairs
  teacher: Float32[np.ndarray, "B C2 D2"] | None  # a teacher's vectors of the first C2 texts

  def arrays(self) -> dict[str, np.ndarray]:
    """Returns what the device needs."""
    names = ("tokens", "lengths", "hashes", "scores", "teacher")
    return {name: array for name in names if (array := getattr(self, name)) is not None}

  @property
  def real_tokens(self) -> int:
    """Tokens that are not padding."""
    return int(self.lengths.sum())


class Batches:
  """Random access: element n is the batch of step n, a pure function of (files, seed, n)."""

  def __init__(
    self,
    datasets: Sequence[Dataset],
    tokenizer: Tokenizer,
    *,
    negatives: Mapping[str, int],
    inbatch: Mapping[str, bool],
    lengths: Sequence[int],
    batch_size: int,
    seed: int,
    steps: int,
    host: int = 0,
    hosts: int = 1,
  ):
    """`negatives`: hard negatives used per row, by task type; `batch_size`: over all hosts.

    `inbatch`: whether the positives of the whole batch are candidates, by task type. Scored pairs
    are in neither.

    Raises:
      DataError: a file is smaller than a batch, or has nothing to learn from, or the vectors of
        two files' teachers differ in width.
    """
    for d in datasets:
      _check_negatives(d, negatives, inbatch)
    _check_widths(datasets)
    self._datasets = {d.name: d for d in datasets}
    self._order: Any = batching.order({d.name: len(d) for d in datasets}, batch_size, seed)
    self._tokenizer = tokenizer
    self._negatives = negatives
    self._lengths = tuple(lengths)
    self._seed = seed
    self._steps = steps
    self._part = slice(host * batch_size // hosts, (host + 1) * batch_size // hosts)

  def __len__(self) -> int:
    return self._steps

  def __getitem__(self, step: int) -> Batch:
    name, chosen = self._order[step]
    dataset, part = self._datasets[name], self._part
    used = self._negatives.get(dataset.task_type, 0)  # none of scored pairs
    columns = batching.negative_columns(dataset.negatives, used, self._seed, step)
    queries, bare, documents = dataset.read(chosen, columns)
    # Every host tokenises the global batch, because all must agree on its padded length.
    texts = [[q, *docs] for q, docs in zip(queries, documents, strict=True)]
    tokens, lengths = self._tokenize(texts)
    hashes = [[hash64(t) for t in (q, *docs)] for q, docs in zip(bare, documents, strict=True)]
    return Batch(
      step=step,
      dataset=name,
      task_type=dataset.task_type,
      positives=dataset.positives,
      rows=dataset.rows[chosen[part]],
      tokens=tokens[part],
      lengths=lengths[part],
      hashes=np.array(hashes, np.uint64)[part].view(np.uint32).reshape(*lengths[part].shape, 2),
      scores=None if dataset.scores is None else dataset.scores[chosen[part]],
      teacher=dataset.read_vectors(chosen[part], columns),
    )

  def _tokenize(self, texts: list[list[str]]) -> tuple[np.ndarray, np.ndarray]:
    flat = [text for row in texts for text in row]
    ids = self._tokenizer.encode(flat, self._lengths[-1])
    tokens, lengths = batching.pad(ids, batching.bucket(max(map(len, ids)), self._lengths))
    shape = (len(texts), len(texts[0]))
    return tokens.reshape(*shape, -1), lengths.reshape(shape)


def _check_negatives(d: Dataset, negatives: Mapping[str, int], inbatch: Mapping[str, bool]) -> None:
  if d.task_type == SCORED or inbatch[d.task_type]:
    return
  if not min(d.negatives, negatives[d.task_type]):
    raise DataError(
      f"{d.name}: {d.task_type} learns from hard negatives, but {d.negatives} are stored and "
      f"losses.{d.task_type}.negatives = {negatives[d.task_type]}; raise it, store some, or set "
      f"losses.{d.task_type}.inbatch"
    )


def _check_widths(datasets: Sequence[Dataset]) -> None:
  widths = {d.name: d.vectors["query"].width for d in datasets if d.vectors}
  for name, width in widths.items():
    first = next(iter(widths))
    if width != widths[first]:
      raise DataError(
        f"{name}: its teacher_vectors are {width} numbers wide, but those of {first} "
        f"{widths[first]}; one teacher must have made both"
      )


def hash64(text: str) -> int:
  """Returns 64 bits of a text; equal texts are never each other's negatives."""
  return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def iterate(batches: Batches, start: int) -> Iterator[Batch]:
  """Yields the batches from step `start` on, read ahead by threads."""
  options = grain.ReadOptions(num_threads=THREADS, prefetch_buffer_size=PREFETCH)
  yield from (
    grain.MapDataset.range(start, len(batches)).map(batches.__getitem__).to_iter_dataset(options)
  )
