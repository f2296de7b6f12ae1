"""The manifest: which files there are, and what their rows are. One JSON object, file -> entry.

Required of an entry: task_type, instruction, query_has_instruction, negatives; of a held-out file
task_type and instruction. Optional: path (where the file lies if not beside the manifest, e.g.
hf://..., or its shards), lang (of a file without a `lang` column), positives (per row), symmetric
(documents are queries of their own kind, as in bitext), teacher_vectors (.npy files with a
teacher's vectors of every row), and what the model card says of a file.
"""

import dataclasses
import difflib
import fnmatch
import itertools
import os
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import fsspec

from mlembed_jax.data import near_names
from mlembed_jax.errors import DataError
from mlembed_jax.files import parse_json

SCORED = "scored_pairs"  # a query, a passage and how alike they are; no negatives
TEXT = "text"  # texts alone, which only a teacher says something of
TASK_TYPES = ("retrieval", "bitext", "clustering", "classification", SCORED, TEXT)
SYMMETRIC = ("bitext", "clustering", SCORED)  # unless the manifest says otherwise
REQUIRED = {"task_type": str, "instruction": str, "query_has_instruction": bool, "negatives": int}
REQUIRED_HELDOUT = {"task_type": str, "instruction": str}
OPTIONAL = {
  "path": str,
  "lang": str,
  "positives": int,
  "symmetric": bool,
  "teacher_vectors": dict,
}
# What people note of a file: the model card has the first four, nothing reads the others.
NOTES = ("rows", "languages", "licence", "source")
NOTES += ("notes", "use", "n_languages", "rows_per_source")
NAMES_SHOWN = 12  # of the files that a manifest lists
MOST_COLUMNS = 10_000  # of positives or negatives; a wrong number has its columns listed
VECTORS = ("query", "passage", "negatives")  # keys of teacher_vectors; the last one is optional


@dataclasses.dataclass(frozen=True)
class File:
  """One file of a manifest."""

  name: str
  entry: dict[str, Any]
  folder: str  # of the manifest

  @property
  def path(self) -> str:
    """Where it lies: a local path or any URL that fsspec knows."""
    return join_path(self.folder, self.entry.get("path", self.name))

  @property
  def positives(self) -> int:
    """Positives per row; texts alone have none."""
    return 0 if self.entry["task_type"] == TEXT else self.entry.get("positives", 1)

  @property
  def negatives(self) -> int:
    """Negatives stored per row."""
    return self.entry["negatives"]

  @property
  def instructed(self) -> bool:
    """Whether its queries have their instruction already."""
    return self.entry.get("query_has_instruction", False)

  @property
  def symmetric(self) -> bool:
    """Whether documents are of the queries' kind, so that some get the instruction too."""
    return self.entry.get("symmetric", self.entry["task_type"] in SYMMETRIC)

  @property
  def vectors(self) -> dict[str, str]:
    """Paths of a teacher's vectors by key, in the order of VECTORS."""
    named = self.entry.get("teacher_vectors", {})
    return {key: join_path(self.folder, named[key]) for key in VECTORS if key in named}


def join_path(folder: str, path: str) -> str:
  """Returns `path`, relative to `folder` unless it is absolute or a URL."""
  absolute = "://" in path or path.startswith("/")
  inner, chain, outer = folder.partition("::")  # zip://folder::gs://archive
  return path if absolute else f"{inner}/{path}{chain}{outer}"


def _folder(path: str) -> str:
  inner, chain, outer = path.partition("::")
  folder, slash, _ = inner.rpartition("/")
  return (folder if slash else ".") + chain + outer


def open_input(path: str, compression: str | None = "infer") -> Any:
  """Returns a readable binary file, of a local path or of any URL that fsspec knows.

  Args:
    path: the path or URL.
    compression: what it is to be unpacked by; "infer": what its name says; None: nothing.

  Raises:
    DataError: there is none, or the package that reads such URLs is not installed.
  """
  try:
    opened: Any = fsspec.open(path, "rb", compression=compression)
    file = opened.open()
    if "::" in path:
      file.opened = opened  # an archive is closed when nothing refers to its file system
    return file
  except FileNotFoundError as error:
    raise DataError(f"{path} does not exist") from error
  except (ImportError, ValueError) as error:  # a protocol without its package, or an unknown one
    raise DataError(f"{path}: {error}") from error
  except Exception as error:  # each store has errors of its own
    raise DataError(f"{path} cannot be read: {error}") from error


def read_manifest(path: str) -> dict[str, dict[str, Any]]:
  """Returns {file: entry} of a manifest.

  Raises:
    DataError: the file is missing or no JSON object, or names a file twice.
  """
  if os.path.isdir(path):
    raise DataError(f"{path} is a folder; name the manifest in it, as {path}/manifest.json")
  with open_input(path) as file:
    try:
      text = file.read()
    except (OSError, EOFError, zlib.error) as error:  # also of what it is packed by
      raise DataError(f"{path} cannot be read: {error}") from error
  manifest = parse_json(text, path, DataError)
  if not isinstance(manifest, dict):
    raise DataError(f"{path} must be an object: file -> entry")
  return manifest


def select(
  manifest_path: str, patterns: Iterable[str], field: str, required: Mapping[str, type] = REQUIRED
) -> list[File]:
  """Returns the checked files of a manifest that match any of the patterns, in its order.

  Args:
    manifest_path: the path or URL of the manifest.
    patterns: over the names of its files.
    field: the setting that has the patterns.
    required: the fields that an entry must have, with their types.

  Raises:
    DataError: a pattern matches nothing, or an entry has an unknown field or lacks one.
  """
  manifest, folder = read_manifest(manifest_path), _folder(manifest_path)
  chosen = matching(manifest, patterns, field, manifest_path)
  entries = {name: entry for name, entry in manifest.items() if name in chosen}
  for name, entry in entries.items():
    _check_names(manifest_path, name, entry)
  return [
    File(name, check_entry(manifest_path, name, entry, required), folder)
    for name, entry in entries.items()
  ]


def select_heldout(manifest_path: str, patterns: Iterable[str], field: str) -> list[File]:
  """Returns the held-out files that match, see `select`; they need no fields of training files."""
  return select(manifest_path, patterns, field, REQUIRED_HELDOUT)


def matching(names: Collection[str], patterns: Iterable[str], field: str, where: Any) -> set[str]:
  """Returns the names that match any of the patterns.

  Raises:
    DataError: a pattern matches nothing; `field` names the setting, `where` what has the names.
  """
  chosen: set[str] = set()
  for pattern in patterns:
    found = fnmatch.filter(names, pattern)
    if not found:
      raise DataError(f"{field}: {pattern!r} matches no file of {where}; {_hint(pattern, names)}")
    chosen |= set(found)
  return chosen


def _hint(pattern: str, names: Collection[str]) -> str:
  """Returns the names that a pattern may mean, the nearest one first."""
  if "," in pattern:
    return f"several are written {tuple(pattern.split(','))}"
  near = difflib.get_close_matches(pattern, names, n=1)
  # Its last part alone, as a.csv of train/a.csv, is too short to be near by letters.
  near += [name for name in names if pattern in name.split("/") and name not in near]
  shown, more = list(names)[:NAMES_SHOWN], len(names) - NAMES_SHOWN
  listed = f"it lists {', '.join(shown)}{f' and {more} more' if more > 0 else ''}"
  return f"did you mean {near[0]!r}? {listed}" if near else listed


def select_all(manifests: Iterable[str], patterns: Iterable[str], field: str) -> list[File]:
  """Returns the files of several manifests; raises DataError where two have one of a name."""
  patterns, files = list(patterns), {}
  for path in manifests:
    for file in select(path, patterns, field):
      if file.name in files:
        raise DataError(
          f"{path} and the manifest in {files[file.name].folder} both have {file.name}; "
          "give one of them another name (its `path` says where the file lies)"
        )
      files[file.name] = file
  return list(files.values())


def _check_names(manifest: str, name: str, entry: Any) -> None:
  """Raises DataError where a field is none that is known.

  A folder that an earlier version prepared may have others, so `check_entry` lets them stand.
  """
  known = (*REQUIRED, *OPTIONAL, *NOTES)
  for field in entry if isinstance(entry, dict) else ():
    if field in known:
      continue
    near = near_names.field_for(field, known)
    remedy = f"did you mean {near}?" if near else f"known are {', '.join(known)}"
    raise DataError(f"{manifest}: {name}: {field}: unknown field; {remedy}")


def check_entry(
  manifest: str, name: str, entry: Any, required: Mapping[str, type] = REQUIRED
) -> dict[str, Any]:
  """Returns the entry; raises DataError where a field is missing, wrong or of another type."""
  fields: dict[str, Any] = entry if isinstance(entry, dict) else {}
  problem = next(itertools.chain(_type_problems(fields, required), _value_problems(fields)), None)
  if problem:
    raise DataError(f"{manifest}: {name}: {problem}")
  return fields


def _type_problems(entry: dict[str, Any], required: Mapping[str, type]) -> Iterator[str]:
  for field, expected in (REQUIRED | OPTIONAL).items():
    if (field in entry or field in required) and type(entry.get(field)) is not expected:
      found = repr(entry[field]) if field in entry else "nothing"
      yield f"{field}: expected {expected.__name__}, found {found}"


def _value_problems(entry: dict[str, Any]) -> Iterator[str]:
  task, negatives = entry["task_type"], entry.get("negatives", 0)
  positives = entry.get("positives", 1)
  if task not in TASK_TYPES:
    yield f"task_type: {task!r} is unknown; known: {', '.join(TASK_TYPES)}"
  if negatives < 0:
    yield "negatives: must not be negative"
  if positives < 1:
    yield f"positives: must be at least 1, found {positives}"
  if max(negatives, positives) > MOST_COLUMNS:
    yield f"positives and negatives: at most {MOST_COLUMNS:,} of each, found {negatives} negatives"
  if task == SCORED and negatives:
    yield f"negatives: must be 0 for {task} (query, passage, score), found {negatives}"
  if task == SCORED and positives > 1:
    yield f"positives: must be 1 for {task} (query, passage, score), found {positives}"
  if task == TEXT and (negatives or "positives" in entry):
    yield f"negatives: must be 0 for {task}, and positives left out: its files have texts alone"
  if task == TEXT and "symmetric" in entry:
    yield f"symmetric: {task} has no documents; leave it out"
  if "teacher_vectors" in entry:
    needed = ("query",) if task == TEXT else ("query", "passage")
    known = needed if task == TEXT else VECTORS
    yield from _vector_problems(entry["teacher_vectors"], needed, known)


def _vector_problems(
  files: dict[str, Any], needed: tuple[str, ...], known: tuple[str, ...]
) -> Iterator[str]:
  for key in files:
    if key not in known:
      yield f"teacher_vectors: {key!r} is unknown; known: {', '.join(known)}"
  for key in (*needed, *files):
    if type(files.get(key)) is not str:
      found = repr(files[key]) if key in files else "nothing"
      yield f"teacher_vectors.{key}: expected the path of an .npy file, found {found}"
