"""D16 of sentence-transformers and transformers, which are really loaded where they are installed.

The only module of the package that imports torch, and only inside of its functions.
"""

import importlib.metadata
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from mlembed_jax.hf.checks.finding import (
  AGAIN,
  ERROR,
  SKIPPED,
  ST,
  TRANSFORMERS,
  WARNING,
  Said,
  Subject,
)
from mlembed_jax.hf.checks.small_files import foreign_code
from mlembed_jax.hf.checks.vectors import EXACT, Item, compare, items
from mlembed_jax.hf.parity import FILE, TOLERANCE

Load = Callable[[Subject, Sequence[Item]], Iterator[Said]]


def sentence_transformers(s: Subject) -> Iterator[Said]:
  """sentence-transformers gives the vectors of parity.json, in float32 and as it loads."""
  yield from _where_installed(s, ST, ("sentence_transformers", "torch"), _sentence_transformers)


def transformers(s: Subject) -> Iterator[Said]:
  """transformers finds all its weights and gives the vectors of parity.json."""
  yield from _where_installed(s, TRANSFORMERS, ("transformers", "torch"), _transformers)


def _where_installed(s: Subject, name: str, modules: Sequence[str], load: Load) -> Iterator[Said]:
  if absent := [m for m in modules if not importlib.util.find_spec(m)]:
    found = f"not loaded: {absent[0]} is not installed"
    yield Said(SKIPPED, "", found, "", (name,))
  elif foreign_code(s):
    yield Said(SKIPPED, "", "not loaded: the folder holds code that is not ours", "", (name,))
  else:
    try:
      yield from load(s, items(s))
    except Exception as error:  # of any kind, from any depth of two libraries
      reason = f"{type(error).__name__}: {error}".splitlines()[0]
      found = f"{_program(name)} does not load the folder: {reason}"
      yield Said(ERROR, "", found, AGAIN, (name,))


def _program(name: str) -> str:
  return f"{name} {importlib.metadata.version(name)}"


def _sentence_transformers(s: Subject, found: Sequence[Item]) -> Iterator[Said]:
  import torch

  program = _program(ST)
  yield from _encode(s, found, program, {"torch_dtype": torch.float32}, EXACT)
  if s.config.get("torch_dtype", s.config.get("dtype")) != "float32":
    for said in _encode(s, found, f"{program} as loaded", {}, TOLERANCE["bfloat16"]):
      # The folder is right: version 6 computes in the stored dtype, and this is what that costs.
      remedy = "Load it with model_kwargs={'torch_dtype': torch.float32}."
      yield said._replace(level=WARNING, remedy=remedy) if said.level == ERROR else said


def _encode(
  s: Subject,
  found: Sequence[Item],
  program: str,
  options: dict[str, Any],
  tolerance: dict[str, float],
) -> Iterator[Said]:
  from sentence_transformers import SentenceTransformer

  model = SentenceTransformer(
    str(s.path),
    device="cpu",
    local_files_only=True,
    trust_remote_code=s.is_remote,
    model_kwargs=options,
  )
  if not found:
    yield _only_loaded(program, ST)
    return

  def encode(item: Item) -> np.ndarray:
    model.max_seq_length = item.limit
    return np.asarray(model.encode(item.text, show_progress_bar=False))

  ids = _ids(model.tokenizer)
  yield from compare(found, ST, program, ids, lambda: [encode(item) for item in found], tolerance)


def _only_loaded(program: str, name: str) -> Said:
  return Said(SKIPPED, FILE, f"{program} loads it; no vectors to compare with", "", (name,))


def _ids(tokenizer: Any) -> Callable[[Item], list[int]]:
  return lambda item: tokenizer(item.text, truncation=True, max_length=item.limit)["input_ids"]


def _transformers(s: Subject, found: Sequence[Item]) -> Iterator[Said]:
  import torch
  from transformers import AutoModel, AutoTokenizer

  program = _program(TRANSFORMERS)
  options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": s.is_remote}
  model, report = AutoModel.from_pretrained(
    s.path, torch_dtype=torch.float32, output_loading_info=True, **options
  )
  if invented := sorted(report["missing_keys"]):
    text = f"{program} invents {len(invented)} tensors, first {invented[0]}"
    yield Said(ERROR, "config.json", text, AGAIN, (TRANSFORMERS,))
    return
  tokenizer = AutoTokenizer.from_pretrained(s.path, **options)
  if not found:
    yield _only_loaded(program, TRANSFORMERS)
    return

  def last(item: Item) -> np.ndarray:
    with torch.no_grad():
      states = model(input_ids=torch.tensor([item.ids])).last_hidden_state
    vector = states[0, -1, : len(item.vector)].numpy()
    return vector / np.linalg.norm(vector)

  vectors = lambda: [last(item) for item in found]  # noqa: E731
  yield from compare(found, TRANSFORMERS, program, _ids(tokenizer), vectors, EXACT)
