"""Prepares text for training: python -m mlembed_jax.prepare --manifest FILE --tokenizer FILE ...

Reads training files in the layout of the public release, checks every row, tokenises each document
once, and writes a dataset of TensorFlow Datasets, which `data.dataset` of a training run names. Run
again, it goes on after a stop, and writes what is missing or damaged of a finished dataset.
"""

import os
import shlex
import time

from absl import flags

from mlembed_jax import cli
from mlembed_jax.config_fields import DEFAULTS
from mlembed_jax.data import manifest, prepare, rows
from mlembed_jax.data.catalog import Recipe
from mlembed_jax.data.names import REPORT
from mlembed_jax.data.tokenizer import TemplateTokenizer, Tokenizer
from mlembed_jax.errors import DataError
from mlembed_jax.hf.tokenizer_source import tokenizer_path

MANIFEST = flags.DEFINE_multi_string(
  "manifest",
  None,
  "JSON that describes the files, a path or any URL that fsspec knows (gs://, s3://, hf://). May "
  "be given several times.",
  required=True,
)
FILES = flags.DEFINE_list("files", ["train/*"], "Patterns over the files of the manifests.")
TOKENIZER = flags.DEFINE_string(
  "tokenizer",
  None,
  "A tokenizer.json, the folder in Hugging Face layout that has it, or hf:ORG/NAME.",
  required=True,
)
POOLED_TOKEN = flags.DEFINE_string(
  "pooled_token",
  None,
  "What training will end every text with; looked up here. Default: what tokenizer.json puts after "
  "a text, else that of data.pooled_token.",
)
OUT = flags.DEFINE_string(
  "out", None, "Folder of the dataset. Made if it does not exist.", required=True
)
MAX_TOKENS = flags.DEFINE_integer(
  "max_tokens", 2047, "Tokens stored of a text; the end token is added in training."
)
MAX_DROPPED_SHARE = flags.DEFINE_float(
  "max_dropped_share", 0.01, "The command stops where more rows of a file cannot be used."
)
BEAM_OPTIONS = flags.DEFINE_string(
  "beam_options",
  None,
  "Run as an Apache Beam pipeline with these options, in one string: --runner=DataflowRunner "
  "--project=... Needs the extra `beam`; --out may then be a URL.",
)
PROCESSES = flags.DEFINE_integer(
  "processes", os.cpu_count() or 1, "Processes that work at a time.", lower_bound=1
)
QUICK = flags.DEFINE_bool(
  "quick", False, "Check a finished dataset by names and sizes of its files alone, not by digests."
)


def open_tokenizer(source: str, pooled_token: str | None) -> Tokenizer:
  """Returns the tokenizer of a file or folder, and says where training needs to be told its end.

  Args:
    source: a tokenizer.json, a folder in Hugging Face layout, or hf:ORG/NAME.
    pooled_token: ends every text; None: what the file puts after a text, else what training takes
      unless it is told.

  Raises:
    DataError, LoadError: there is no such file or folder, or it does not know the pooled token.
  """
  path, usual = tokenizer_path(source), DEFAULTS["data.pooled_token"]
  token = pooled_token or TemplateTokenizer(path).end or usual
  if token != usual:
    print(f"note: texts end with {token}; train with --config.data.pooled_token='{token}'")
  return Tokenizer(path, token)


def main() -> None:
  """Reads the flags and prepares the dataset."""
  start = time.perf_counter()
  files = manifest.select_all(MANIFEST.value, FILES.value, "--files")
  listed = sum(len(manifest.read_manifest(path)) for path in MANIFEST.value)
  for sentence in (sentence for file in files for sentence in rows.unused(file)):
    print(f"note: {sentence}", flush=True)
  tokenizer = open_tokenizer(TOKENIZER.value, POOLED_TOKEN.value)
  recipe = prepare.make_recipe(files, tokenizer, MAX_TOKENS.value)
  if BEAM_OPTIONS.value is None:
    if "://" in OUT.value:
      raise DataError(f"--out: {OUT.value}: without --beam_options it is a local folder")
    out = prepare.make_dataset_folder(OUT.value)
    job = prepare.Job(recipe, out, tokenizer.path.absolute(), tokenizer.pooled_token)
    prepare.prepare_dataset(
      job,
      processes=PROCESSES.value,
      max_dropped_share=MAX_DROPPED_SHARE.value,
      quick=QUICK.value,
    )
  else:
    _run_beam(recipe, tokenizer)
  seconds = time.perf_counter() - start
  made = f"{len(files)} of the {listed} files of {', '.join(MANIFEST.value)}"
  print(f"{OUT.value}: prepared {made} in {seconds:.0f} s; see {REPORT} there")


def _run_beam(recipe: Recipe, tokenizer: Tokenizer) -> None:
  try:
    from mlembed_jax.data import beam
  except ImportError as error:
    raise DataError(f"--beam_options: {error}; pip install 'mlembed_jax[beam]'") from error
  content = tokenizer.path.read_text(encoding="utf-8")
  job = beam.BeamJob(recipe, OUT.value, content, tokenizer.pooled_token, MAX_DROPPED_SHARE.value)
  beam.run_pipeline(job, shlex.split(BEAM_OPTIONS.value))


if __name__ == "__main__":
  cli.run(main)
