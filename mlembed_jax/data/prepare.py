"""Prepares a dataset on one machine, a process per part of each step, safe to be killed.

A part writes its files under temporary names, renames them, and marks itself done last, with their
digests. Run again, the command leaves out what is done; what was half written, or is not as it was
written, is written anew, in a finished folder too. The result does not depend on the number of
processes, nor on how often it was stopped.
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
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa

from mlembed_jax import progress
from mlembed_jax.data import catalog, report, rows, transforms, vectors
from mlembed_jax.data.catalog import Recipe, row_shard
from mlembed_jax.data.file_digests import FileDigest, NewFile, digest_of, problems, recorded
from mlembed_jax.data.manifest import File
from mlembed_jax.data.names import CATALOG, DATASET, REPORT, TOKENIZER, names_of_rows, shard_name
from mlembed_jax.data.processes import end_with_parent, unheard
from mlembed_jax.data.records import DOCUMENTS, TRAIN, VALIDATION, read_shard
from mlembed_jax.data.report import FileCount
from mlembed_jax.data.shards import paths_of
from mlembed_jax.data.tokenizer import Tokenizer
from mlembed_jax.data.transforms import DocumentPart, Made
from mlembed_jax.errors import DataError
from mlembed_jax.files import copy_file, new_file, save_npy, write_json
from mlembed_jax.progress import Progress

SHOWN = 12  # of many files that are written again the first are printed
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
    if file.entry["instruction"]:
      tokenizer.prefix(file.entry["instruction"])
  states, size = {}, 0
  for file in files:
    own, beside = (list(map(_state, paths)) for paths in (paths_of(file), file.vectors.values()))
    states[file.name] = own + beside
    size += sum(bytes_ for bytes_, _ in own)
  needed = max(LEAST_PARTITIONS, size // PARTITION_BYTES)
  partitions = 1 << (needed - 1).bit_length()
  return Recipe(list(files), states, tokenizer.fingerprint, max_tokens, partitions)


def _state(path: str) -> tuple[int, str]:
  """Returns size and version of a file: when it was changed, or what its store calls it."""
  filesystem, inner = fsspec.core.url_to_fs(path)
  info = filesystem.info(inner)
  versions = [str(info[key]) for key in VERSIONS if info.get(key)]
  return int(info.get("size") or 0), versions[0] if versions else ""


def prepare_dataset(
  job: Job, *, processes: int, max_dropped_share: float, quick: bool = False
) -> None:
  """Writes the dataset to `job.out`; of one that is there already, what is missing or damaged.

  Args:
    job: what is to be written.
    processes: that work at a time.
    max_dropped_share: of the rows of a file that may be unusable.
    quick: whether a finished dataset is checked by names and sizes alone.

  Raises:
    DataError: the folder holds something else, a file cannot be read, or more rows than
      `max_dropped_share` of a file cannot be used.
  """
  finished = _Finished(job, processes, quick)
  whole = finished.exists and not finished.wrong
  if whole and not job.work.exists() and not _half_written(job):
    return
  with _open_work(job, finished):  # another command may be at work in it
    if whole:
      return _clear(job)
    _run(job, finished, processes, max_dropped_share)


class _Finished:
  """What an earlier run finished in the folder of a job: its catalog, and which files are whole."""

  def __init__(self, job: Job, processes: int, quick: bool):
    """Checks the files, and prints which are written again."""
    self._value = catalog.read_catalog(job.out)
    self.exists = self._value is not None
    self.wrong: dict[str, str] = {}
    self._digests: dict[str, FileDigest] = {}
    if self._value is None:
      return
    _check_same(job, self._value["plan"], job.out)
    self._digests = catalog.digests_of(self._value)
    if self._digests:
      self.wrong = problems(job.out, self._digests, quick=quick, threads=processes)
      self.wrong |= dict.fromkeys(catalog.missing_checksums(self._digests), "is missing")
    else:
      print(f"note: {catalog.unchecked(job.out)}", flush=True)
      self.wrong = self._missing(job)
    for name, what in list(self.wrong.items())[:SHOWN]:
      print(f"{job.out / name} {what}; it is written again", flush=True)
    if len(self.wrong) > SHOWN:
      print(f"... and {len(self.wrong) - SHOWN} more files", flush=True)

  def _missing(self, job: Job) -> dict[str, str]:
    """Returns what a folder without digests lacks."""
    names = catalog.expected_names(catalog.opened(job.out, self._value or {}))
    return {name: "is missing" for name in names if not (job.out / name).is_file()}

  def digests(self, names: Sequence[str]) -> dict[str, FileDigest] | None:
    """Returns the digests of these files, None where one is not whole or has no known digest."""
    known = all(name in self._digests and name not in self.wrong for name in names)
    return {name: self._digests[name] for name in names} if known else None

  def cut(self, name: str) -> int:
    """Returns how many texts of a shard are not stored whole."""
    return self._value["cut_texts"].get(name, 0) if self._value and self._digests else 0

  def rows(self, file: File, number: int, shards: int) -> Made | None:
    """Returns the shards of a chunk, None where they must be written."""
    names = [n for s in (TRAIN, VALIDATION) for n in names_of_rows(file, s, number, shards)]
    if (digests := self.digests(names)) is None or self._value is None:
      return None
    made = {s: row_shard(self._value["shards"][s][number]) for s in (TRAIN, VALIDATION)}
    return Made(made, digests, self.cut(shard_name(TRAIN, number, shards)))

  def check_records(self, job: Job, fingerprint: str) -> None:
    """Raises DataError where what was written again does not fit what was left as it was.

    The input may be of the same size and version, and still another. What was written is removed.
    """
    if self._value is None or self._value.get("fingerprint") == fingerprint:
      return
    for name in self.wrong:
      (job.out / name).unlink(missing_ok=True)
    _clear(job)
    raise DataError(
      f"{job.out}: the input now gives other records than those that were prepared of it; restore "
      "the input, or delete the folder and prepare it again"
    )


def _run(job: Job, finished: _Finished, processes: int, max_dropped_share: float) -> None:
  each = functools.partial(_each, job=job, processes=processes)
  read = each("reading", _read_file, items=range(len(job.recipe.files)))
  counts = [made.value for made in read]
  report.check_dropped(counts, max_dropped_share, job.out)
  for sentence in filter(None, (count.contradiction for count in counts)):
    print(f"note: {sentence}", flush=True)
  names = [shard_name(DOCUMENTS, i, job.recipe.partitions) for i in range(job.recipe.partitions)]
  partitions = [
    (number, finished.digests([name]), finished.cut(name)) for number, name in enumerate(names)
  ]
  documents = each("documents", _write_documents, items=partitions)
  chunks = [(file, k) for file, count in enumerate(counts) for k in range(count.chunks)]
  numbered = [
    (number, len(chunks), *chunk, finished.rows(job.recipe.files[chunk[0]], number, len(chunks)))
    for number, chunk in enumerate(chunks)
  ]
  _finish(job, finished, counts, documents, each("rows", _write_rows, items=numbered))


def _finish(
  job: Job,
  finished: _Finished,
  counts: Sequence[FileCount],
  documents: Sequence[Made],
  rows_: Sequence[Made],
) -> None:
  """Writes what describes the records; catalog.json, which makes the folder complete, last."""
  shards = {split: [made.value[split] for made in rows_] for split in (TRAIN, VALIDATION)}
  written = [made.value for made in documents]
  finished.check_records(job, catalog.fingerprint(job.recipe, shards, written))
  cut = catalog.cut_of(documents, rows_)
  if cut:
    print(f"note: {report.cut_texts(sum(cut.values()), job.recipe.max_tokens)}", flush=True)
  report.write_report(job.out, counts, shards, written, sum(cut.values()))
  copy_file(job.tokenizer_path, job.out / TOKENIZER)
  digests = {name: digest_of(job.out / name) for name in (REPORT, TOKENIZER)}
  for made in (*documents, *rows_):
    digests |= {name: digest for name, digest in made.files.items() if "/" not in name}
  catalog.save(job.out, job.recipe, shards, written, digests, cut)
  _clear(job)


def _clear(job: Job) -> None:
  """Removes what is not part of the result, also what killed processes left half written."""
  shutil.rmtree(job.work, ignore_errors=True)
  for path in _half_written(job):
    path.unlink()


def _half_written(job: Job) -> list[pathlib.Path]:
  return list(job.out.glob(".*.[0-9]*"))


def _check_same(job: Job, found: dict[str, Any], folder: pathlib.Path) -> None:
  asked = json.loads(json.dumps(job.recipe.as_json()))
  different = [key for key in asked if asked[key] != found.get(key)]
  if different:
    changed = (
      _changed_inputs(found.get("inputs"), asked["inputs"]) if different == ["inputs"] else ""
    )
    raise DataError(
      f"{folder} holds a dataset of other input: {changed or ', '.join(different)} differ; "
      "name another folder, or delete this one"
    )


def _changed_inputs(before: Any, now: dict[str, list[list[Any]]]) -> str:
  """Returns which files were changed since; where only their time was, how to give it back."""
  changed = {name: files for name, files in now.items() if before.get(name) != files}
  sizes = lambda files: [size for size, _ in files]  # noqa: E731
  touched = [name for name, files in changed.items() if sizes(before.get(name, [])) == sizes(files)]
  shown = ", ".join(list(changed)[:SHOWN]) or "files"
  if len(touched) < max(1, len(changed)):
    return f"size or number of {shown}"
  return f"the times of {shown} (a copy has a new one; `cp -p` keeps it) but not the sizes"


@contextlib.contextmanager
def _open_work(job: Job, finished: _Finished) -> Iterator[None]:
  """Holds the folder of intermediate files, which no other command may use meanwhile."""
  path = job.work / "plan.json"
  if path.is_file():
    _check_same(job, json.loads(path.read_text(encoding="utf-8")), job.out)
  elif not finished.exists:
    _check_empty(job.out)
  job.work.mkdir(parents=True, exist_ok=True)
  with (job.work / "lock").open("w") as lock:
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # a killed process holds it no more
    except BlockingIOError as error:
      raise DataError(f"--out: another command is preparing {job.out}; wait for it") from error
    write_json(path, job.recipe.as_json())
    yield


def _check_empty(folder: pathlib.Path) -> None:
  names = {inside.name for inside in folder.iterdir()} if folder.exists() else set()
  if REPORT in names and any(name.startswith(DATASET) for name in names):
    raise DataError(
      f"--out: {folder} holds a dataset without its {CATALOG}, which says what it was made of; "
      "restore that file, or delete the folder"
    )
  if names - {WORK}:
    raise DataError(f"--out: {folder} holds files that are no dataset; name another folder")


# Processes.


def _each(
  title: str, function: Callable[[Job, Any], Any], job: Job, items: Sequence[Any], processes: int
) -> list[Any]:
  """Returns the result of every item, computed now or in an earlier run; shows progress."""
  do = functools.partial(_once, title, function, job)
  with progress.count(title, len(items), " parts") as bar:
    if processes == 1:
      return list(_counted(map(do, enumerate(items)), bar))
    return _in_pool(title, do, items, processes, bar)


def _counted(values: Iterable[Any], bar: Progress) -> Iterator[Any]:
  for value in values:
    bar.update()
    yield value


def _in_pool(
  title: str, do: Callable[[Any], Any], items: Sequence[Any], processes: int, bar: Progress
) -> list[Any]:
  context = multiprocessing.get_context("spawn")
  pool = ProcessPoolExecutor(processes, context, _begin, (os.getpid(),))
  others = multiprocessing.active_children()
  try:
    with unheard(signal.SIGINT):  # submissions start the processes
      futures = [pool.submit(do, numbered) for numbered in enumerate(items)]
    for future in _counted(as_completed(futures), bar):
      future.result()
  except BrokenProcessPool as error:
    raise DataError(
      f"{title}: a process was ended from outside, perhaps for want of memory; run the command "
      "again, with fewer --processes: it goes on where it stopped"
    ) from error
  except BaseException:
    for worker in set(multiprocessing.active_children()) - {*others}:
      worker.kill()  # the program would wait for its part, which may be killed at any time
    raise
  finally:
    pool.shutdown(wait=False, cancel_futures=True)  # an error is shown at once
  return [future.result() for future in futures]


def _begin(parent: int) -> None:
  os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core per process
  end_with_parent(parent)


def _once(
  title: str, function: Callable[[Job, Any], Made], job: Job, numbered: tuple[int, Any]
) -> Made:
  n, item = numbered
  path = job.work / title / f"{n:05d}.made"
  if path.is_file():
    made = _unpickled(path)
    if made and not problems(job.out, made.files):
      return made
  made = function(job, item)
  with new_file(path) as new:
    new.write_bytes(pickle.dumps(made))
  return made


def _unpickled(path: pathlib.Path) -> Made | None:
  """Returns what a part marked as made, None where a crash of the machine left no whole file."""
  try:
    return pickle.loads(path.read_bytes())
  except Exception:  # damaged bytes raise errors of many kinds
    return None


def _new_files(job: Job) -> tuple[NewFile, dict[str, FileDigest]]:
  """Returns what opens new files by their path in the folder, and the digests of those written."""
  digests: dict[str, FileDigest] = {}
  return recorded(lambda name: new_file(job.out / name), digests), digests


# Steps, each run in one of the processes.


def _chunk(file: int, chunk: int, table: str) -> str:
  return f"{WORK}/chunks/{file:05d}-{chunk:05d}.{table}.arrow"


def _read_file(job: Job, number: int) -> Made:
  """Writes rows and texts of every chunk; returns what there was."""
  file, (create, digests) = job.recipe.files[number], _new_files(job)
  count = FileCount(file.name, file.instructed)
  for k, chunk in enumerate(rows.read_chunks(file)):
    vectors.check_rows(file, chunk.rows["row"].to_numpy())
    for name in ("rows", "texts"):
      table = getattr(chunk, name)
      with create(_chunk(number, k, name)) as new, pa.OSFile(str(new), "wb") as sink:
        writer = pa.ipc.new_file(sink, table.schema)
        writer.write_table(table)
        writer.close()
    count.add(chunk)
  vectors.check_shapes(file, count.read)
  return Made(count, digests)


def _read_table(job: Job, file: int, chunk: int, name: str) -> pa.Table:
  """Returns a table of a chunk, left on disk."""
  with pa.memory_map(str(job.out / _chunk(file, chunk, name))) as source:
    return pa.ipc.open_file(source).read_all()


def _document_part(job: Job, file: int, chunk: int, number: int) -> DocumentPart:
  texts, queried = _read_table(job, file, chunk, "texts"), job.recipe.files[file].symmetric
  return transforms.documents_of(texts, number, job.recipe.partitions, queried)


def _index(number: int, name: str) -> str:
  return f"{WORK}/index/{number:05d}.{name}.npy"


def _write_documents(job: Job, item: tuple[int, dict[str, FileDigest] | None, int]) -> Made:
  """Writes a partition, unless its file is whole, and the index of it."""
  (number, whole, cut), (create, digests) = item, _new_files(job)
  name = shard_name(DOCUMENTS, number, job.recipe.partitions)
  if whole:
    digests |= whole
    written, documents = transforms.read_documents(read_shard(job.out / name), cut)
  else:
    with create(name) as new:
      written, documents = transforms.write_documents(
        new, _document_parts(job, number), job.tokenizer, job.recipe.max_tokens
      )
  for kind in ("hashes", "lengths"):
    with create(_index(number, kind)) as new:
      save_npy(new, getattr(documents, kind))
  return Made(written, digests, documents.cut)


def _document_parts(job: Job, number: int) -> list[DocumentPart]:
  """Returns the documents of a partition, chunk after chunk."""
  paths = sorted((job.work / "chunks").glob("*.texts.arrow"))
  chunks = [tuple(map(int, path.name.split(".")[0].split("-"))) for path in paths]
  return [_document_part(job, file, chunk, number) for file, chunk in chunks]


def _write_rows(job: Job, item: tuple[int, int, int, int, Made | None]) -> Made:
  """Writes the shards of a chunk, unless their files are whole."""
  number, shards, file, chunk, whole = item
  if whole:
    return whole
  create, digests = _new_files(job)
  table = _read_table(job, file, chunk, "rows")
  places, lengths = _look_up(job, _read_table(job, file, chunk, "texts")["hash"].to_numpy())
  texts = transforms.document_places(table)
  source = job.recipe.files[file]
  with transforms.row_files(source, number, shards, create) as paths:
    made, cut = transforms.write_rows(
      paths,
      source,
      table,
      places[texts],
      lengths[texts],
      job.tokenizer,
      job.recipe.max_tokens,
    )
  return Made(made, digests, cut)


def _look_up(job: Job, hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Returns the place of each text in the split `documents`, and its tokens; hashes ascend."""
  places, lengths = np.zeros(hashes.size, np.int64), np.zeros(hashes.size, np.uint16)
  start = 0
  for number in range(job.recipe.partitions):
    part = transforms.partition(hashes, number, job.recipe.partitions)
    # The file is mapped, not read: few pages of a large partition are needed.
    known, tokens = (
      np.load(job.out / _index(number, n), mmap_mode="r") for n in ("hashes", "lengths")
    )
    found = np.searchsorted(known, hashes[part])
    places[part], lengths[part] = start + found, tokens[found]
    start += known.size
  return places, lengths
