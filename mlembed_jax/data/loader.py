"""Batches of token sheets, each a pure function of (dataset, plan, step)."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float32, Int64, UInt32

from mlembed_jax.batch import Arrays, Kind, Sheets
from mlembed_jax.data import batching, packing
from mlembed_jax.data.manifest import SCORED, TEXT, File
from mlembed_jax.data.order import Order
from mlembed_jax.data.packing import Layout
from mlembed_jax.data.records import Row, Text, decode_record, decode_text
from mlembed_jax.data.store import Split
from mlembed_jax.data.tokenizer import Tokenizer
from mlembed_jax.errors import DataError


@dataclasses.dataclass(frozen=True)
class Batch:
  """A process's rows of one step. Text 0 of a row is its query, then positives, then negatives."""

  step: int
  dataset: str
  kind: Kind
  rows: Int64[np.ndarray, "B"]  # of the file, counted from 0
  global_rows: int  # of all processes
  languages: list[str]  # of the rows
  sheets: list[Sheets]  # by width; the used blocks of this process
  layout: Layout  # of this process
  hashes: UInt32[np.ndarray, "B C 2"]  # 64 bits of each text without instruction
  scores: Float32[np.ndarray, "B"] | None  # of scored pairs
  teacher: Float32[np.ndarray, "B C2 D2"] | None  # a teacher's vectors of the first C2 texts
  real_tokens: int

  def arrays(self) -> Arrays:
    """Returns the arrays that the update reads."""
    sheets = packing.whole(self.sheets, self.layout)
    return Arrays(self.hashes, self.scores, sheets, self.teacher)

  @property
  def computed_tokens(self) -> int:
    """Tokens that this process's devices compute, real ones and padding."""
    return sum(sheets.tokens.size for sheets in self.sheets)


@dataclasses.dataclass(frozen=True)
class Options:
  """Settings of a run that decide how rows become batches."""

  negatives: Mapping[str, int]  # hard ones used per row, by task type; scored pairs have none
  inbatch: Mapping[str, bool]  # whether positives of other rows are candidates, by task type
  query_instructions: bool
  document_instructions: float  # share of the documents of symmetric files
  teacher_vectors: bool
  lengths: tuple[int, ...]
  packing: bool
  batch_size: int  # rows over all processes
  seed: int


@dataclasses.dataclass(frozen=True)
class Placement:
  """How a batch is split over the devices and processes of a run."""

  block_tokens: int  # that are encoded at a time over all processes
  batch_shards: int  # data-parallel devices over all processes
  process: int = 0
  processes: int = 1  # that read different rows


class Batches:
  """Random access: element n is this process's part of step n's batch."""

  def __init__(
    self,
    split: Split,
    order: Order,
    tokenizer: Tokenizer,
    options: Options,
    placement: Placement,
    steps: int,
  ):
    """Prepares the shapes of all batches.

    Raises:
      DataError: a file has nothing to learn from, or teachers differ in width.
    """
    self._split, self._order, self._steps = split, order, steps
    self._options, self._placement = options, placement
    self._prefix = _prefixes(split, tokenizer)
    self._pooled = np.array([tokenizer.pooled_id], np.int32)
    self.kinds = kinds(split, tokenizer, options)
    self._layouts = {kind: self._layout(kind) for kind in set(self.kinds.values())}

  def __len__(self) -> int:
    return self._steps

  def _layout(self, kind: Kind) -> Layout:
    options, placement = self._options, self._placement
    return packing.layout(
      rows=options.batch_size // placement.processes,
      texts_per_row=kind.texts,
      longest=kind.longest,
      widths=options.lengths,
      block_tokens=placement.block_tokens // placement.processes,
      batch_shards=placement.batch_shards // placement.processes,
      packed=options.packing,
    )

  def __getitem__(self, step: int) -> Batch:
    options, chosen = self._options, self._order[step]
    file = self._split.files[chosen.file]
    kind = self.kinds[file.name]
    negatives = batching.negative_columns(file.negatives, kind.negatives, options.seed, step)
    columns = np.concatenate([np.arange(1 + file.positives), 1 + file.positives + negatives])
    instructed = self._instructed(file, kind, step)
    places = self._split.rows.place(chosen.units, chosen.rows)
    mine = self._mine(places, columns, instructed, self._prefix_of(file).size)
    read = [self._read(int(places[i]), columns[1:] - 1) for i in mine]
    ids = [
      [self._ids(text, file, asked) for text, asked in zip(texts, instructed[i], strict=True)]
      for i, (_, texts) in zip(mine, read, strict=True)
    ]
    layout = self._layouts[kind]
    shards = [[text for row in part for text in row] for part in _split(ids, layout.batch_shards)]
    rows = [row for row, _ in read]
    scored = file.entry["task_type"] == SCORED
    return Batch(
      step=step,
      dataset=file.name,
      kind=kind,
      rows=np.array([row.row for row in rows]),
      global_rows=options.batch_size,
      languages=[row.language for row in rows],
      sheets=packing.pack(shards, layout),
      layout=layout,
      hashes=np.array([[text.hash for text in texts] for _, texts in read]),
      scores=np.array([row.score for row in rows], np.float32) if scored else None,
      teacher=self._teacher(kind, [int(places[i]) for i in mine], rows, columns),
      real_tokens=sum(len(text) for row in ids for text in row),
    )

  def _prefix_of(self, file: File) -> np.ndarray:
    return self._prefix.get(file.name, np.empty(0, np.int32))

  def _instructed(self, file: File, kind: Kind, step: int) -> np.ndarray:
    """Returns which texts of the batch have the instruction, [B, C]."""
    options = self._options
    asked = np.zeros((options.batch_size, kind.texts), bool)
    if file.entry["instruction"]:
      asked[:, 0] = options.query_instructions
      if file.symmetric and options.document_instructions:
        shape, share = (len(asked), kind.texts - 1), options.document_instructions
        asked[:, 1:] = batching.instructed_documents(shape, share, options.seed, step)
    return asked

  def _mine(
    self, places: np.ndarray, columns: np.ndarray, instructed: np.ndarray, prefix: int
  ) -> np.ndarray:
    """Returns which rows of the batch are this process's, shard after shard.

    Rows go to shards by their tokens, which every process knows of all rows without reading them.
    """
    placement = self._placement
    order = np.arange(len(places))
    if placement.batch_shards > 1:
      counts = np.array(
        [self._split.lengths.row(*self._split.queries.place(int(p)))[columns] for p in places]
      )
      longest = self._options.lengths[-1]
      tokens = np.minimum(counts + prefix * instructed + 1, longest).sum(axis=1)
      order = packing.balance(tokens, placement.batch_shards)
    return np.split(order, placement.processes)[placement.process]

  def _read(self, place: int, columns: np.ndarray) -> tuple[Row, list[Text]]:
    """Returns a row and its texts: the query, then the documents of these columns."""
    query, row = decode_record(self._split.queries[place])
    documents = np.concatenate([row.positives, row.negatives])[columns]
    return row, [query, *(decode_text(self._split.documents[int(i)]) for i in documents)]

  def _ids(self, text: Text, file: File, instructed: bool) -> np.ndarray:
    """Returns a text's ids as the model reads them, ending with the pooled token."""
    ids = text.tokens
    if instructed:
      ids = text.after(self._prefix_of(file))
    return np.concatenate([ids[: self._options.lengths[-1] - 1], self._pooled])

  def _teacher(
    self, kind: Kind, places: list[int], rows: list[Row], columns: np.ndarray
  ) -> np.ndarray | None:
    if not kind.vectors:
      return None
    wanted = columns[: kind.vectors[0]]
    found = [self._split.vectors_of(*each, wanted) for each in zip(places, rows, strict=True)]
    return np.array(found, np.float32)


def _prefixes(split: Split, tokenizer: Tokenizer) -> dict[str, np.ndarray]:
  """Returns the ids of each file's instruction."""
  return {
    file.name: np.array(tokenizer.prefix(file.entry["instruction"]), np.int32)
    for file in split.files
    if file.entry["instruction"]
  }


def kinds(split: Split, tokenizer: Tokenizer, options: Options) -> dict[str, Kind]:
  """Returns the kind of each file; files that differ only in their longest text share one.

  Raises:
    DataError: a file has nothing to learn from, or the vectors of two files' teachers differ in
      width.
  """
  prefixes = _prefixes(split, tokenizer) if options.query_instructions else {}
  own = {
    file.name: _kind(split, file, len(prefixes.get(file.name, ())), options) for file in split.files
  }
  _check_widths(own)
  keys = {name: dataclasses.replace(kind, longest=0) for name, kind in own.items()}
  longest: dict[Kind, int] = {}
  for name, key in keys.items():
    longest[key] = max(longest.get(key, 0), own[name].longest)
  return {name: dataclasses.replace(key, longest=longest[key]) for name, key in keys.items()}


def _kind(split: Split, file: File, prefix: int, options: Options) -> Kind:
  _check_negatives(file, options)
  task = file.entry["task_type"]
  used = min(file.negatives, options.negatives.get(task, 0))
  vectors = split.vectors_shape(file) if options.teacher_vectors else None
  if vectors and vectors[0] > 1 + file.positives:  # negatives have vectors, too
    vectors = 1 + file.positives + used, vectors[1]
  longest = min(options.lengths[-1], split.longest(file) + prefix + 1)
  return Kind(task, file.positives, used, longest, vectors)


def _check_widths(kinds: Mapping[str, Kind]) -> None:
  widths = {name: kind.vectors[1] for name, kind in kinds.items() if kind.vectors}
  for name, width in widths.items():
    first = next(iter(widths))
    if width != widths[first]:
      raise DataError(
        f"{name}: its teacher_vectors are {width} numbers wide, but those of {first} "
        f"{widths[first]}; one teacher must have made both"
      )


def _split(rows: list[Any], parts: int) -> list[list[Any]]:
  size = len(rows) // parts
  return [rows[i * size : (i + 1) * size] for i in range(parts)]


def _check_negatives(file: File, options: Options) -> None:
  task = file.entry["task_type"]
  if (
    task in (SCORED, TEXT) or options.inbatch[task] or min(file.negatives, options.negatives[task])
  ):
    return
  raise DataError(
    f"{file.name}: {task} learns from hard negatives, but {file.negatives} are stored and "
    f"losses.{task}.negatives = {options.negatives[task]}; raise it, store some, or set "
    f"losses.{task}.inbatch"
  )
