"""Writes the vectors that a teacher gives the texts of a prepared dataset, for `kd.teacher`.

  python -m mlembed_jax.teach --teacher MODEL --dataset PREPARED --out TAUGHT
  python -m mlembed_jax.teach --teacher MODEL --dataset PREPARED --out TAUGHT --align english

MODEL is any embedder: a folder in Hugging Face layout or hf:ORG/NAME that this package reads, else
whatever sentence-transformers loads, of any tokenizer and width. Each distinct text is embedded
once; the same command goes on after a stop.
"""

import pathlib
import shutil

from absl import flags

from mlembed_jax import cli, files
from mlembed_jax.data import catalog, manifest, to_teach
from mlembed_jax.data.manifest import File
from mlembed_jax.data.taught import Taught, write
from mlembed_jax.data.to_teach import Prompts, Texts, ToTeach
from mlembed_jax.data.tokenizer import with_instruction
from mlembed_jax.errors import ConfigError, DataError, StorageError
from mlembed_jax.files import replace_folder
from mlembed_jax.teaching import DOCUMENT_PROMPTS, Model, encode_all, is_complete, load_model
from mlembed_jax.vector_parts import Parts

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
    if not (complete := is_complete(out, content)):
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
