"""Writes the Hugging Face folder of one cut of a trained model.

The layout is the one that sentence-transformers 5.1 to 6.2, transformers 4.51 to 5, TEI, vLLM and
llama.cpp all read; where it looks old-fashioned, a newer spelling fails in one of them.
"""

import dataclasses
import hashlib
import json
import math
import os
import pathlib
import shutil
import struct
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import ml_dtypes  # noqa: F401  (gives numpy the name bfloat16)
import numpy as np

from mlembed_jax import __version__, matryoshka
from mlembed_jax.config import flatten
from mlembed_jax.config_fields import Config
from mlembed_jax.data.tokenizer import PREFIX, QUERY, Tokenizer
from mlembed_jax.errors import ExportError, LoadError
from mlembed_jax.families import FAMILIES
from mlembed_jax.files import (
  digests,
  replace_folder,
  storage_errors,
  write_json,
  write_safetensors,
  write_text,
)
from mlembed_jax.hf import (
  config_files,
  gguf_file,
  onnx_graph,
  own_file,
  param_mapping,
  parity,
  stored_ranges,
)
from mlembed_jax.hf.card import card
from mlembed_jax.hf.checks import examine
from mlembed_jax.hf.checks.finding import ERROR
from mlembed_jax.hf.config_files import GGUF_TYPES, Forms, Variant
from mlembed_jax.hf.extras import require
from mlembed_jax.hf.factors import FACTORS
from mlembed_jax.hf.file_names import (
  BERT,
  CARD,
  CONFIG,
  INDEX,
  PROMPTS,
  TOKENIZER,
  TOKENIZER_CONFIG,
  WEIGHTS,
)
from mlembed_jax.hf.own_file import OwnFile, TrimmedVocabulary
from mlembed_jax.hf.variants import variant_name
from mlembed_jax.matryoshka import Slice
from mlembed_jax.models.encoder import parameter_count
from mlembed_jax.workdir import Run, StepScores

MAX_FILE_BYTES = 5_000_000_000
TEMPLATE = PREFIX.format(instruction="{task}") + QUERY  # of prompts
DTYPE_CODES = {"bfloat16": "BF16", "float32": "F32"}  # numpy -> safetensors


@dataclasses.dataclass(frozen=True)
class TrainedModel:
  """A run at one step: all that its folders are written from, whichever way they are cut."""

  run: Run
  step: int
  params: Mapping[str, Any]  # the whole trained tree
  tokenizer: Tokenizer
  evaluation: StepScores | None = None  # the held-out scores of the step
  sample: Sequence[Sequence[int]] = ()  # token ids of training texts, for ranges of int8 vectors
  trimmed: TrimmedVocabulary | None = None  # of the vocabulary; None: all of it


def export_folder(
  out: pathlib.Path,
  trained: TrainedModel,
  cut: Slice,
  *,
  name: str | None = None,
  force: bool = False,
  forms: Forms = Forms(),  # noqa: B008  (frozen)
) -> pathlib.Path:
  """Returns `out`, the complete folder of a trained model that is cut to `cut`.

  A previous export at `out` is replaced at the end, by renaming. Call it outside of any mesh: one
  device computes the parity vectors.

  Args:
    out: folder to write.
    trained: the whole model.
    cut: sizes to keep.
    name: of the model; None: export.name and what is cut.
    force: allows sizes that were not trained; the card then says so.
    forms: of the weights.

  Raises:
    ExportError: `out` holds something else, a size was not trained, the tokenizer does not fit
      the table or a form of the weights, a package that writes one is not installed, a weight is
      not finite, or a reader of such folders would fail.
  """
  out = out.absolute()
  checked = check_variant(trained.run, trained.step, cut, name, force, forms)
  variant = dataclasses.replace(checked, trimmed=trained.trimmed)
  spec = config_files.tokenizer_spec(trained.tokenizer, trained.run.config.model)
  if forms.gguf:
    gguf_file.check(variant.body, spec)
  check_target(out)
  temporary = out.with_name(f".{out.name}.new")
  shutil.rmtree(temporary, ignore_errors=True)  # of an export that was killed
  try:
    temporary.mkdir()
  except OSError as error:
    raise ExportError(
      f"{out} cannot be written: {error.strerror}; choose another folder"
    ) from error
  try:
    _write(temporary, variant, trained, spec)
    _check(temporary)
    replace_folder(temporary, out)
  finally:
    shutil.rmtree(temporary, ignore_errors=True)
  return out


def check_variant(
  run: Run,
  step: int,
  cut: Slice,
  name: str | None = None,
  force: bool = False,
  forms: Forms = Forms(),  # noqa: B008  (frozen)
) -> Variant:
  """Returns what a folder will hold.

  Raises:
    ExportError: a size is beyond the model, or was not trained (allowed with `force`); factors are
      asked of a table that has none; or a package that writes one of the forms is not installed.
  """
  model = run.config.model
  _check_forms(forms, model.rank)
  full = {"rank": model.rank, "depth": model.layers, "dim": model.width}
  asked = dataclasses.asdict(cut)
  sizes = {axis: full[axis] if size is None else size for axis, size in asked.items()}
  really_cut = {axis: size for axis, size in sizes.items() if size != full[axis]}
  name = name or variant_name(run.config.export.name, Slice(**really_cut), forms)
  variant = Variant(
    name, run, step, depth=sizes["depth"], dim=sizes["dim"], rank=sizes["rank"], forms=forms
  )
  exists = all(1 <= size < full[axis] for axis, size in really_cut.items())
  if variant.untrained and not (exists and force):
    way_out = "choose a trained size; --force allows it" if exists else "the model has no such size"
    raise ExportError("; ".join(variant.untrained) + f" ({way_out})")
  return variant


def _check_forms(forms: Forms, rank: int) -> None:
  if forms.factors and not rank:
    raise ExportError("uv: the token table of this model was never factorised")
  if unknown := [kind for kind in forms.gguf if kind not in GGUF_TYPES]:
    raise ExportError(f"gguf: {unknown[0]!r} is no type; choose {', '.join(GGUF_TYPES)}")
  if forms.onnx:
    require("onnx", "onnx")
  if forms.gguf:
    require("gguf", "gguf")


def check_target(out: pathlib.Path) -> None:
  """Makes the parent of `out`.

  Raises:
    ExportError: `out` is neither free nor empty nor a previous export alone, or is not writable.
  """
  try:
    out.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(out.parent, os.W_OK):
      raise PermissionError(f"{out.parent} is not writable")
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
      return
    ours = own_file.listed_files(out)
  except (OSError, LoadError) as error:
    raise ExportError(f"{out}: {error}; choose another folder") from error
  if not ours:
    raise ExportError(f"{out} exists and is not an export of ours; choose another")
  files = {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()}
  if foreign := sorted(files - ours):
    raise ExportError(
      f"{out}: an export of ours, but {foreign[0]} was added to it and would be lost; "
      "choose another folder"
    )


def _write(
  folder: pathlib.Path, variant: Variant, trained: TrainedModel, spec: Mapping[str, Any]
) -> None:
  tokenizer, cut = trained.tokenizer, Slice(rank=variant.rank or None, depth=variant.depth)
  _write_weights(folder, variant, matryoshka.slice_params(trained.params, cut))
  if variant.forms.factors:
    family = FAMILIES[variant.body.family]
    for file, code in config_files.remote_code(family).items():
      write_text(folder / file, code)
  prompts = config_files.prompts_of(variant.run)
  write_json(folder / CONFIG, config_files.model_config(variant, tokenizer, spec))
  for path, value in small_files(variant, tokenizer, spec).items():
    write_json(folder / path, value)
  # Read back from the folder, the weights are held once more, in float32.
  stored = parity.load(folder, variant.body)
  write_json(folder / parity.FILE, parity.items(stored, variant, tokenizer, prompts["query"]))
  ranges_file = stored_ranges.write(folder, variant, stored, trained.sample)
  if variant.forms.onnx:
    onnx_graph.write(folder, variant, stored)
  gguf = [gguf_file.write(folder, variant, stored, tokenizer, spec, k) for k in variant.forms.gguf]
  text = card(variant, tokenizer.pooled_token, prompts, trained.evaluation, ranges_file, gguf)
  write_text(folder / CARD, text)
  own_file.write(folder, _own_file(folder, variant, tokenizer, ranges_file, gguf))


def small_files(variant: Variant, tokenizer: Tokenizer, spec: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the content of the files that say how texts become vectors, by path."""
  return {
    TOKENIZER: spec,
    TOKENIZER_CONFIG: config_files.tokenizer_config(variant, tokenizer, spec),
    PROMPTS: config_files.sentence_transformers_config(config_files.prompts_of(variant.run)),
    BERT: config_files.sentence_bert_config(variant),
    **config_files.modules(variant),
  }


def _check(folder: pathlib.Path) -> None:
  """Raises ExportError with all errors of mlembed_jax.doctor; vectors are not compared."""
  errors = [f for f in examine.examine(folder) if f.level == ERROR]
  if errors:
    lines = [f"{f.check} {f.file}: {f.found}. {f.remedy}" for f in errors]
    raise ExportError("nothing was written, as readers would fail:\n" + "\n".join(lines))


def _write_weights(folder: pathlib.Path, variant: Variant, params: Mapping[str, Any]) -> None:
  dtype = np.dtype(variant.run.config.export.dtype)
  shards = _shards(param_mapping.tensors(variant.body), dtype.itemsize)
  placed = {}
  for i, tensors in enumerate(shards, 1):
    file = f"model-{i:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else WEIGHTS
    _write_tensors(folder / file, tensors, params, dtype)
    placed |= {t.name: file for t in tensors}
  if len(shards) > 1:
    size = parameter_count(variant.body) * dtype.itemsize
    write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": placed})
  if variant.table_form == "merged":
    # They are float32 whatever the weights are: rounded factors multiply to another table.
    _write_small(folder / FACTORS, {"U": params["table"], "V": params["up"]})
  if variant.dim < variant.body.width:
    identity = np.eye(variant.dim, variant.body.width)
    _write_small(folder / "2_Dense" / WEIGHTS, {"linear.weight": identity})


def _shards(
  tensors: Iterable[param_mapping.Tensor], itemsize: int
) -> list[list[param_mapping.Tensor]]:
  shards: list[list[param_mapping.Tensor]] = [[]]
  room = MAX_FILE_BYTES
  for t in tensors:
    size = math.prod(t.shape) * itemsize
    if size > room and shards[-1]:
      shards.append([])
      room = MAX_FILE_BYTES
    shards[-1].append(t)
    room -= size
  return shards


def _write_tensors(
  path: pathlib.Path,
  tensors: Sequence[param_mapping.Tensor],
  params: Mapping[str, Any],
  dtype: np.dtype,
) -> None:
  """Writes a safetensors file one tensor at a time; the library's writer takes all at once."""
  header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
  end = 0
  for t in tensors:
    start, end = end, end + math.prod(t.shape) * dtype.itemsize
    entry = {"dtype": DTYPE_CODES[dtype.name], "shape": t.shape, "data_offsets": [start, end]}
    header[t.name] = entry
  text = json.dumps(header).encode()
  text += b" " * (-len(text) % 8)  # the data starts at a multiple of 8
  with storage_errors(path), path.open("wb") as file:
    file.write(struct.pack("<Q", len(text)) + text)
    for t in tensors:
      # Not `tofile`, whose error on a full disk has no number that tells it from others.
      file.write(np.ascontiguousarray(_stored(params, t, dtype)).reshape(-1).view(np.uint8).data)


def _stored(params: Mapping[str, Any], t: param_mapping.Tensor, dtype: np.dtype) -> np.ndarray:
  """Returns one tensor as the folder holds it; a factorised table is multiplied in float32."""
  leaf = param_mapping.leaf(params, t.path)
  array = np.asarray(leaf if t.layer is None else leaf[t.layer], np.float32)
  if t.name == param_mapping.TABLE[1] and "up" in params:
    array = array @ np.asarray(params["up"], np.float32)
  tensor = np.ascontiguousarray(t.to_hf(array), dtype)
  if damage := np.count_nonzero(~np.isfinite(tensor)):
    raise ExportError(
      f"{t.name}: {damage} values are NaN or infinite; the run diverged, export an earlier step"
    )
  return tensor


def _write_small(path: pathlib.Path, tensors: Mapping[str, Any]) -> None:
  write_safetensors(path, {name: np.asarray(a, np.float32) for name, a in tensors.items()})


def _own_file(
  folder: pathlib.Path,
  variant: Variant,
  tokenizer: Tokenizer,
  ranges_file: str | None,
  gguf: Sequence[str],
) -> OwnFile:
  """Returns the content of mlembed.json, with digests of all other files, which must be there."""
  config, axes = variant.run.config, variant.axes
  return OwnFile(
    name=variant.name,
    library=own_file.Library("mlembed_jax", __version__),
    base_model=own_file.BaseModel(pathlib.PurePath(config.train.init_from).name or None),
    body=_body(variant),
    dims=own_file.AxisSizes(axes.dims, variant.dim),
    exits=own_file.AxisSizes(axes.exits, variant.depth),
    table=_table(variant),
    pooling=_pooling(config, tokenizer),
    prompt_template="" if config_files.is_copy(variant.run) else TEMPLATE,
    training=_training(variant),
    files={name: own_file.Digest(found) for name, found in digests(folder).items()},
    ranges_file=ranges_file,
    onnx=variant.forms.onnx,
    gguf=tuple(gguf),
    vocabulary=variant.trimmed,
  )


def _body(variant: Variant) -> own_file.Body:
  body = variant.body
  return own_file.Body(
    family=body.family,
    hidden=body.width,
    layers_trained=variant.run.config.model.layers,
    layers=body.layers,
    parameters=parameter_count(body),
  )


def _table(variant: Variant) -> own_file.Table:
  return own_file.Table(
    form=variant.table_form,
    rank_trained=variant.run.config.model.rank or None,
    ranks=variant.axes.ranks,
    rank_exported=variant.rank or None,
    uv_file=FACTORS if variant.table_form == "merged" else None,
  )


def _pooling(config: Config, tokenizer: Tokenizer) -> own_file.Pooling:
  return own_file.Pooling(
    kind="last",
    token=tokenizer.pooled_token,
    token_id=tokenizer.pooled_id,
    trained_length=config.data.lengths[-1],
    max_seq_length=config.export.max_seq_length,
  )


def _training(variant: Variant) -> own_file.Training:
  config = variant.run.config
  if variant.trimmed:  # the run itself has all rows
    model = dataclasses.replace(config.model, vocab=variant.trimmed.rows_trained)
    config = dataclasses.replace(config, model=model)
  return own_file.Training(
    recipe=variant.recipe,
    step=variant.step,
    config_sha256=_config_sha256(config),
    manifest_sha256=variant.run.fingerprint,
    switches=config_files.switches(config),
  )


def _config_sha256(config: Config) -> str:
  return hashlib.sha256(json.dumps(flatten(config), sort_keys=True).encode()).hexdigest()
