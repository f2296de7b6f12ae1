"""An elastic copy of an embedder: its vectors in full, nearly, and good ones at every smaller size.

`--config configs/elastic.py:SOURCE`, a folder in Hugging Face layout or hf:ORG/NAME of an embedder
that pools the last token. Texts alone are enough: the embedder, frozen, is the teacher.
"""

import pathlib

from ml_collections import ConfigDict

from mlembed_jax.config import load_module
from mlembed_jax.hf import recipe
from mlembed_jax.hf.folder import resolve

from_hf = load_module(pathlib.Path(__file__).with_name("from_hf.py"))


def get_config(source: str) -> ConfigDict:
  config, folder = from_hf.get_config(source), resolve(source)
  found = recipe.read(folder)
  if not (end := found.tokenizer.end):
    raise LookupError(
      f"{folder}/tokenizer.json puts no token after a text; set the fields of this file on "
      "configs/from_hf.py:SOURCE, and data.pooled_token"
    )
  config.data.pooled_token = end
  config.model.rank = config.model.width  # begins with exactly the table of the embedder
  if found.max_seq_length:
    config.export.max_seq_length = min(found.max_seq_length, config.export.max_positions)
  config.export.name = from_hf.name_of(source) + "-elastic"
  config.losses.contrastive = 0.0
  config.kd.teacher = source
  # Every exit learns the last layer's vector, so that a shallow query finds deep documents.
  config.kd.match, config.kd.space = "last", "unit"
  # At fewer dimensions: its leading coordinates where they mean something, and its similarities.
  config.kd.prefix, config.kd.similarity = float(recipe.is_mrl(folder)), 1.0
  return config
