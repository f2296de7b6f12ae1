"""Writes a tokenizer with the tokens that some texts need, for a model with a smaller table.

  python -m mlembed_jax.vocabulary --tokenizer MODEL --texts FILE --out small.json
  python -m mlembed_jax.vocabulary --tokenizer MODEL --dataset PREPARED --languages de,sw --out ...

Data that are prepared with it, and a run that starts from MODEL (`train.init_from`), train the rows
of these tokens alone.
"""

import pathlib
from typing import Any

from absl import flags

from mlembed_jax import cli
from mlembed_jax.data import catalog, languages, manifest, token_use, vocabulary
from mlembed_jax.data.catalog import Catalog
from mlembed_jax.data.token_use import TokenUse
from mlembed_jax.data.tokenizer import Vocabulary
from mlembed_jax.errors import ConfigError, DataError
from mlembed_jax.hf.tokenizer_source import tokenizer_path

TOKENIZER = flags.DEFINE_string(
  "tokenizer",
  None,
  "A tokenizer.json, the folder in Hugging Face layout that has it, or hf:ORG/NAME.",
  required=True,
)
TEXTS = flags.DEFINE_list("texts", [], "Files of texts, whose tokens are kept.")
COLUMN = flags.DEFINE_string("column", "text", "Field or column that holds the texts.")
DATASET = flags.DEFINE_string(
  "dataset", None, "Folder that mlembed_jax.prepare wrote with this tokenizer; its rows count, too."
)
LANGUAGES = flags.DEFINE_list("languages", [], "Of the rows of --dataset. Default: all.")
MANIFEST = flags.DEFINE_string(
  "manifest", None, "JSON of training files, whose instructions are kept whole, too."
)
KEEP_TOKENS = flags.DEFINE_integer(
  "keep_tokens", None, "Tokens that are kept at most; the rarest go.", lower_bound=1
)
OUT = flags.DEFINE_string("out", None, "File .json to write.", required=True)


def _use_of_dataset(tokenizer: Vocabulary, opened: Catalog | None) -> list[TokenUse]:
  """Returns the use of tokens in the rows of --dataset; raises DataError where it cannot be."""
  if opened is None:
    return []
  if Vocabulary(opened.tokenizer).vocabulary != tokenizer.vocabulary:
    raise DataError(f"--dataset: {DATASET.value} was prepared with another tokenizer")
  scheme = languages.LANGUAGE_SCRIPT
  keys = [languages.language_key(tag, scheme) for tag in LANGUAGES.value]
  try:
    return [token_use.of_rows(opened, list(opened.files), tokenizer, keys, scheme)]
  except DataError as error:
    raise DataError(f"--dataset, --languages: {error}") from error


def _entries(opened: Catalog | None) -> dict[str, dict[str, Any]]:
  """Returns the entries of --manifest and of --dataset, whose instructions are kept whole."""
  files = [] if MANIFEST.value is None else manifest.select(MANIFEST.value, ["*"], "--manifest", {})
  files += list(opened.files.values()) if opened else []
  return {file.name: {"instruction": "", "task_type": ""} | file.entry for file in files}


def _checked_out(source: pathlib.Path) -> pathlib.Path:
  """Returns --out; raises ConfigError where it is no name of a file, or the tokenizer itself."""
  out = pathlib.Path(OUT.value)
  if out.suffix != ".json" or out.is_dir():
    raise ConfigError(f"--out: {out} is not the name of a .json file")
  if out.exists() and out.samefile(source):
    raise ConfigError(f"--out: {out} is also --tokenizer, which it would replace")
  return out


def main() -> None:
  """Reads the flags, counts tokens, and writes the tokenizer."""
  # Imported here, jax does not slow down --help.
  from mlembed_jax.hf import config_files, recipe
  from mlembed_jax.hf.trim import protected_ids, write_tokenizer

  if not (TEXTS.value or DATASET.value):
    raise ConfigError("--texts, --dataset: name what holds the texts whose tokens are kept")
  if LANGUAGES.value and not DATASET.value:
    raise ConfigError("--languages: they are those of the rows of --dataset; name it, too")
  tokenizer = Vocabulary(tokenizer_path(TOKENIZER.value))
  out = _checked_out(tokenizer.path)
  try:
    vocabulary.check(tokenizer.spec, KEEP_TOKENS.value)
  except DataError as error:
    raise DataError(f"--tokenizer, --keep_tokens: {tokenizer.path}: {error}") from error
  opened = catalog.load_catalog(pathlib.Path(DATASET.value)) if DATASET.value else None
  entries, own = _entries(opened), recipe.stated_prompts(tokenizer.path.parent) or {}
  prompts = [*own.values(), *config_files.prompts(entries).values()]
  protected = protected_ids(tokenizer, entries, prompts)
  files = [token_use.of_file(tokenizer, n, COLUMN.value, "--texts") for n in TEXTS.value]
  use = token_use.total([*files, *_use_of_dataset(tokenizer, opened)])
  _, ids = write_tokenizer(out, tokenizer, use, protected, KEEP_TOKENS.value)
  rows = vocabulary.padded_rows(len(ids))
  print(
    f"{out}: {len(ids):,} of {tokenizer.size:,} tokens; {use.changed(ids):.2%} of a sample of the "
    f"texts are split into other pieces; train with --config.model.vocab={rows}"
  )


if __name__ == "__main__":
  cli.run(main)
