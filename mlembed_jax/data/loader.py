"""Batches of token ids, prepared in background threads while the device works."""

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import grain
import numpy as np
from jaxtyping import Int32, UInt32

from mlembed_jax.data import batching
from mlembed_jax.data.sources import INBATCH_TASKS, Dataset
from mlembed_jax.data.tokenizer import DataError, Tokenizer

THREADS = 2
# Batches ready ahead of the device. The slowest batch seen costs about three steps' tokenisation.
PREFETCH = 4


@dataclasses.dataclass(frozen=True)
class Batch:
  """One host's rows of one step. Text 0 of a row is its query, 1 its positive, then negatives."""

  step: int
  dataset: str
  task_type: str
  tokens: Int32[np.ndarray, "B C T"]
  lengths: Int32[np.ndarray, "B C"]
  hashes: UInt32[np.ndarray, "B C 2"]  # 64 bits of each text without instruction

  def arrays(self) -> dict[str, np.ndarray]:
    """Returns what the device needs."""
    return {"tokens": self.tokens, "lengths": self.lengths, "hashes": self.hashes}

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
    lengths: Sequence[int],
    batch_size: int,
    seed: int,
    steps: int,
    host: int = 0,
    hosts: int = 1,
  ):
    """`negatives`: hard negatives used per row, by task type; `batch_size`: over all hosts.

    Raises:
      DataError: a file is smaller than a batch, or has nothing to learn from.
    """
    for d in datasets:
      if d.task_type not in INBATCH_TASKS and not min(d.negatives, negatives[d.task_type]):
        raise DataError(
          f"{d.name}: {d.task_type} learns from hard negatives, but {d.negatives} are stored and "
          f"losses.negatives.{d.task_type} = {negatives[d.task_type]}"
        )
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
    name, rows = self._order[step]
    dataset = self._datasets[name]
    used = self._negatives[dataset.task_type]
    columns = batching.negative_columns(dataset.negatives, used, self._seed, step)
    queries, bare, documents = dataset.read(rows, columns)
    # Every host tokenises the global batch, because all must agree on its padded length.
    texts = [[q, *docs] for q, docs in zip(queries, documents, strict=True)]
    tokens, lengths = self._tokenize(texts)
    hashes = [[hash64(t) for t in (q, *docs)] for q, docs in zip(bare, documents, strict=True)]
    part = self._part
    return Batch(
      step=step,
      dataset=name,
      task_type=dataset.task_type,
      tokens=tokens[part],
      lengths=lengths[part],
      hashes=np.array(hashes, np.uint64)[part].view(np.uint32).reshape(*lengths[part].shape, 2),
    )

  def _tokenize(self, texts: list[list[str]]) -> tuple[np.ndarray, np.ndarray]:
    flat = [text for row in texts for text in row]
    ids = self._tokenizer.encode(flat, self._lengths[-1])
    tokens, lengths = batching.pad(ids, batching.bucket(max(map(len, ids)), self._lengths))
    shape = (len(texts), len(texts[0]))
    return tokens.reshape(*shape, -1), lengths.reshape(shape)


def hash64(text: str) -> int:
  """Returns 64 bits of a text; equal texts are never each other's negatives."""
  return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def iterate(batches: Batches, start: int) -> Iterator[Batch]:
  """Yields the batches from step `start` on, read ahead by threads."""
  options = grain.ReadOptions(num_threads=THREADS, prefetch_buffer_size=PREFETCH)
  yield from (
    grain.MapDataset.range(start, len(batches)).map(batches.__getitem__).to_iter_dataset(options)
  )
