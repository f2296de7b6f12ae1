"""The preparation as an Apache Beam pipeline, for corpora that one machine reads too slowly.

It runs the transforms of `prepare.py` and writes the same bytes. Texts travel between workers
through the engine's shuffle; files are written by workers under a temporary name and renamed, to
any file system that fsspec knows. The engine repeats what fails, so there is nothing to go on from
after the pipeline itself was ended.
"""

import contextlib
import dataclasses
import functools
import pathlib
import tempfile
import uuid
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import apache_beam as beam
import fsspec
import numpy as np
import pyarrow as pa
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.pvalue import AsDict, AsList, AsSingleton, TaggedOutput

from mlembed_jax.data import catalog, report, rows, transforms, vectors
from mlembed_jax.data.catalog import Recipe
from mlembed_jax.data.file_digests import FileDigest, digest_of, recorded
from mlembed_jax.data.manifest import File
from mlembed_jax.data.names import CATALOG, REPORT, TOKENIZER, shard_name
from mlembed_jax.data.records import DOCUMENTS, TRAIN, VALIDATION
from mlembed_jax.data.report import FileCount
from mlembed_jax.data.rows import Chunk
from mlembed_jax.data.tokenizer import Tokenizer
from mlembed_jax.data.transforms import DocumentPart, Made
from mlembed_jax.errors import DataError

Digests = dict[str, FileDigest]  # of files by name
ChunkId = tuple[int, int]  # file, chunk of it
# Of one partition's documents that a chunk refers to: partition, places in it, tokens.
Found = tuple[int, np.ndarray, np.ndarray]


@dataclasses.dataclass(frozen=True)
class BeamJob:
  """What every worker knows. The tokenizer is part of it, as workers share no disk."""

  recipe: Recipe
  out: str
  tokenizer: str  # content of its file
  pooled_token: str
  max_dropped_share: float


def run_pipeline(job: BeamJob, options: Sequence[str]) -> None:
  """Writes the dataset to `job.out`, on the engine that the options name.

  Raises:
    DataError: the folder holds something else than what a stopped run leaves.
  """
  filesystem, path = fsspec.core.url_to_fs(job.out)
  there = filesystem.ls(path, detail=False) if filesystem.exists(path) else []
  if any(name.rpartition("/")[2] != REPORT for name in there):
    raise DataError(f"--out: {job.out} is not empty; name another folder")
  filesystem.makedirs(path, exist_ok=True)
  with beam.Pipeline(options=PipelineOptions(list(options))) as pipeline:
    files = pipeline | "files" >> beam.Create(range(len(job.recipe.files))) | beam.Reshuffle()
    read = files | "read" >> beam.FlatMap(_read, job).with_outputs("counts", "parts", "rows")
    counts: Any = read.counts | beam.GroupByKey() | "count" >> beam.Map(_count, job)
    start: Any = pipeline | "start" >> beam.Create([None])
    checked = start | "check" >> beam.Map(_check, job, AsDict(counts))
    made = (
      read.parts
      | "partitions" >> beam.GroupByKey()
      | "documents"
      >> beam.FlatMap(_write_documents, job, AsSingleton(checked)).with_outputs("written", "found")
    )
    chunks = read.rows | beam.Keys()
    shards: Any = (
      {"rows": read.rows, "found": made.found}
      | beam.CoGroupByKey()
      | "rows" >> beam.Map(_write_rows, job, AsList(chunks), AsDict(made.written))
    )
    _ = start | "finish" >> beam.Map(
      _finish, job, AsDict(counts), AsDict(shards), AsDict(made.written)
    )


@functools.lru_cache(maxsize=1)
def _tokenizer(content: str, pooled_token: str) -> Tokenizer:
  with tempfile.NamedTemporaryFile("w", suffix=".json", encoding="utf-8") as file:
    file.write(content)
    file.flush()
    return Tokenizer(file.name, pooled_token)


@contextlib.contextmanager
def _new_file(job: BeamJob, name: str) -> Iterator[pathlib.Path]:
  """Yields a local path, whose file becomes OUT/name at the end unless there is an error."""
  with tempfile.TemporaryDirectory() as folder:
    local = pathlib.Path(folder) / name
    yield local
    filesystem, out = fsspec.core.url_to_fs(job.out)
    temporary = f"{out}/.{name}.{uuid.uuid4().hex}"
    try:
      filesystem.put_file(str(local), temporary)
      filesystem.mv(temporary, f"{out}/{name}")
    except Exception:
      if filesystem.exists(temporary):
        filesystem.rm(temporary)
      raise


def _read(number: int, job: BeamJob) -> Iterator[TaggedOutput]:
  file, partitions = job.recipe.files[number], job.recipe.partitions
  for k, chunk in enumerate(rows.read_chunks(file)):
    vectors.check_rows(file, chunk.rows["row"].to_numpy())
    bare = dataclasses.replace(chunk, rows=pa.table({}), texts=pa.table({}))
    yield TaggedOutput("counts", (number, (k, bare)))
    yield TaggedOutput("rows", ((number, k), chunk.rows))
    for p in range(partitions):
      part = transforms.documents_of(chunk.texts, p, partitions, file.symmetric)
      yield TaggedOutput("parts", (p, ((number, k), part)))


def _count(item: tuple[int, Iterable[tuple[int, Chunk]]], job: BeamJob) -> tuple[int, FileCount]:
  number, chunks = item
  count = _new_count(job.recipe.files[number])
  for _, chunk in sorted(chunks, key=lambda item: item[0]):
    count.add(chunk)
  return number, count


def _new_count(file: File) -> FileCount:
  return FileCount(file.name, file.instructed)


def _counts(job: BeamJob, counts: dict[int, FileCount]) -> list[FileCount]:
  return [counts.get(i, _new_count(file)) for i, file in enumerate(job.recipe.files)]


def _check(_: None, job: BeamJob, counts: dict[int, FileCount]) -> bool:
  found = _counts(job, counts)
  for file, count in zip(job.recipe.files, found, strict=True):
    vectors.check_shapes(file, count.read)
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    try:
      report.check_dropped(found, job.max_dropped_share, folder)
    finally:
      _copy(job, folder / REPORT)
  return True


def _copy(job: BeamJob, path: pathlib.Path) -> None:
  with _new_file(job, path.name) as new:
    new.write_bytes(path.read_bytes())


def _write_documents(
  item: tuple[int, Iterable[tuple[ChunkId, DocumentPart]]], job: BeamJob, checked: bool
) -> Iterator[TaggedOutput]:
  """Writes a partition after all files were checked; tells each chunk where its texts stand."""
  assert checked
  number, parts = item
  ordered = sorted(parts, key=lambda item: item[0])
  tokenizer = _tokenizer(job.tokenizer, job.pooled_token)
  digests: Digests = {}
  new_file = recorded(functools.partial(_new_file, job), digests)
  with new_file(shard_name(DOCUMENTS, number, job.recipe.partitions)) as new:
    written, documents = transforms.write_documents(
      new, [part for _, part in ordered], tokenizer, job.recipe.max_tokens
    )
  yield TaggedOutput("written", (number, Made(written, digests, documents.cut)))
  for chunk, part in ordered:
    places = np.searchsorted(documents.hashes, part.hashes)
    yield TaggedOutput("found", (chunk, (number, places, documents.lengths[places])))


def _write_rows(
  item: tuple[ChunkId, dict[str, Iterable[Any]]],
  job: BeamJob,
  chunks: list[ChunkId],
  documents: dict[int, Made],
) -> tuple[ChunkId, Made]:
  chunk, parts = item
  (table,), found = parts["rows"], sorted(parts["found"], key=lambda item: item[0])
  sizes = [documents[p].value.records for p in range(job.recipe.partitions)]
  starts = np.concatenate([[0], np.cumsum(sizes)])
  places = np.concatenate([starts[p] + place for p, place, _ in found])
  lengths = np.concatenate([length for _, _, length in found])
  file, number = job.recipe.files[chunk[0]], sorted(chunks).index(chunk)
  digests: Digests = {}
  new = recorded(functools.partial(_new_file, job), digests)
  with transforms.row_files(file, number, len(chunks), new) as paths:
    texts = transforms.document_places(table)
    tokenizer = _tokenizer(job.tokenizer, job.pooled_token)
    made, cut = transforms.write_rows(
      paths, file, table, places[texts], lengths[texts], tokenizer, job.recipe.max_tokens
    )
  return chunk, Made(made, digests, cut)


def _finish(
  _: None,
  job: BeamJob,
  counts: dict[int, FileCount],
  made: dict[ChunkId, Made],
  documents: dict[int, Made],
) -> None:
  """Writes what describes the records; catalog.json, which makes the folder complete, last."""
  ordered = [made[chunk] for chunk in sorted(made)]
  shards = {split: [part.value[split] for part in ordered] for split in (TRAIN, VALIDATION)}
  partitions = [documents[p] for p in sorted(documents)]
  written = [part.value for part in partitions]
  digests: Digests = {}
  cut = catalog.cut_of(partitions, ordered)
  for part in (*partitions, *ordered):
    digests |= part.files
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    (folder / TOKENIZER).write_text(job.tokenizer, encoding="utf-8")
    report.write_report(folder, _counts(job, counts), shards, written, sum(cut.values()))
    digests |= {name: digest_of(folder / name) for name in (TOKENIZER, REPORT)}
    catalog.save(folder, job.recipe, shards, written, digests, cut)
    names = sorted(path.name for path in folder.iterdir() if path.name != CATALOG)
    for file in (*names, CATALOG):
      _copy(job, folder / file)
