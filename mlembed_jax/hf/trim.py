"""A trained model whose token table has only the rows that some texts need."""

import dataclasses
import pathlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from mlembed_jax.data import vocabulary
from mlembed_jax.data.token_use import TokenUse
from mlembed_jax.data.tokenizer import PREFIX, QUERY, Tokenizer, Vocabulary
from mlembed_jax.errors import DataError
from mlembed_jax.files import write_json
from mlembed_jax.hf import stored_ranges
from mlembed_jax.hf.config_files import prompts_of
from mlembed_jax.hf.export import TrainedModel
from mlembed_jax.hf.own_file import TrimmedVocabulary

TOKENIZER = "tokenizer.json"


def trim(
  trained: TrainedModel,
  use: TokenUse,
  texts: Sequence[str],
  most: int | None,
  folder: pathlib.Path,
) -> TrainedModel:
  """Returns the model with the tokens that texts need, and prints what that saves and changes.

  Args:
    trained: the whole model.
    use: of the tokens, in the texts that are to stay as they are.
    texts: what these are called.
    most: tokens that are kept, of which the rarest are left out; None: all that come.
    folder: where the new tokenizer.json is written.

  Raises:
    DataError: the tokenizer cannot be cut, or not to so few tokens.
  """
  config, old = trained.run.config, np.asarray(trained.params["table"])
  run = trained.run
  protected = protected_ids(trained.tokenizer, run.datasets, prompts_of(run).values())
  tokenizer, ids = write_tokenizer(folder / TOKENIZER, trained.tokenizer, use, protected, most)
  table = vocabulary.table_rows(old, ids, min(vocabulary.padded_rows(len(ids)), len(old)))
  found = TrimmedVocabulary(config.model.vocab, len(ids), tuple(texts), use.changed(ids))
  model = dataclasses.replace(config.model, vocab=len(table))
  print(found.said(len(table), config.model.width, config.export.dtype), flush=True)
  return dataclasses.replace(
    trained,
    run=dataclasses.replace(trained.run, config=dataclasses.replace(config, model=model)),
    params={**trained.params, "table": table},
    tokenizer=Tokenizer(tokenizer, trained.tokenizer.pooled_token),
    sample=_sample(use, ids, trained),
    trimmed=found,
  )


def write_tokenizer(
  path: pathlib.Path,
  whole: Vocabulary,
  use: TokenUse,
  protected: Collection[int],
  most: int | None,
) -> tuple[pathlib.Path, Int[np.ndarray, "K"]]:
  """Writes the tokenizer with the tokens that texts need, and returns its path and their old ids.

  Raises:
    DataError: the tokenizer cannot be cut, or not to so few tokens; the message names its file.
  """
  spec = whole.spec
  try:
    ids = vocabulary.kept_ids(spec, use.counts, protected, most)
  except DataError as error:
    raise DataError(f"{whole.path}: {error}") from error
  write_json(path, vocabulary.trimmed(spec, ids))
  return path, ids


def protected_ids(
  whole: Vocabulary, datasets: Mapping[str, Mapping[str, Any]], prompts: Iterable[str]
) -> set[int]:
  """Returns the ids of all prompts and instructions, which stand before any text.

  `datasets` are manifest entries by file.
  """
  instructions = [PREFIX.format(instruction=e["instruction"]) for e in datasets.values()]
  texts = [*prompts, *instructions, PREFIX.format(instruction="a") + QUERY]
  return {one for ids in whole.ids([text for text in texts if text]) for one in ids}


def _sample(use: TokenUse, ids: Int[np.ndarray, "K"], trained: TrainedModel) -> list[list[int]]:
  """Returns texts to measure ranges of int8 vectors on, in new ids; texts that changed are none."""
  count, longest = stored_ranges.texts(trained.run.config.model)
  new = vocabulary.new_ids(ids, len(use.counts))
  same = [new[text] for text in use.sample if (new[text] >= 0).all()]
  step = max(1, len(same) // count)
  end = int(new[trained.tokenizer.pooled_id])
  return [[*text[: longest - 1].tolist(), end] for text in same[::step][:count]]
