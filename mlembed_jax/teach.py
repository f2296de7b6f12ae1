"""Writes the vectors that a teacher gives the texts of a prepared dataset, for `kd.teacher`.

  python -m mlembed_jax.teach --teacher MODEL --dataset PREPARED --out TAUGHT
  python -m mlembed_jax.teach --teacher MODEL --dataset PREPARED --out TAUGHT --align english

MODEL is any embedder: a folder in Hugging Face layout or hf:ORG/NAME that this package reads, else
whatever sentence-transformers loads, of any tokenizer and width. Each distinct text is embedded
once; the same command goes on after a stop.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import shutil
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from absl import flags

from mlembed_jax import cli, files, progress
from mlembed_jax.data import catalog, manifest, to_teach
from mlembed_jax.data.manifest import File
from mlembed_jax.data.taught import NAME, REMEDY, Taught, damage, numbers, write
from mlembed_jax.data.to_teach import Prompts, Texts, ToTeach
from mlembed_jax.data.tokenizer import with_instruction
from mlembed_jax.errors import ConfigError, DataError, LoadError, StorageError
from mlembed_jax.files import replace_folder
from mlembed_jax.vector_parts import Parts, digest_of_texts

if TYPE_CHECKING:
  from mlembed_jax.inference import Encoder

TEACHER = flags.DEFINE_string(
  "teacher",
  None,
  "Folder in Hugging Face layout, hf:ORG/NAME, or a name that sentence-transformers loads.",
  required=True,
)
DATASET = flags.DEFINE_string("dataset", None, "Prepared folder.", required=True)
OUT = flags.DEFINE_string("out", None, "Folder to write.", required=True)
FILES = flags.DEFINE_list("files", ["*"], "Patterns of the files whose rows are taught.")
OWN, NO_PROMPTS, OF_FILES = "teacher", "none", "files"
PROMPTS = flags.DEFINE_enum(
  "prompts",
  OWN,
  (OWN, NO_PROMPTS, OF_FILES),
  "What stands before texts: the prompts that the teacher has for queries and documents; nothing; "
  "or, before queries, the instruction of their file, as in training.",
)
ALIGN = flags.DEFINE_enum(
  "align",
  None,
  (to_teach.ENGLISH, to_teach.QUERY, to_teach.PASSAGE),
  "Both texts of a translation (bitext) get the vector of this one, and negatives none. english: "
  "of the text that is the more English one.",
)
PART = flags.DEFINE_integer("part", 16_384, "Texts of a part.", lower_bound=1)

DOCUMENT_PROMPTS = ("document", "passage", "corpus")  # names of the prompt of documents


@dataclasses.dataclass(frozen=True)
class Model:
  """An embedder, and what it puts before texts."""

  name: str
  version: str  # digest of its files; of a name of the Hub, its commit
  prompts: dict[str, str]
  encode: Callable[[list[str], str], np.ndarray]  # of texts after a prompt

  def prompt(self, *names: str) -> str:
    """Returns the first prompt of these names that is not empty, "" where there is none."""
    return next(filter(None, (self.prompts.get(name) for name in names)), "")


def load_model(name: str) -> Model:
  """Returns the embedder: read by this package, else by sentence-transformers.

  Raises:
    LoadError: neither reads it.
  """
  from mlembed_jax.inference import Encoder

  try:
    return _ours(name, Encoder.load(name))
  except LoadError as error:
    return _theirs(name, error)


def _ours(name: str, encoder: Encoder) -> Model:
  return Model(
    name,
    _version(encoder.folder),
    encoder.prompts,
    lambda texts, prompt: encoder.encode(texts, prompt=prompt),
  )


def _theirs(name: str, refused: LoadError) -> Model:
  why = str(refused).splitlines()[-1].rstrip(".") + "."
  try:
    from sentence_transformers import SentenceTransformer  # an extra of the package
  except ImportError as error:
    raise LoadError(
      f'--teacher: {why} sentence-transformers may read it: pip install "mlembed_jax[teach]"'
    ) from error
  path = pathlib.Path(name.removeprefix("hf:"))
  try:
    model = SentenceTransformer(str(path))
  except Exception as error:  # of transformers, torch, the Hub
    raise LoadError(f"--teacher: {why} Nor does sentence-transformers read it: {error}") from error
  print(f"{name} is encoded by sentence-transformers, as this package does not: {why}", flush=True)
  return Model(
    name,
    _version(path) if path.is_dir() else _commit(model),
    {key: prompt or "" for key, prompt in model.prompts.items()},
    lambda texts, prompt: np.asarray(model.encode(texts, prompt=prompt, show_progress_bar=False)),
  )


def _version(folder: pathlib.Path) -> str:
  """Returns a digest of the files of a folder but hidden ones: minutes beside days of embedding."""
  found = files.digests(folder)
  return digest_of_texts(*(f"{k} {v}" for k, v in found.items() if "/." not in f"/{k}"))


def _commit(model: Any) -> str:
  """Returns the commit of a model of the Hub, "" where its first module does not know it."""
  config = getattr(getattr(model[0], "auto_model", None), "config", None)
  return getattr(config, "_commit_hash", None) or ""


def find_prompts(model: Model, chosen: list[File]) -> Prompts:
  """Returns what `--prompts` asks to put before texts."""
  if PROMPTS.value == OF_FILES:
    return Prompts(
      "", {file.name: with_instruction(file.entry["instruction"], "") for file in chosen}
    )
  query, document = "", ""
  if PROMPTS.value == OWN:
    query, document = model.prompt("query"), model.prompt(*DOCUMENT_PROMPTS)
  return Prompts(document, {file.name: query for file in chosen})


def _say_prompts(prompts: Prompts) -> None:
  queries = ", ".join(repr(prompt) for prompt in dict.fromkeys(prompts.queries.values()))
  print(f"before queries stands {queries}, before documents {prompts.documents!r}", flush=True)


def encode_all(
  model: Model, texts: Texts, planned: ToTeach, parts: Parts, size: int
) -> list[pathlib.Path]:
  """Returns the files of the vectors of all texts, `size` each, of which some may be there."""
  made, origin = [], json.dumps([model.name, model.version])
  with progress.count("embedding", len(planned.sources), " texts") as bar:
    for start in range(0, len(planned.sources), size):
      chosen = slice(start, start + size)
      read = texts.read([texts.source(int(place)) for place in planned.sources[chosen]])
      before = [planned.before[number] for number in planned.prompts[chosen]]
      name = f"{len(made):08d}-{digest_of_texts(origin, *before, *read)}"
      if (file := parts.find(name)) is None:
        file = parts.save(name, numbers(_vectors(model, read, before, bar.update), read))
      else:
        bar.update(len(read))
      made.append(file)
  return made


def _vectors(
  model: Model, texts: list[str], before: list[str], update: Callable[[int], object]
) -> np.ndarray:
  """Returns the vectors of a part, the texts of each prompt together."""
  found: list[np.ndarray] = [np.zeros(0)] * len(texts)
  for prompt in dict.fromkeys(before):
    places = [i for i, each in enumerate(before) if each == prompt]
    for chosen in _batches(places):
      vectors = model.encode([texts[i] for i in chosen], prompt)
      for i, vector in zip(chosen, vectors, strict=True):
        found[i] = vector
      update(len(chosen))
  return np.stack(found)


def _batches(places: list[int], size: int = 1024) -> Iterator[list[int]]:
  return (places[i : i + size] for i in range(0, len(places), size))


def _is_complete(out: pathlib.Path, wanted: Taught) -> bool:
  """Returns whether the folder is complete already; raises ConfigError where it is of others."""
  if not out.exists():
    return False
  if not (out / NAME).is_file():
    raise ConfigError(f"--out: {out} exists, and {NAME} is not in it; name another folder")
  found = Taught.load(out)
  if dataclasses.replace(found, files={}) != wanted:
    raise ConfigError(f"--out: {out} holds other vectors; name another folder, or remove it")
  if wrong := damage(out, found, quick=False):
    raise DataError(f"--out: {out}: {wrong}; {REMEDY}")
  return True


def main() -> None:
  """Reads the flags, finds the distinct texts, embeds them and writes the folder."""
  out, align = pathlib.Path(OUT.value), ALIGN.value or ""
  with cli.flags_in_errors("out"):
    files.make_writable_folder(out.parent, "out")
  opened = catalog.load_catalog(pathlib.Path(DATASET.value))
  if out.resolve().is_relative_to(opened.folder.resolve()):
    raise ConfigError(f"--out: {out} lies in the prepared dataset; choose another folder")
  names = manifest.matching(opened.files, FILES.value, "--files", opened.folder)
  chosen = [file for name, file in opened.files.items() if name in names]
  if align and not any(to_teach.is_aligned(file, align) for file in chosen):
    raise ConfigError("--align: none of the files is of task_type bitext, which has translations")
  model = load_model(TEACHER.value)
  content = Taught(
    opened.fingerprint,
    model.name,
    model.version,
    model.encode(["a"], "").shape[1],
    PROMPTS.value,
    align,
    {f.name: 1 + f.positives + _negatives(f, align) for f in chosen},
    tuple(f.name for f in chosen if to_teach.is_aligned(f, align)),
    {},
  )
  parts, new = Parts(out), out.with_name(f".{out.name}.new")
  with parts.held():
    if not (complete := _is_complete(out, content)):
      prompts = find_prompts(model, chosen)
      _say_prompts(prompts)
      planned = to_teach.plan(opened, chosen, prompts, align)
      _check_room(planned, content.width, out)
      made = encode_all(model, Texts(opened), planned, parts, PART.value)
      shutil.rmtree(new, ignore_errors=True)  # of a command that was killed
      new.mkdir()
      write(new, content, planned, made, opened)
      replace_folder(new, out)
    shutil.rmtree(parts.folder)
  said = "is complete; " if complete else ""
  print(f"{out}: {said}train with --config.kd.teacher={out}")


def _negatives(file: File, align: str) -> int:
  """Returns how many negatives of a row get a vector."""
  return 0 if to_teach.is_aligned(file, align) else file.negatives


def _check_room(planned: ToTeach, width: int, out: pathlib.Path) -> None:
  """Says how much is written; raises StorageError where the disk has less room."""
  if not len(planned.sources):
    raise DataError("--files: their training rows have no texts")
  rows = sum(int((of != to_teach.NONE).sum()) for of in (planned.documents, planned.queries))
  parts, final = (files.readable_size(2 * width * n) for n in (len(planned.sources), rows))
  print(
    f"{len(planned.sources):,} distinct texts; {final} of vectors, and {parts} beside them until "
    "they are written",
    flush=True,
  )
  with files.storage_errors(out.parent):
    free = shutil.disk_usage(out.parent).free
  if 2 * width * (len(planned.sources) + rows) > free:
    raise StorageError(f"--out: {files.readable_size(free)} are free at {out.parent}; free space")


if __name__ == "__main__":
  cli.run(main)
