"""Prepares a dataset on one machine, a process per part of each step, safe to be killed.

A part writes its files under temporary names, renames them, and marks itself done last. Run again,
the command leaves out what is done; what was half written is written anew. The result does not
depend on the number of processes, nor on how often it was stopped.
"""

import contextlib
import dataclasses
import fcntl
import functools
import json
import multiprocessing
import os
import pathlib
import pickle
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import tqdm

from mlembed_jax.data import catalog, report, rows, transforms, vectors
from mlembed_jax.data.catalog import Recipe
from mlembed_jax.data.manifest import File
from mlembed_jax.data.processes import end_with_parent
from mlembed_jax.data.records import DOCUMENTS, TRAIN, VALIDATION, file_name
from mlembed_jax.data.report import FileCount
from mlembed_jax.data.tokenizer import Tokenizer
from mlembed_jax.data.transforms import DocumentPart, RowShard, Written
from mlembed_jax.errors import DataError
from mlembed_jax.files import copy_file, new_file, write_json

WORK = ".work"  # names the folder of what is not part of the result
# Compressed input per documents file: 1,000 files for 60 GB. A process holds one at a time, which
# uncompressed and with each text once is about twice this.
PARTITION_BYTES = 64 * 2**20
LEAST_PARTITIONS = 8  # so that several processes have something to do
# What file systems call the version of a file: local and sftp, gcs, s3 and http, hf.
VERSIONS = ("mtime", "generation", "ETag", "etag", "blob_id", "last_modified")
MAX_TOKENS = 60_000  # counts are stored in 16 bits, and a query has a few more than its text


@dataclasses.dataclass(frozen=True)
class Job:
  """What every process of the preparation knows."""

  recipe: Recipe
  out: pathlib.Path
  tokenizer_path: pathlib.Path
  pooled_token: str

  @property
  def work(self) -> pathlib.Path:
    """The folder of intermediate files."""
    return self.out / WORK

  @functools.cached_property
  def tokenizer(self) -> Tokenizer:
    """The tokenizer, opened once per process."""
    return Tokenizer(self.tokenizer_path, self.pooled_token)


def make_dataset_folder(path: str) -> pathlib.Path:
  """Returns the folder of a dataset, made if needed; raises DataError where that cannot be."""
  folder = pathlib.Path(path).absolute()
  try:
    folder.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise DataError(f"--out: {path} cannot be made: {error.strerror}") from error
  return folder


def make_recipe(files: Sequence[File], tokenizer: Tokenizer, max_tokens: int) -> Recipe:
  """Returns what is to be prepared, from the files that it is made of.

  Raises:
    DataError: a file is missing, unreadable or of another form than its entry says, or the
      tokenizer does not fit our queries.
  """
  if not 2 <= max_tokens <= MAX_TOKENS:
    raise DataError(f"--max_tokens: {max_tokens} is not between 2 and {MAX_TOKENS}")
  for file in files:
    rows.check_file(file)
    vectors.check_shapes(file)
    tokenizer.prefix(file.entry["instruction"])
  states = {
    file.name: [_state(path) for path in (file.path, *file.vectors.values())] for file in files
  }
  needed = max(LEAST_PARTITIONS, sum(paths[0][0] for paths in states.values()) // PARTITION_BYTES)
  partitions = 1 << (needed - 1).bit_length()
  return Recipe(list(files), states, tokenizer.fingerprint, max_tokens, partitions)


def _state(path: str) -> tuple[int, str]:
  """Returns size and version of a file: when it was changed, or what its store calls it."""
  filesystem, inner = fsspec.core.url_to_fs(path)
  info = filesystem.info(inner)
  versions = [str(info[key]) for key in VERSIONS if info.get(key)]
  return int(info.get("size") or 0), versions[0] if versions else ""


def prepare_dataset(job: Job, *, processes: int, max_dropped_share: float) -> None:
  """Writes the dataset to `job.out`; nothing where it is there already.

  Raises:
    DataError: the folder holds something else, a file cannot be read, or more rows than
      `max_dropped_share` of a file cannot be used.
  """
  if (done := catalog.read_catalog(job.out)) is not None:
    _check_same(job, done["plan"], job.out)
    return _clear(job)
  with _open_work(job):
    _run(job, processes, max_dropped_share)


def _run(job: Job, processes: int, max_dropped_share: float) -> None:
  each = functools.partial(_each, job=job, processes=processes)
  counts = each("reading", _read_file, items=range(len(job.recipe.files)))
  report.check_dropped(counts, max_dropped_share, job.out)
  documents = each("documents", _write_documents, items=range(job.recipe.partitions))
  chunks = [(file, k) for file, count in enumerate(counts) for k in range(count.chunks)]
  numbered = [(number, len(chunks), *chunk) for number, chunk in enumerate(chunks)]
  made = each("rows", _write_rows, items=numbered)
  shards = {split: [shards[split] for shards in made] for split in (TRAIN, VALIDATION)}
  report.write_report(job.out, counts, shards, documents)
  copy_file(job.tokenizer_path, job.out / "tokenizer.json")
  catalog.save(job.out, job.recipe, shards, documents)
  _clear(job)


def _clear(job: Job) -> None:
  """Removes what is not part of the result, also what killed processes left half written."""
  shutil.rmtree(job.work, ignore_errors=True)
  for path in job.out.glob(".*.[0-9]*"):
    path.unlink()


def _check_same(job: Job, found: dict[str, Any], folder: pathlib.Path) -> None:
  asked = json.loads(json.dumps(job.recipe.as_json()))
  different = [key for key in asked if asked[key] != found.get(key)]
  if different:
    raise DataError(
      f"{folder} holds a dataset of other input: {', '.join(different)} differ; "
      "name another folder, or delete this one"
    )


@contextlib.contextmanager
def _open_work(job: Job) -> Iterator[None]:
  """Holds the folder of intermediate files, which no other command may use meanwhile."""
  path = job.work / "plan.json"
  if path.is_file():
    _check_same(job, json.loads(path.read_text(encoding="utf-8")), job.out)
  elif job.out.exists() and any(inside.name != WORK for inside in job.out.iterdir()):
    raise DataError(f"--out: {job.out} holds files that are no dataset; name another folder")
  job.work.mkdir(parents=True, exist_ok=True)
  with (job.work / "lock").open("w") as lock:
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # a killed process holds it no more
    except BlockingIOError as error:
      raise DataError(f"--out: another command is preparing {job.out}; wait for it") from error
    write_json(path, job.recipe.as_json())
    yield


# Processes.


def _each(
  title: str, function: Callable[[Job, Any], Any], job: Job, items: Sequence[Any], processes: int
) -> list[Any]:
  """Returns the result of every item, computed now or in an earlier run; shows progress."""
  do = functools.partial(_once, title, function, job)
  show = functools.partial(tqdm.tqdm, desc=title, total=len(items), unit="part")
  if processes == 1:
    return list(show(map(do, enumerate(items))))
  context = multiprocessing.get_context("spawn")
  pool = ProcessPoolExecutor(processes, context, _begin, (os.getpid(),))
  futures = [pool.submit(do, numbered) for numbered in enumerate(items)]
  try:
    for future in show(as_completed(futures)):
      future.result()
  except BrokenProcessPool as error:
    raise DataError(
      f"{title}: a process was ended from outside, perhaps for want of memory; run the command "
      "again, with fewer --processes: it goes on where it stopped"
    ) from error
  finally:
    pool.shutdown(wait=False, cancel_futures=True)  # an error is shown at once
  return [future.result() for future in futures]


def _begin(parent: int) -> None:
  os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core per process
  end_with_parent(parent)


def _once(
  title: str, function: Callable[[Job, Any], Any], job: Job, numbered: tuple[int, Any]
) -> Any:
  n, item = numbered
  path = job.work / title / f"{n:05d}.done"
  if path.is_file():
    return pickle.loads(path.read_bytes())
  value = function(job, item)
  with new_file(path) as new:
    new.write_bytes(pickle.dumps(value))
  return value


# Steps, each run in one of the processes.


def _chunk(job: Job, file: int, chunk: int, table: str) -> pathlib.Path:
  return job.work / "chunks" / f"{file:05d}-{chunk:05d}.{table}.arrow"


def _read_file(job: Job, number: int) -> FileCount:
  """Writes rows and texts of every chunk; returns what there was."""
  file = job.recipe.files[number]
  count = FileCount(file.name)
  for k, chunk in enumerate(rows.read_chunks(file)):
    vectors.check_rows(file, chunk.rows["row"].to_numpy())
    for name in ("rows", "texts"):
      with new_file(_chunk(job, number, k, name)) as new, pa.OSFile(str(new), "wb") as sink:
        table = getattr(chunk, name)
        with pa.ipc.new_file(sink, table.schema) as writer:
          writer.write_table(table)
    count.add(chunk)
  vectors.check_shapes(file, count.read)
  return count


def _read_table(job: Job, file: int, chunk: int, name: str) -> pa.Table:
  """Returns a table of a chunk, left on disk."""
  with pa.memory_map(str(_chunk(job, file, chunk, name))) as source:
    return pa.ipc.open_file(source).read_all()


def _document_part(job: Job, file: int, chunk: int, number: int) -> DocumentPart:
  texts, queried = _read_table(job, file, chunk, "texts"), job.recipe.files[file].symmetric
  return transforms.documents_of(texts, number, job.recipe.partitions, queried)


def _index(job: Job, number: int, name: str) -> pathlib.Path:
  return job.work / "index" / f"{number:05d}.{name}.npy"


def _write_documents(job: Job, number: int) -> Written:
  paths = sorted((job.work / "chunks").glob("*.texts.arrow"))
  chunks = [tuple(map(int, path.name.split(".")[0].split("-"))) for path in paths]
  parts = [_document_part(job, file, chunk, number) for file, chunk in chunks]
  recipe = job.recipe
  with new_file(job.out / file_name(DOCUMENTS, number, recipe.partitions)) as new:
    written, documents = transforms.write_documents(new, parts, job.tokenizer, recipe.max_tokens)
  for name in ("hashes", "lengths"):
    with new_file(_index(job, number, name)) as new, new.open("wb") as file:
      np.save(file, getattr(documents, name))
  return written


def _write_rows(job: Job, item: tuple[int, int, int, int]) -> dict[str, RowShard]:
  number, shards, file, chunk = item
  table = _read_table(job, file, chunk, "rows")
  places, lengths = _look_up(job, _read_table(job, file, chunk, "texts")["hash"].to_numpy())
  texts = transforms.document_places(table)
  source = job.recipe.files[file]
  with transforms.row_files(source, number, shards, lambda n: new_file(job.out / n)) as paths:
    return transforms.write_rows(
      paths,
      source,
      table,
      places[texts],
      lengths[texts],
      job.tokenizer,
      job.recipe.max_tokens,
    )


def _look_up(job: Job, hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Returns the place of each text in the split `documents`, and its tokens; hashes ascend."""
  places, lengths = np.zeros(hashes.size, np.int64), np.zeros(hashes.size, np.uint16)
  start = 0
  for number in range(job.recipe.partitions):
    part = transforms.partition(hashes, number, job.recipe.partitions)
    # The file is mapped, not read: few pages of a large partition are needed.
    known, tokens = (np.load(_index(job, number, n), mmap_mode="r") for n in ("hashes", "lengths"))
    found = np.searchsorted(known, hashes[part])
    places[part], lengths[part] = start + found, tokens[found]
    start += known.size
  return places, lengths
