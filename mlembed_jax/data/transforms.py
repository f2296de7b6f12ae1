"""The steps of preparing a dataset, each a function of its inputs alone.

  chunks of rows  ->  documents by hash, tokenised  ->  rows that refer to them by place

The documents of all files are split into partitions by hash, so that equal texts meet in one
partition and are tokenised and stored once. `prepare.py` runs the steps as processes of one
machine, `beam.py` as a pipeline.
"""

import contextlib
import dataclasses
import hashlib
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from mlembed_jax.data import records, vectors
from mlembed_jax.data.file_digests import FileDigest, NewFile
from mlembed_jax.data.manifest import File
from mlembed_jax.data.names import CHECKSUMS, LENGTHS, VECTORS, shard_name, suffixes
from mlembed_jax.data.records import DOCUMENTS, TRAIN, VALIDATION, Row, Text
from mlembed_jax.data.rows import hash64
from mlembed_jax.data.tokenizer import QUERY, Tokenizer
from mlembed_jax.files import save_npy
from mlembed_jax.typed import Count, Size

BATCH = 8192  # the tokenizer is given so many texts at a time
VALIDATION_OF = 100  # one query in so many is held out, by its text: equal ones stay together


@dataclasses.dataclass(frozen=True)
class DocumentPart:
  """The documents of one chunk that belong to one partition."""

  hashes: np.ndarray  # [N] uint64, ascending
  texts: pa.Array
  queried: bool  # documents of a symmetric file: some will have an instruction


@dataclasses.dataclass(frozen=True)
class Written:
  """A shard that was written."""

  records: Count
  size: Count  # bytes of its messages
  digest: str  # of its messages


@dataclasses.dataclass(frozen=True)
class Made:
  """What a part of the work returned, and the files that it wrote, by their path in the folder."""

  value: Any
  files: dict[str, FileDigest]
  cut: int = 0  # texts that are not stored whole


@dataclasses.dataclass(frozen=True)
class Documents:
  """The hashes and lengths by which rows find the documents of a partition."""

  hashes: np.ndarray  # [N] uint64, ascending
  lengths: np.ndarray  # [N] tokens
  cut: int  # of so many not all tokens are stored


def partition(hashes: np.ndarray, number: int, partitions: int) -> slice:
  """Returns which of the ascending hashes belong to a partition; `partitions`: a power of two."""
  bits = 64 - (partitions.bit_length() - 1)
  bounds = np.array([number << bits, ((number + 1) << bits) - 1], np.uint64)
  first = np.searchsorted(hashes, bounds[0], side="left")
  return slice(int(first), int(np.searchsorted(hashes, bounds[1], side="right")))


def documents_of(texts: pa.Table, number: int, partitions: int, queried: bool) -> DocumentPart:
  """Returns what belongs to a partition of a chunk's texts."""
  hashes = texts["hash"].to_numpy()
  part = partition(hashes, number, partitions)
  inside = texts["text"].slice(part.start, part.stop - part.start).combine_chunks()
  return DocumentPart(hashes[part], inside, queried)


def write_documents(
  path: pathlib.Path, parts: Sequence[DocumentPart], tokenizer: Tokenizer, max_tokens: int
) -> tuple[Written, Documents]:
  """Writes the documents of a partition, each text once, in the order of their hashes."""
  hashes = np.concatenate([part.hashes for part in parts])
  queried = np.concatenate([np.full(part.hashes.size, part.queried) for part in parts])
  unique, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
  as_query = np.zeros(unique.size, bool)
  np.logical_or.at(as_query, inverse, queried)
  texts = pa.concat_arrays([part.texts for part in parts]).take(pa.array(first))
  lengths, cut = np.zeros(unique.size, np.uint16), np.zeros(unique.size, bool)

  def messages() -> Iterator[bytes]:
    made = tokenized(texts.to_pylist(), unique, as_query, tokenizer, max_tokens)
    for i, (text, cut[i]) in enumerate(made):
      lengths[i] = text.longest
      yield records.encode_record(text)

  return _write(path, DOCUMENTS, messages()), Documents(unique, lengths, int(cut.sum()))


def read_documents(messages: Iterable[bytes], cut: int) -> tuple[Written, Documents]:
  """Returns what `write_documents` returned for a partition, from the records that it wrote.

  Records do not say how many are `cut`.
  """
  digest, size = hashlib.sha256(), 0
  hashes: list[np.ndarray] = []
  lengths: list[int] = []
  for message in messages:
    digest.update(message)
    size += len(message)
    text = records.decode_text(message)
    hashes.append(text.hash)
    lengths.append(text.longest)
  unique = np.array(hashes, np.uint32).view(np.uint64).reshape(-1)
  found = Documents(unique, np.array(lengths, np.uint16), cut)
  return Written(len(lengths), size, digest.hexdigest()), found


def _write(path: pathlib.Path, split: str, messages: Iterable[bytes]) -> Written:
  digest, count = hashlib.sha256(), 0

  def counted() -> Iterator[bytes]:
    nonlocal count
    for message in messages:
      digest.update(message)
      count += 1
      yield message

  size = records.write_shard(path, split, counted())
  return Written(count, size, digest.hexdigest())


def tokenized(
  texts: Sequence[str],
  hashes: np.ndarray,
  as_query: np.ndarray,
  tokenizer: Tokenizer,
  max_tokens: int,
) -> Iterator[tuple[Text, bool]]:
  """Yields each text, as a query, too, where `as_query`, and whether not all its ids are stored."""
  for start in range(0, len(texts), BATCH):
    part = slice(start, start + BATCH)
    bare = tokenizer.ids(texts[part])
    wanted = np.flatnonzero(as_query[part])
    queries = [QUERY.format(text=texts[start + i]) for i in wanted.tolist()]
    by_place = dict(zip(wanted.tolist(), tokenizer.ids(queries), strict=True))
    for i, ids in enumerate(bare):
      head, skip = _head(ids, by_place[i]) if i in by_place else ([], 0)
      if len(head) > max_tokens:
        skip = len(ids)  # a head that is cut leaves no room for the rest
      text = Text(
        np.array(ids[:max_tokens], np.int32),
        np.array(head[:max_tokens], np.int32),
        skip,
        hashes[start + i : start + i + 1].view(np.uint32),
      )
      yield text, max(len(ids), len(head)) > max_tokens


def _head(bare: list[int], query: list[int]) -> tuple[list[int], int]:
  """Returns the ids of `query` before what it shares with the end of `bare`, and what they skip."""
  for skip in range(len(bare)):
    shared = len(bare) - skip
    if query[-shared:] == bare[skip:]:
      return query[:-shared], skip
  return query, len(bare)


@dataclasses.dataclass(frozen=True)
class LanguageRun:
  """Successive rows of one language in a shard, and the tokens of their texts."""

  language: str
  rows: Size
  query_tokens: Count
  positive_tokens: Count
  negative_tokens: Count  # of all stored


@dataclasses.dataclass(frozen=True)
class RowShard:
  """A shard of rows; several make up a file."""

  file: str
  written: Written
  longest: Count  # tokens of its longest text
  runs: list[LanguageRun]


@contextlib.contextmanager
def row_files(
  file: File, number: int, shards: int, new_file: NewFile
) -> Iterator[dict[str, dict[str, pathlib.Path]]]:
  """Yields new files for the rows of a chunk, by split and suffix; `new_file` opens one by name."""
  with contextlib.ExitStack() as stack:
    yield {
      split: {
        suffix: stack.enter_context(new_file(shard_name(split, number, shards) + suffix))
        for suffix in suffixes(file)
      }
      for split in (TRAIN, VALIDATION)
    }


def document_places(rows: pa.Table) -> np.ndarray:
  """Returns where each row's documents stand in its chunk's texts, [N, positives + negatives]."""
  column = rows["documents"].combine_chunks()
  if pa.types.is_null(column.type):
    return np.zeros((len(column), 0), np.int64)
  return column.flatten().to_numpy().reshape(-1, column.type.list_size)


def write_rows(
  paths: dict[str, dict[str, pathlib.Path]],
  file: File,
  rows: pa.Table,
  places: np.ndarray,
  lengths: np.ndarray,
  tokenizer: Tokenizer,
  max_tokens: int,
) -> tuple[dict[str, RowShard], int]:
  """Writes the rows of a chunk to a shard for training and one for validation, by language.

  Returns the shards, and of how many queries not all tokens are stored.

  `paths`: by split and suffix. `places` and `lengths`, [N, positives + negatives]: where each row's
  documents stand in the split `documents`, and their tokens. Beside each shard go the token counts
  of its texts and, where the manifest names them, a teacher's vectors.
  """
  hashes = hash64(rows["query"].to_pylist())
  held = hashes % VALIDATION_OF == 0
  _, language = np.unique(np.array(rows["language"].to_pylist(), object), return_inverse=True)
  order = np.lexsort((rows["row"].to_numpy(), language))
  made, cut = {}, 0
  for split, chosen in ((TRAIN, order[~held[order]]), (VALIDATION, order[held[order]])):
    table = rows.take(pa.array(chosen))
    texts = tokenized(
      table["query"].to_pylist(), hashes[chosen], np.ones(chosen.size, bool), tokenizer, max_tokens
    )
    counts = np.zeros((chosen.size, 1 + places.shape[1]), np.uint16)
    counts[:, 1:] = lengths[chosen]
    is_cut = np.zeros(chosen.size, bool)
    messages = _messages(file, table, places[chosen], texts, counts, is_cut)
    written = _write(paths[split][""], split, messages)
    cut += int(is_cut.sum())
    save_npy(paths[split][LENGTHS], counts)
    if file.vectors:
      digest, checksums = vectors.copy(file, table["row"].to_numpy(), paths[split][VECTORS])
      save_npy(paths[split][VECTORS + CHECKSUMS], checksums)
      written = dataclasses.replace(written, digest=f"{written.digest} {digest}")
    runs = _runs(file, table["language"].to_pylist(), counts)
    made[split] = RowShard(file.name, written, int(counts.max(initial=0)), runs)
  return made, cut


def _messages(
  file: File,
  table: pa.Table,
  places: np.ndarray,
  texts: Iterable[tuple[Text, bool]],
  counts: np.ndarray,
  is_cut: np.ndarray,
) -> Iterator[bytes]:
  """Yields the records of rows; fills in the tokens of their queries, and which are cut."""
  columns = zip(
    texts,
    table["language"].to_pylist(),
    table["row"].to_pylist(),
    table["score"].to_pylist(),
    places,
    strict=True,
  )
  for i, ((text, is_cut[i]), language, row, score, own) in enumerate(columns):
    counts[i, 0] = text.longest
    positives, negatives = own[: file.positives], own[file.positives :]
    yield records.encode_record(text, Row(file.name, language, row, score, positives, negatives))


def _runs(file: File, languages: list[str], counts: np.ndarray) -> list[LanguageRun]:
  names, starts = np.unique(np.array(languages, object), return_index=True)
  runs = []
  parts = np.split(counts.astype(np.int64), starts[1:]) if languages else []
  for name, part in zip(names, parts, strict=True):
    query, documents = part[:, 0], part[:, 1:]
    positives, negatives = documents[:, : file.positives], documents[:, file.positives :]
    sums = (int(x.sum()) for x in (query, positives, negatives))
    runs.append(LanguageRun(str(name), len(part), *sums))
  return runs
