"""Hugging Face folders from a workdir, without flags."""

import os
import pathlib
from collections.abc import Mapping, Sequence

from mlembed_jax.data.tokenizer import Tokenizer
from mlembed_jax.hf.export import (
  TrainedModel,
  check_target,
  check_variant,
  export_folder,
  parse_variant,
)
from mlembed_jax.matryoshka import Slice
from mlembed_jax.training.saved import load_newest_params
from mlembed_jax.workdir import Run, StepScores


def export_model(
  workdir: str | os.PathLike[str],
  out: str | os.PathLike[str],
  cut: Slice | None = None,
  variants: str | Sequence[str] = (),
  *,
  name: str | None = None,
  force: bool = False,
) -> list[pathlib.Path]:
  """Writes the newest checkpoint of a run as Hugging Face folders, and returns their paths.

  Args:
    workdir: the folder of the run.
    out: the folder to write; an earlier export there is replaced.
    cut: depth, rank and dimension of that folder; None: all.
    variants: one or more folders beside it, OUT-VARIANT, such as `d64-l2-r128` or `uv`.
    name: of the model. None: `export.name` and what is cut.
    force: allow sizes that were not trained.

  Raises:
    ConfigError: the workdir has no run or no checkpoint. Nothing is written then.
    ExportError: a variant cannot be parsed, a size is beyond the model or was not trained, or a
      folder that is written would replace something else (nothing is written then); or see
      `export_folder`.
  """
  workdir, out = pathlib.Path(workdir).absolute(), pathlib.Path(out).absolute()
  names = (variants,) if isinstance(variants, str) else variants
  wanted: Mapping[str, tuple[Slice, bool]] = {"": (cut or Slice(), False)}
  wanted |= {f"-{variant}": parse_variant(variant) for variant in names}
  run = Run.load(workdir)
  for suffix, (size, factors) in wanted.items():  # before the first is written
    check_variant(run, 0, size, force=force, factors=factors)
    check_target(out.with_name(out.name + suffix))
  run.check_tokenizer(workdir)
  step, params = load_newest_params(workdir, run.config.model)
  tokenizer = Tokenizer(workdir / "tokenizer.json", run.config.data.pooled_token)
  trained = TrainedModel(run, step, params, tokenizer, StepScores.load(workdir, step))
  folders = []
  for suffix, (size, factors) in wanted.items():
    folder = export_folder(
      out.with_name(out.name + suffix),
      trained,
      size,
      name=name and name + suffix,
      force=force,
      factors=factors,
    )
    print(f"exported step {step} to {folder}", flush=True)
    folders.append(folder)
  return folders
