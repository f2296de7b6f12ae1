"""Hugging Face folders from a workdir, without flags."""

import dataclasses
import os
import pathlib
import tempfile
from collections.abc import Sequence
from typing import Any

from mlembed_jax.data import catalog, token_use, vocabulary
from mlembed_jax.data.catalog import Catalog
from mlembed_jax.data.languages import language_key
from mlembed_jax.data.records import TRAIN
from mlembed_jax.data.sample import sample_ids
from mlembed_jax.data.store import open_split
from mlembed_jax.data.token_use import TokenUse
from mlembed_jax.data.tokenizer import Tokenizer
from mlembed_jax.devices.start import start_devices
from mlembed_jax.errors import ConfigError, DataError
from mlembed_jax.hf import adapter, push, stored_ranges
from mlembed_jax.hf.config_files import Forms
from mlembed_jax.hf.export import TrainedModel, check_target, check_variant, export_folder
from mlembed_jax.hf.folder import ids_of_tokens, resolve
from mlembed_jax.hf.trim import trim
from mlembed_jax.hf.variants import Parts, parse_variant
from mlembed_jax.matryoshka import Slice
from mlembed_jax.training import frozen
from mlembed_jax.training.saved import chosen_step, load_newest_params, load_trained, read_newest
from mlembed_jax.workdir import Run, StepScores

LOST = 0.1  # of an adapter is worth a warning


def export_model(
  workdir: str | os.PathLike[str],
  out: str | os.PathLike[str],
  cut: Slice | None = None,
  variants: str | Sequence[str] = (),
  *,
  step: int | str | None = None,
  gguf: str | Sequence[str] = (),
  keep_texts: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] = (),
  keep_tokens: int | None = None,
  name: str | None = None,
  force: bool = False,
  push_to: str | None = None,
  private: bool = False,
  dry_run: bool = False,
) -> list[pathlib.Path]:
  """Writes a checkpoint of a run as Hugging Face folders, and returns their paths.

  Args:
    workdir: the folder of the run.
    out: the folder to write; an earlier export there is replaced.
    cut: depth, rank and dimension of that folder; None: all.
    variants: one or more folders beside it, OUT-VARIANT, such as `d64-l2-r128`, `uv` or
      `onnx-int8`.
    step: of the checkpoint, or "best": the best mean of held-out scores. None: the newest.
    gguf: `f32`, `f16` or `q8_0`: GGUF files for llama.cpp in each of the folders.
    keep_texts: files of texts, of their column `text`, whose tokens variants with `v` keep, beside
      those of the languages that they name.
    keep_tokens: that these variants keep at most, of which the rarest are left out.
    name: of the model. None: `export.name` and what is cut.
    force: allow sizes that were not trained.
    push_to: hf:ORG/NAME, where the folders are put, each under the suffix of its variant.
    private: whether repositories that are made are private.
    dry_run: list what would be put there, instead.

  Raises:
    ConfigError: the workdir has no run or no checkpoint, or no variant reads `keep_texts` or
      `keep_tokens`. Nothing is written then.
    ExportError: a variant cannot be parsed, a size is beyond the model or was not trained, or a
      folder that is written would replace something else (nothing is written then); or see
      `export_folder`.
  """
  start_devices()
  workdir, out = pathlib.Path(workdir).absolute(), pathlib.Path(out).absolute()
  wanted = _wanted(cut or Slice(), _listed(variants), _listed(gguf))
  languages_of = (parts.languages for parts in wanted.values())
  trims = list(dict.fromkeys(found for found in languages_of if found is not None))
  if (keep_texts or keep_tokens) and not trims:
    raise ConfigError("keep_texts, keep_tokens: no variant has v, which keeps tokens; name one")
  repositories = [push.repository(push_to, suffix) for suffix in wanted] if push_to else []
  run = Run.load(workdir)
  for suffix, parts in wanted.items():  # before the first is written
    check_variant(run, 0, parts.cut, force=force, forms=parts.forms)
    check_target(out.with_name(out.name + suffix))
  for repository in () if dry_run else repositories:
    push.check(repository)
  run.check_tokenizer(workdir)
  steps = None if step is None else [chosen_step(workdir, step)]
  step, params = load_newest_params(workdir, steps)
  say_rounding(run, params)
  params = frozen.merged(run.config.model, params)
  tokenizer = Tokenizer(workdir / "tokenizer.json", run.config.data.pooled_token)
  sample = _sample(run, workdir, tokenizer)
  trained = TrainedModel(run, step, params, tokenizer, StepScores.load(workdir, step), sample)
  with tempfile.TemporaryDirectory() as temporary:
    trimmed = _trimmed(trained, trims, _listed(keep_texts), keep_tokens, workdir, temporary)
    models = {None: trained, **trimmed}
    folders = [
      _write(out, suffix, models[parts.languages], parts, name, force)
      for suffix, parts in wanted.items()
    ]
  if repositories:
    _publish(folders, repositories, private, dry_run)
  return folders


def export_adapter(
  workdir: str | os.PathLike[str], out: str | os.PathLike[str], *, step: int | str | None = None
) -> pathlib.Path:
  """Writes the adapter of a checkpoint alone, and returns its folder, which peft loads.

  Args:
    workdir: the folder of the run.
    out: the folder to write, which is not there yet or empty.
    step: of the checkpoint, or "best"; None: the newest.

  Raises:
    ConfigError: the run trains other parameters, too, has no adapter, or has other tokens than the
      folder that it started from; or it has no checkpoint.
    LoadError: that folder cannot be read.
    ExportError: the folder holds something, or cannot be written.
  """
  start_devices()
  workdir, out = pathlib.Path(workdir).absolute(), pathlib.Path(out).absolute()
  run = Run.load(workdir)
  _check_adapter_alone(run, workdir)
  adapter.check_target(out)
  run.check_tokenizer(workdir)
  tokenizer = Tokenizer(workdir / "tokenizer.json", run.config.data.pooled_token)
  base = resolve(run.config.train.init_from)
  if ids_of_tokens(base, tokenizer) is not None:
    raise ConfigError(f"adapter: the run has other tokens than {base}; export the whole model")
  steps = None if step is None else [chosen_step(workdir, step)]
  step, params = read_newest(workdir, lambda at: load_trained(workdir, at), steps)
  folder = adapter.export_adapter_folder(out, TrainedModel(run, step, params, tokenizer))
  print(f"exported the adapter of step {step} to {folder}", flush=True)
  return folder


def _check_adapter_alone(run: Run, workdir: pathlib.Path) -> None:
  model = run.config.model
  if not all(map(frozen.is_adapter, frozen.trained_paths(run.config))):
    raise ConfigError(
      f"adapter: {workdir} trains other parameters than an adapter (model.lora.rank = "
      f"{model.lora.rank}); export the whole model"
    )
  if model.rank:
    raise ConfigError(
      f"adapter: the run has a token table of rank {model.rank} in place of that of "
      f"{run.config.train.init_from}; an adapter alone needs model.rank 0. Export the whole model"
    )


def say_rounding(run: Run, params: Any) -> None:
  """Prints how much of an adapter is lost where it is added to weights of few digits."""
  dtype = run.config.export.dtype
  if run.config.model.lora.rank and dtype != "float32":
    lost = frozen.lost_by_rounding(run.config.model, params, dtype)
    level = "WARNING" if lost > LOST else "note"
    print(
      f"{level}: rounded to {dtype}, the weights differ by {lost:.0%} of what the adapter adds to "
      "them; export.dtype=float32 keeps it, and so does --adapter",
      flush=True,
    )


def _write(
  out: pathlib.Path,
  suffix: str,
  trained: TrainedModel,
  parts: Parts,
  name: str | None,
  force: bool,
) -> pathlib.Path:
  """Returns the folder of a variant, which it writes."""
  if trained.trimmed:
    name = name or trained.run.config.export.name
  folder = export_folder(
    out.with_name(out.name + suffix),
    trained,
    parts.cut,
    name=name and name + suffix,
    force=force,
    forms=parts.forms,
  )
  print(f"exported step {trained.step} to {folder}", flush=True)
  return folder


def _publish(
  folders: Sequence[pathlib.Path], repositories: Sequence[str], private: bool, dry_run: bool
) -> None:
  """Puts each folder into its repository, or lists what would be put there."""
  for folder, repository in zip(folders, repositories, strict=True):
    put = push.listing(folder, repository) if dry_run else push.push(folder, repository, private)
    print(put, flush=True)


def _wanted(cut: Slice, variants: Sequence[str], gguf: Sequence[str]) -> dict[str, Parts]:
  """Returns what each folder is to hold, by its suffix."""
  found = {"": Parts(cut, Forms()), **{f"-{name}": parse_variant(name) for name in variants}}
  return {
    suffix: parts._replace(forms=dataclasses.replace(parts.forms, gguf=tuple(gguf)))
    for suffix, parts in found.items()
  }


def _listed(names: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> list[str]:
  return [os.fspath(n) for n in ([names] if isinstance(names, str | os.PathLike) else names)]


def _trimmed(
  trained: TrainedModel,
  trims: Sequence[tuple[str, ...]],
  keep_texts: Sequence[str],
  keep_tokens: int | None,
  workdir: pathlib.Path,
  temporary: str,
) -> dict[tuple[str, ...], TrainedModel]:
  """Returns the models of variants with v by the languages that they name.

  They have the tokens that training rows in these languages need, and texts of files; without
  both, all training rows. `temporary` takes their tokenizers.

  Raises:
    DataError: the tokenizer cannot be cut, a file cannot be read, or no row has such a language.
  """
  if not trims:
    return {}
  try:
    vocabulary.check(trained.tokenizer.spec, keep_tokens)  # before any text is read
    files = [token_use.of_file(trained.tokenizer, n, "text", "keep_texts") for n in keep_texts]
    found = {}
    for languages in trims:
      rows = [_use_of_rows(trained, languages, workdir)] if languages or not files else []
      use, folder = token_use.total([*files, *rows]), pathlib.Path(tempfile.mkdtemp(dir=temporary))
      found[languages] = trim(trained, use, (*languages, *keep_texts), keep_tokens, folder)
  except DataError as error:
    raise DataError(f"variants with v, keep_texts, keep_tokens: {error}") from error
  return found


def _use_of_rows(
  trained: TrainedModel, languages: Sequence[str], workdir: pathlib.Path
) -> TokenUse:
  """Returns the use of tokens in training rows; raises DataError where they cannot be read."""
  run, scheme = trained.run, trained.run.config.data.language_key
  opened = _training_rows(run, workdir)
  keys = [language_key(tag, scheme) for tag in languages]
  return token_use.of_rows(opened, list(run.datasets), trained.tokenizer, keys, scheme)


def _training_rows(run: Run, workdir: pathlib.Path) -> Catalog:
  """Returns the prepared rows of a run; raises DataError where they are not at their place."""
  built = str(workdir / "data" / "dataset")
  folder = pathlib.Path(built if run.config.data.builder else run.config.data.dataset)
  opened = catalog.load_catalog(folder)
  if opened.fingerprint != run.plan.get("dataset"):
    raise DataError(f"data.dataset: {folder} holds other rows than the run was trained on")
  entries = run.datasets.items()  # with the instructions of the run
  files = {name: dataclasses.replace(opened.files[name], entry=entry) for name, entry in entries}
  return dataclasses.replace(opened, files=opened.files | files)


def _sample(run: Run, workdir: pathlib.Path, tokenizer: Tokenizer) -> list[list[int]]:
  """Returns training texts to measure ranges of int8 vectors on; says so where there are none."""
  try:
    opened = _training_rows(run, workdir)
    rows = open_split(opened, TRAIN, list(run.datasets), run.config.data.language_key)
    return sample_ids(rows, tokenizer, *stored_ranges.texts(run.config.model))
  except DataError as error:
    print(f"training texts cannot be read: {error}", flush=True)
    return []
