"""Checks of the tensors of a folder against what its files say of them."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from mlembed_jax.errors import LoadError
from mlembed_jax.hf import factors, param_mapping
from mlembed_jax.hf.checks.consumers import Fact
from mlembed_jax.hf.checks.finding import AGAIN, ERROR, OK, SKIPPED, WARNING, File, Finding, Subject
from mlembed_jax.hf.file_names import WEIGHTS
from mlembed_jax.hf.folder import (
  DTYPES,
  Folder,
  Stored,
  open_file,
  open_model_folder,
  read_model,
)
from mlembed_jax.models.encoder import parameter_count

DTYPE_CODES: dict[str, str] = dict(zip(("bfloat16", "float16", "float32"), DTYPES, strict=True))
LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
ACTIVATIONS = ("Identity", "Tanh")  # that TEI knows; vLLM wants the prefix
PREFIX = "torch.nn.modules."


def check_tensors(s: Subject) -> Iterator[Finding]:
  """Exactly the tensors of config.json are stored, finite and in the dtype that it states."""
  try:
    folder = open_model_folder(s.path, read_model(s.path))
  except LoadError as error:
    for line in _lines(error):
      yield Finding(ERROR, File.CONFIG if "E105 config" in line else WEIGHTS, line, AGAIN)
    return
  for file, metadata in sorted({file: m for file, m in s.stored().values()}.items()):
    if metadata.get("format") != "pt":
      found = f"its metadata say format {metadata.get('format')!r}; transformers 4 wants 'pt'"
      yield Finding(ERROR, file, found, AGAIN, Fact.WEIGHTS_METADATA)
  yield from _values(folder, s.config.get("torch_dtype", s.config.get("dtype")))
  yield from _count(s)


def _lines(error: LoadError) -> list[str]:
  """Returns the problems of an error, without the line that says how many follow."""
  lines = str(error).splitlines()
  return lines[1:] or lines


def _values(folder: Folder, dtype: str | None) -> Iterator[Finding]:
  wanted = DTYPE_CODES.get(str(dtype))
  others = [t.name for t, stored in folder.tensors if stored.dtype != wanted]
  if wanted and others:
    found = f"config.json says {dtype}, which {len(others)} tensors are not, first {others[0]}"
    yield Finding(WARNING, WEIGHTS, found, "Let torch_dtype say what is stored.")
  for t, stored in folder.tensors:
    if damage := np.count_nonzero(~np.isfinite(stored.read())):
      found = f"E107 not finite: {t.name} has {damage} NaN or infinite values"
      yield Finding(ERROR, WEIGHTS, found, "Copy the file again, or export an earlier step.")


def _count(s: Subject) -> Iterator[Finding]:
  if s.own and s.own.body.parameters != (count := parameter_count(read_model(s.path))):
    found = f"body.parameters is {s.own.body.parameters:,}, the weights have {count:,}"
    yield Finding(ERROR, File.OWN, found, AGAIN, File.OWN)


def check_depth(s: Subject) -> Iterator[Finding]:
  """config.json has as many layers as the weights, and they end at a trained exit."""
  file, layers = File.CONFIG, s.config.get("num_hidden_layers")
  stored = {int(m[1]) for name in s.stored() if (m := LAYER.search(name))}
  if stored and layers != len(stored):
    found = f"num_hidden_layers is {layers}, the weights have {len(stored)}"
    found += ": sentence-transformers only warns and invents missing layers"
    yield Finding(ERROR, file, found, f"Write {len(stored)}, or copy the weights again.")
  types = s.config.get("layer_types")
  if types is not None and len(types) != layers:
    found = f"layer_types has {len(types)} entries for {layers} layers"
    yield Finding(ERROR, file, found, "Remove the key.", Fact.LAYER_TYPES)
  exits = s.own and s.own.exits
  if exits and exits.exported != layers:
    found = f"exits.exported is {exits.exported}, num_hidden_layers {layers}"
    yield Finding(ERROR, File.OWN, found, AGAIN, File.OWN)
  elif exits and layers not in exits.trained:
    found = f"depth {layers} was not trained; trained: {list(exits.trained)}"
    yield Finding(WARNING, File.OWN, found, "Export a trained depth.")


def check_dimension(s: Subject) -> Iterator[Finding]:
  """An export's cut dimension is a Dense module that keeps the first coordinates, and is stated."""
  width, path = s.config.get("hidden_size"), s.module("Dense")
  config = s.json(f"{path}/config.json")
  out: Any = width
  if path:
    out = config.get("out_features")
    yield from _dense_config(s, f"{path}/config.json", config, width)
    if s.is_export:
      yield from _dense_weights(s, f"{path}/{WEIGHTS}", (out, width))
    found = f"does not apply {path}"
    if s.is_export:
      found += f": keep the first {out} coordinates and normalise again"
    yield Finding(OK, f"{path}/config.json", found, "", Fact.WHOLE_WIDTH)
  exported = s.own.dims.exported if s.own else out
  if exported != out:
    found = f"the modules give {out} coordinates, mlembed.json says {exported}"
    yield Finding(ERROR, File.MODULES, found, AGAIN, Fact.FIRST_COORDINATES)
  listed = s.config.get("matryoshka_dimensions", () if s.own else (out,))
  if (largest := max(listed, default=0)) != out:
    found = f"matryoshka_dimensions is {listed}, the vectors have {out}; vLLM refuses others"
    level = ERROR if largest > out else WARNING  # of a dimension that was not trained
    remedy = "List the trained sizes up to it."
    yield Finding(level, File.CONFIG, found, remedy, Fact.MATRYOSHKA_DIMENSIONS)


def _dense_config(
  s: Subject, file: str, config: Mapping[str, Any], width: Any
) -> Iterator[Finding]:
  if config.get("in_features") != width:
    found = f"in_features is {config.get('in_features')}, hidden_size {width}"
    yield Finding(ERROR, file, found, AGAIN)
  if s.is_export and config.get("bias") is not False:
    yield Finding(ERROR, file, f"bias is {config.get('bias')!r}", "Write false.")
  name = str(config.get("activation_function"))
  if not name.startswith(PREFIX) or name.rpartition(".")[2] not in ACTIVATIONS:
    found = f"activation_function is {name}; TEI and vLLM do not know it"
    remedy = f"Write {PREFIX}linear.Identity."
    yield Finding(ERROR, file, found, remedy, Fact.ACTIVATION_FUNCTION)


def _dense_weights(s: Subject, file: str, shape: Sequence[Any]) -> Iterator[Finding]:
  try:
    stored = open_file(s.path / file)
  except LoadError as error:
    yield Finding(ERROR, file, str(error), AGAIN)
    return
  linear = stored.get("linear.weight")
  if set(stored) != {"linear.weight"} or linear is None or linear.shape != tuple(shape):
    found = f"holds {_shapes(stored)}, expected linear.weight {list(shape)}"
    yield Finding(ERROR, file, found, AGAIN)
    return
  if linear.dtype != "F32":
    yield Finding(WARNING, file, f"linear.weight is {linear.dtype}, expected F32", AGAIN)
  if not np.array_equal(linear.read().astype(np.float32), np.eye(*shape, dtype=np.float32)):
    found = "linear.weight is not the first rows of the identity: the dimension is not only cut"
    yield Finding(ERROR, file, found, AGAIN, Fact.FIRST_COORDINATES)


def _shapes(stored: Mapping[str, Stored]) -> str:
  return ", ".join(f"{name} {list(t.shape)}" for name, t in stored.items()) or "nothing"


def check_factors(s: Subject) -> Iterator[Finding]:
  """The trained factors beside a merged table multiply to it."""
  if not s.own:
    yield Finding(SKIPPED, File.OWN, "says nothing that can be used")
    return
  table = s.own.table
  rank, stored = table.rank_exported, s.config.get(param_mapping.RANK_KEY)
  if table.form == "uv" and stored != rank:
    found = f"{param_mapping.RANK_KEY} is {stored}, mlembed.json says {rank}"
    yield Finding(ERROR, File.CONFIG, found, AGAIN)
  if file := table.uv_file:
    yield from _factors(s, file, rank)


def _factors(s: Subject, file: str, rank: int | None) -> Iterator[Finding]:
  try:
    whole = factors.table(open_model_folder(s.path, read_model(s.path)))
  except LoadError:
    return  # check_tensors says so
  try:
    stored = open_file(s.path / file)
  except LoadError as error:
    yield Finding(ERROR, file, str(error), AGAIN)
    return
  width = s.config["hidden_size"]
  shapes = {name: t.shape for name, t in stored.items()}
  rows = shapes.get("U", (0,))[0]
  if shapes != {"U": (rows, rank), "V": (rank, width)} or not 0 < rows <= len(whole):
    found = f"holds {_shapes(stored)}, expected U [up to {len(whole)}, {rank}], V [{rank}, {width}]"
    yield Finding(ERROR, file, found, AGAIN)
  elif not factors.multiply_to(stored["U"].read(), stored["V"].read(), whole):
    found = "U @ V is not the token table of the weights, which changed since"
    yield Finding(ERROR, file, found, "Remove it, or export the folder again.")
