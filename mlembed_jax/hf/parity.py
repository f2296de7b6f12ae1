"""Texts with our own vectors of a folder's weights, for any other program to compare with."""

import base64
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from mlembed_jax import matryoshka
from mlembed_jax.config_fields import ModelConfig
from mlembed_jax.data.tokenizer import Tokenizer
from mlembed_jax.hf.config_files import Variant
from mlembed_jax.hf.load import Params, load_params, on_device
from mlembed_jax.hf.recipe import LAST, Recipe
from mlembed_jax.models.batched import Batching, encode_batched

FILE = "parity.json"
# These show what tokenizers and attention masks get wrong. None begins or ends with a blank, which
# sentence-transformers up to 5.3 strips.
TEXTS = {
  "ascii": "hello world",
  "letter": "a",
  "chinese": "今天天气很好,我们去公园散步吧。",
  "arabic": "السماء صافية هذا المساء والنجوم كثيرة.",
  "hindi": "मुझे सुबह की चाय बहुत पसंद है।",
  "thai": "พรุ่งนี้เราจะไปตลาดด้วยกัน",
  "georgian": "მთებში უკვე თოვლი მოვიდა.",
  "emoji": "👩‍👩‍👧‍👦 went home 🏳️‍🌈 👍🏽",
  "composed": "caf\u00e9 cr\u00e8me",
  "decomposed": "cafe\u0301 cre\u0300me",
  "code": "def f(x):\n\treturn x if x else None\n\n\nprint(f(1))",
  "digits": '3.14159, 2_000_000 & 1e-5 (50%): "a-b"; 12:34!',
  "mixed": "Zürich チューリッヒ Цюрих زيورخ ज़्यूरिख 취리히",
  "special": "the literal <|im_end|> inside a text",
}
SENTENCE = "The river rises slowly in spring, and nobody knows the old road over the hills. "
LONG_IDS, MAX_LENGTH = 600, 32  # tokens that "long" has at least; tokens that "truncated" keeps
BUCKETS = (64, 256)  # short texts are not padded to the longest
TOLERANCE = {
  "float32": {"max_abs": 1e-4, "min_cos": 0.99999},
  "bfloat16": {"min_cos": 0.999},
}


def items(
  params: Params, variant: Variant, tokenizer: Tokenizer, query_prompt: str
) -> dict[str, Any]:
  """Returns parity.json, by weights that `load` read back from the folder.

  So a file that differs from what was meant stops the export here.
  """
  found = _items(tokenizer, variant.run.config.export.max_seq_length, query_prompt)
  ids = [item["input_ids"] for item in found]
  for item, vector in zip(found, _vectors(params, variant.body, ids, variant.dim), strict=True):
    item["embedding"] = base64.b64encode(vector.tobytes()).decode()
  return {
    "format_version": 1,
    "compute": f"float32, highest matmul precision, {_exact_device().platform.upper()}",
    "layers": variant.depth,
    "dim": variant.dim,
    "tolerance": TOLERANCE,
    "items": found,
  }


def vectors(
  folder: pathlib.Path,
  model: ModelConfig,
  ids: Sequence[Sequence[int]],
  dim: int,
  recipe: Recipe | None = None,
) -> Float[np.ndarray, "N M"]:
  """Returns the unit vectors of token ids by the weights of a folder, in little-endian float32.

  They are cut states of the last token, unless the recipe of the folder says otherwise.
  """
  return _vectors(load(folder, model), model, ids, dim, recipe)


def load(folder: pathlib.Path, model: ModelConfig) -> Params:
  """Returns the weights of a folder, in float32 on a CPU where there is one."""
  return load_params(folder, model, on_device(model, _exact_device()))


def states(
  params: Params,
  model: ModelConfig,
  ids: Sequence[Sequence[int]],
  exits: Sequence[int],
  pooling: str = LAST,
) -> Float[np.ndarray, "E N D"]:
  """Returns the final-norm states of token ids at each exit, in float32, not normalised."""
  with jax.default_device(_exact_device()), jax.default_matmul_precision("highest"):
    batching = Batching(lengths=[*BUCKETS, max(map(len, ids))], rows=lambda _: 2)
    return encode_batched(model, params, ids, exits, batching, pooling=pooling)


def _vectors(
  params: Params,
  model: ModelConfig,
  ids: Sequence[Sequence[int]],
  dim: int,
  recipe: Recipe | None = None,
) -> Float[np.ndarray, "N M"]:
  found = states(params, model, ids, [model.layers], recipe.pooling if recipe else LAST)[0]
  with jax.default_device(_exact_device()), jax.default_matmul_precision("highest"):
    finished: Any = recipe.finish(found) if recipe else found
    return np.ascontiguousarray(matryoshka.truncate(finished, dim), "<f4")


def embedding(item: Mapping[str, Any]) -> Float[np.ndarray, " M"]:
  """Returns the vector of an item of parity.json."""
  return np.frombuffer(base64.b64decode(item["embedding"]), "<f4")


def _exact_device() -> Any:
  try:
    return jax.local_devices(backend="cpu")[0]
  except RuntimeError:  # JAX_PLATFORMS names an accelerator alone
    return jax.local_devices()[0]


def _items(tokenizer: Tokenizer, allowed: int, query_prompt: str) -> list[dict[str, Any]]:
  repeats = LONG_IDS // len(tokenizer.encode([SENTENCE], allowed)[0]) + 1
  long = (SENTENCE * repeats).strip()
  items = [{"id": name, "prompt_name": None, "text": t} for name, t in TEXTS.items()]
  items += [
    {"id": "query", "prompt_name": "query", "text": TEXTS["ascii"]},
    {"id": "long", "prompt_name": None, "text": long},
    {"id": "truncated", "prompt_name": None, "text": long, "max_length": MAX_LENGTH},
  ]
  for item in items:
    text = (query_prompt if item["prompt_name"] else "") + item["text"]
    item["input_ids"] = tokenizer.encode([text], item.get("max_length", allowed))[0]
  return items
