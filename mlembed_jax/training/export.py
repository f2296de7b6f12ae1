"""Hugging Face folders from a workdir, without flags."""

import dataclasses
import os
import pathlib
from collections.abc import Sequence

from mlembed_jax.data import catalog
from mlembed_jax.data.records import TRAIN
from mlembed_jax.data.sample import sample_ids
from mlembed_jax.data.store import open_split
from mlembed_jax.data.tokenizer import Tokenizer
from mlembed_jax.devices.start import start_devices
from mlembed_jax.errors import DataError
from mlembed_jax.hf import push, stored_ranges
from mlembed_jax.hf.config_files import Forms
from mlembed_jax.hf.export import TrainedModel, check_target, check_variant, export_folder
from mlembed_jax.hf.variants import parse_variant
from mlembed_jax.matryoshka import Slice
from mlembed_jax.training.saved import chosen_step, load_newest_params
from mlembed_jax.workdir import Run, StepScores


def export_model(
  workdir: str | os.PathLike[str],
  out: str | os.PathLike[str],
  cut: Slice | None = None,
  variants: str | Sequence[str] = (),
  *,
  step: int | str | None = None,
  gguf: str | Sequence[str] = (),
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
    name: of the model. None: `export.name` and what is cut.
    force: allow sizes that were not trained.
    push_to: hf:ORG/NAME, where the folders are put, each under the suffix of its variant.
    private: whether repositories that are made are private.
    dry_run: list what would be put there, instead.

  Raises:
    ConfigError: the workdir has no run or no checkpoint. Nothing is written then.
    ExportError: a variant cannot be parsed, a size is beyond the model or was not trained, or a
      folder that is written would replace something else (nothing is written then); or see
      `export_folder`.
  """
  start_devices()
  workdir, out = pathlib.Path(workdir).absolute(), pathlib.Path(out).absolute()
  wanted = _wanted(cut or Slice(), _listed(variants), _listed(gguf))
  repositories = [push.repository(push_to, suffix) for suffix in wanted] if push_to else []
  run = Run.load(workdir)
  for suffix, (size, forms) in wanted.items():  # before the first is written
    check_variant(run, 0, size, force=force, forms=forms)
    check_target(out.with_name(out.name + suffix))
  for repository in () if dry_run else repositories:
    push.check(repository)
  run.check_tokenizer(workdir)
  steps = None if step is None else [chosen_step(workdir, step)]
  step, params = load_newest_params(workdir, run.config.model, steps)
  tokenizer = Tokenizer(workdir / "tokenizer.json", run.config.data.pooled_token)
  sample = _sample(run, workdir, tokenizer)
  trained = TrainedModel(run, step, params, tokenizer, StepScores.load(workdir, step), sample)
  folders = [
    _write(out, suffix, trained, size, forms, name, force)
    for suffix, (size, forms) in wanted.items()
  ]
  if repositories:
    _publish(folders, repositories, private, dry_run)
  return folders


def _write(
  out: pathlib.Path,
  suffix: str,
  trained: TrainedModel,
  size: Slice,
  forms: Forms,
  name: str | None,
  force: bool,
) -> pathlib.Path:
  """Returns the folder of a variant, which it writes."""
  folder = export_folder(
    out.with_name(out.name + suffix),
    trained,
    size,
    name=name and name + suffix,
    force=force,
    forms=forms,
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


def _wanted(
  cut: Slice, variants: Sequence[str], gguf: Sequence[str]
) -> dict[str, tuple[Slice, Forms]]:
  """Returns what is cut, and the forms of the weights, by the suffix of each folder."""
  found = {"": (cut, Forms()), **{f"-{name}": parse_variant(name) for name in variants}}
  return {
    suffix: (size, dataclasses.replace(forms, gguf=tuple(gguf)))
    for suffix, (size, forms) in found.items()
  }


def _listed(names: str | Sequence[str]) -> Sequence[str]:
  return (names,) if isinstance(names, str) else names


def _sample(run: Run, workdir: pathlib.Path, tokenizer: Tokenizer) -> list[list[int]]:
  """Returns training texts to measure ranges of int8 vectors on; says so where there are none."""
  built = str(workdir / "data" / "dataset")
  folder = pathlib.Path(built if run.config.data.builder else run.config.data.dataset)
  try:
    opened = catalog.load_catalog(folder)
    if opened.fingerprint != run.plan.get("dataset"):
      raise DataError(f"data.dataset: {folder} holds other rows than the run was trained on")
    entries = run.datasets.items()  # with the instructions of the run
    files = {name: dataclasses.replace(opened.files[name], entry=entry) for name, entry in entries}
    split = open_split(dataclasses.replace(opened, files=opened.files | files), TRAIN, list(files))
    return sample_ids(split, tokenizer, *stored_ranges.texts(run.config.model))
  except DataError as error:
    print(f"training texts cannot be read: {error}", flush=True)
    return []
