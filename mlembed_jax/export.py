"""Writes Hugging Face folders from a training run, whole or cut along any of the three axes.

  python -m mlembed_jax.export --checkpoint WORKDIR --out DIR [--depth L] [--rank R] [--dim D]
  python -m mlembed_jax.export --checkpoint WORKDIR --out DIR --variants d256-l8,d64-l2-r128,uv

The second command writes DIR, DIR-d256-l8, DIR-d64-l2-r128 and DIR-uv.
"""

from __future__ import annotations

import pathlib
from typing import TYPE_CHECKING

from absl import flags

from mlembed_jax import cli

# What imports jax is imported in the functions, so that --help does not wait for it.
if TYPE_CHECKING:
  from mlembed_jax.matryoshka import Slice

CHECKPOINT = flags.DEFINE_string(
  "checkpoint",
  None,
  "Workdir of a training run; its newest checkpoint is exported.",
  required=True,
)
OUT = flags.DEFINE_string(
  "out", None, "Folder to write; an earlier export there is replaced.", required=True
)
DEPTH = flags.DEFINE_integer("depth", None, "Layers to keep; a trained exit. Default: all.")
RANK = flags.DEFINE_integer("rank", None, "Rank of the token table; a trained one. Default: all.")
DIM = flags.DEFINE_integer("dim", None, "Output dimensions; a trained size. Default: all.")
VARIANTS = flags.DEFINE_list(
  "variants",
  [],
  "More folders, named as their cut after --out: parts d<dim>, l<layers>, r<rank> joined by -; uv "
  "keeps the token table as two factors, which sentence-transformers reads with trust_remote_code.",
)
NAME = flags.DEFINE_string("name", None, "Model name. Default: export.name and what is cut.")
FORCE = flags.DEFINE_bool("force", False, "Allow sizes that were not trained; the card says so.")


def _wanted() -> dict[str, tuple[Slice, bool]]:
  """Returns {end of the folder's name: (cut, whether the table stays factorised)}."""
  from mlembed_jax.hf.export import parse_variant
  from mlembed_jax.matryoshka import Slice

  found = {"": (Slice(rank=RANK.value, depth=DEPTH.value, dim=DIM.value), False)}
  return found | {f"-{variant}": parse_variant(variant) for variant in VARIANTS.value}


def main() -> None:
  """Reads the flags and writes the folders."""
  from mlembed_jax.data.tokenizer import Tokenizer
  from mlembed_jax.hf.export import check_target, export_folder, plan_variant
  from mlembed_jax.training.checkpoint import load_params
  from mlembed_jax.workdir import Run, StepScores

  workdir = pathlib.Path(CHECKPOINT.value).absolute()
  run, wanted = Run.load(workdir), _wanted()
  out = pathlib.Path(OUT.value).absolute()
  for suffix, (cut, factors) in wanted.items():  # before the first is written
    plan_variant(run, 0, cut, force=FORCE.value, factors=factors)
    check_target(out.with_name(out.name + suffix))
  step, params = load_params(workdir, run.config.model)
  evaluation = StepScores.load(workdir, step)
  for suffix, (cut, factors) in wanted.items():
    folder = export_folder(
      out.with_name(out.name + suffix),
      run=run,
      params=params,
      tokenizer=Tokenizer(workdir / "tokenizer.json", run.config.data.pooled_token),
      step=step,
      cut=cut,
      name=NAME.value and NAME.value + suffix,
      evaluation=evaluation,
      force=FORCE.value,
      factors=factors,
    )
    print(f"exported step {step} to {folder}", flush=True)


if __name__ == "__main__":
  cli.run(main)
