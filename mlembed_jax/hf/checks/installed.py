"""The vectors of other programs, which load the folder where they are installed.

The only module of the package that imports torch, and only inside of its functions.
"""

import dataclasses
import importlib.metadata
import importlib.util
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from mlembed_jax.hf import config_files, onnx_graph, recipe
from mlembed_jax.hf.checks.finding import AGAIN, ERROR, OK, SKIPPED, WARNING, File, Finding, Subject
from mlembed_jax.hf.checks.vectors import EXACT, Item, compare, items
from mlembed_jax.hf.parity import TOLERANCE

ST, TRANSFORMERS = "sentence-transformers", "transformers"  # names of the distributions, too
ONNX, LLAMA = "ONNX Runtime", "llama.cpp"
# Of weights that have 8 bits: the least of 600 texts in 50 languages was 0.9976 (SmolLM2-135M).
EIGHT_BITS = {"min_cos": 0.98}
# llama.cpp composes no letters, and refuses what it would have to cut; keys and values of attention
# are float16 there.
NOT_BY_LLAMA = ("decomposed", "long", "truncated")
LLAMA_TOLERANCE = {"min_cos": 0.9999}
LLAMA_ROOM = 64  # tokens that it may take beyond ours

Load = Callable[[Subject, Sequence[Item]], Iterator[Finding]]


def sentence_transformers(s: Subject) -> Iterator[Finding]:
  """sentence-transformers gives the vectors of parity.json, in float32 and as it loads."""
  yield from _where_installed(s, ST, ("sentence_transformers", "torch"), _sentence_transformers)


def transformers(s: Subject) -> Iterator[Finding]:
  """transformers finds all its weights and gives the vectors of parity.json."""
  yield from _where_installed(s, TRANSFORMERS, ("transformers", "torch"), _transformers)


def onnxruntime(s: Subject) -> Iterator[Finding]:
  """ONNX Runtime gives the vectors of parity.json from onnx/model.onnx."""
  if not s.has(onnx_graph.FILE):
    remedy = "export --variants onnx writes one"
    yield Finding(SKIPPED, "", f"there is no {onnx_graph.FILE}; {remedy}")
  else:
    yield from _where_installed(s, ONNX, ("onnxruntime",), _onnxruntime, runs_code=False)


def llama_cpp(s: Subject) -> Iterator[Finding]:
  """llama.cpp gives the vectors of parity.json from each GGUF file."""
  if not any(s.path.glob("*.gguf")):
    yield Finding(SKIPPED, "", "there is no GGUF file; export --gguf q8_0 writes one")
  else:
    yield from _where_installed(s, LLAMA, ("xllamacpp",), _llama_cpp, runs_code=False)


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
  s: Subject, name: str, modules: Sequence[str], load: Load, runs_code: bool = True
) -> Iterator[Finding]:
  if absent := [m for m in modules if not importlib.util.find_spec(m)]:
    found = f"not loaded: {absent[0]} is not installed"
    yield Finding(SKIPPED, "", found)
  elif runs_code and foreign_code(s):
    yield Finding(SKIPPED, "", "not loaded: the folder holds code that is not ours")
  else:
    try:
      yield from load(s, items(s))
    except Exception as error:  # of any kind, from any depth of two libraries
      reason = f"{type(error).__name__}: {error}".splitlines()[0]
      found = f"{_program(modules[0])} does not load the folder: {reason}"
      yield Finding(ERROR, "", found, AGAIN)


def _program(module: str) -> str:
  """Returns the distribution of a module and its version."""
  name = module.replace("_", "-")
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


def _onnxruntime(s: Subject, found: Sequence[Item]) -> Iterator[Finding]:
  from onnxruntime import InferenceSession

  session, program = InferenceSession(s.path / onnx_graph.FILE), _program("onnxruntime")
  if not found:
    yield _only_loaded(program)
    return

  def vector(item: Item) -> np.ndarray:
    ids = np.array([item.ids], np.int64)
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    return np.asarray(session.run(["sentence_embedding"], feeds)[0])[0]

  exact = s.own is None or s.own.onnx != config_files.INT8
  vectors = lambda: [vector(item) for item in found]  # noqa: E731
  # It reads ids: their tokenizer is that of the folder.
  yield from compare(found, program, lambda i: i.ids, vectors, EXACT if exact else EIGHT_BITS)


def _llama_cpp(s: Subject, found: Sequence[Item]) -> Iterator[Finding]:
  for path in sorted(s.path.glob("*.gguf")):
    yield from _gguf(path, [item for item in found if item.name not in NOT_BY_LLAMA])


def _gguf(path: pathlib.Path, found: Sequence[Item]) -> Iterator[Finding]:
  import xllamacpp as compiled

  xllamacpp: Any = compiled  # has no types
  params = xllamacpp.CommonParams()
  params.model.path = str(path)
  params.embedding, params.n_parallel, params.verbosity = True, 1, 0
  tokens = max((len(item.ids) for item in found), default=0) + LLAMA_ROOM
  params.n_ctx = params.n_batch = params.n_ubatch = tokens
  server, program = xllamacpp.Server(params), f"{_program('xllamacpp')}, {path.name}"
  if not found:
    yield _only_loaded(program)
    return

  def vector(item: Item) -> np.ndarray:
    answer = server.handle_embeddings({"input": item.text, "model": path.name})
    return np.asarray(answer["data"][0]["embedding"], np.float32)[: len(item.vector)]

  tolerance = EIGHT_BITS if path.stem.endswith("Q8_0") else LLAMA_TOLERANCE
  vectors = lambda: [vector(item) for item in found]  # noqa: E731
  # Ids are its own; a text that it splits in another way has another vector.
  yield from compare(found, program, lambda i: i.ids, vectors, tolerance)
