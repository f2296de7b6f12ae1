"""The vectors of sentence-transformers and transformers, which load the folder where installed.

The only module of the package that imports torch, and only inside of its functions.
"""

import dataclasses
import importlib.metadata
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from mlembed_jax.hf import config_files, recipe
from mlembed_jax.hf.checks.finding import AGAIN, ERROR, OK, SKIPPED, WARNING, File, Finding, Subject
from mlembed_jax.hf.checks.vectors import EXACT, Item, compare, items
from mlembed_jax.hf.parity import TOLERANCE

ST, TRANSFORMERS = "sentence-transformers", "transformers"  # names of the distributions, too

Load = Callable[[Subject, Sequence[Item]], Iterator[Finding]]


def sentence_transformers(s: Subject) -> Iterator[Finding]:
  """sentence-transformers gives the vectors of parity.json, in float32 and as it loads."""
  yield from _where_installed(s, ST, ("sentence_transformers", "torch"), _sentence_transformers)


def transformers(s: Subject) -> Iterator[Finding]:
  """transformers finds all its weights and gives the vectors of parity.json."""
  yield from _where_installed(s, TRANSFORMERS, ("transformers", "torch"), _transformers)


def foreign_code(s: Subject) -> list[str]:
  """Returns the files of a folder that are code, or name some, that our exports do not hold.

  Loaders that trust a folder also run code below it, of other repositories, of any package.
  """
  known = config_files.remote_code(s.family) if s.is_remote and s.family else {}
  found = sorted(path.relative_to(s.path).as_posix() for path in s.path.rglob("*.py"))
  foreign = [f for f in found if (s.path / f).read_text(encoding="utf-8") != known.get(f)]
  for file in (File.CONFIG, File.TOKENIZER_CONFIG):
    named = s.json(file).get("auto_map") or {}
    values = named.values() if isinstance(named, dict) else [named]
    if any(str(value).partition(".")[0] + ".py" not in known for value in values):
      foreign.append(file)
  if any(not str(m.get("type")).startswith("sentence_transformers.") for m in s.modules()):
    foreign.append(File.MODULES)
  return foreign


def _where_installed(
  s: Subject, name: str, modules: Sequence[str], load: Load
) -> Iterator[Finding]:
  if absent := [m for m in modules if not importlib.util.find_spec(m)]:
    found = f"not loaded: {absent[0]} is not installed"
    yield Finding(SKIPPED, "", found)
  elif foreign_code(s):
    yield Finding(SKIPPED, "", "not loaded: the folder holds code that is not ours")
  else:
    try:
      yield from load(s, items(s))
    except Exception as error:  # of any kind, from any depth of two libraries
      reason = f"{type(error).__name__}: {error}".splitlines()[0]
      found = f"{_program(name)} does not load the folder: {reason}"
      yield Finding(ERROR, "", found, AGAIN)


def _program(name: str) -> str:
  return f"{name} {importlib.metadata.version(name)}"


def _sentence_transformers(s: Subject, found: Sequence[Item]) -> Iterator[Finding]:
  import torch

  program = _program(ST)
  yield from _encode(s, found, program, {"torch_dtype": torch.float32}, EXACT)
  if s.config.get("torch_dtype", s.config.get("dtype")) != "float32":
    for said in _encode(s, found, f"{program} as loaded", {}, TOLERANCE["bfloat16"]):
      # The folder is right: version 6 computes in the stored dtype, and this is what that costs.
      remedy = "Load it with model_kwargs={'torch_dtype': torch.float32}."
      yield dataclasses.replace(said, level=WARNING, remedy=remedy) if said.level == ERROR else said


def _encode(
  s: Subject,
  found: Sequence[Item],
  program: str,
  options: dict[str, Any],
  tolerance: dict[str, float],
) -> Iterator[Finding]:
  from sentence_transformers import SentenceTransformer

  model = SentenceTransformer(
    str(s.path),
    device="cpu",
    local_files_only=True,
    trust_remote_code=s.is_remote,
    model_kwargs=options,
  )
  if not found:
    yield _only_loaded(program)
    return

  def encode(item: Item) -> np.ndarray:
    model.max_seq_length = item.limit
    # Of an export, the module Normalize is examined, too.
    options: dict[str, Any] = {"prompt": "", "normalize_embeddings": not s.is_export}
    return np.asarray(model.encode(item.text, show_progress_bar=False, **options))

  ids = _ids(model.tokenizer)
  yield from compare(found, program, ids, lambda: [encode(item) for item in found], tolerance)


def _of_last_token(s: Subject) -> bool:
  """Returns whether vectors are cut states, which a program without modules can compute."""
  if s.is_export:
    return True
  found = recipe.read(s.path)
  return found.pooling == recipe.LAST and not found.modules and not found.lower_case


def _only_loaded(program: str) -> Finding:
  return Finding(OK, "", f"{program} loads it; no vectors to compare with")


def _ids(tokenizer: Any) -> Callable[[Item], list[int]]:
  return lambda item: tokenizer(item.text, truncation=True, max_length=item.limit)["input_ids"]


def _transformers(s: Subject, found: Sequence[Item]) -> Iterator[Finding]:
  import torch
  from transformers import AutoModel, AutoTokenizer

  program = _program(TRANSFORMERS)
  options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": s.is_remote}
  model, report = AutoModel.from_pretrained(
    s.path, torch_dtype=torch.float32, output_loading_info=True, **options
  )
  if invented := sorted(report["missing_keys"]):
    text = f"{program} invents {len(invented)} tensors, first {invented[0]}"
    yield Finding(ERROR, File.CONFIG, text, AGAIN)
    return
  tokenizer = AutoTokenizer.from_pretrained(s.path, **options)
  if not found or not _of_last_token(s):
    yield _only_loaded(program)
    return

  def last(item: Item) -> np.ndarray:
    with torch.no_grad():
      states = model(input_ids=torch.tensor([item.ids])).last_hidden_state
    vector = states[0, -1, : len(item.vector)].numpy()
    return vector / np.linalg.norm(vector)

  vectors = lambda: [last(item) for item in found]  # noqa: E731
  yield from compare(found, program, _ids(tokenizer), vectors, EXACT)
