"""Writes a Hugging Face folder from a training run, whole or cut along any of the three axes.

python -m mlembed_jax.export --checkpoint WORKDIR --out DIR [--depth L] [--rank R] [--dim D]
"""

import pathlib

from absl import flags

from mlembed_jax import cli
from mlembed_jax.checkpoint import load_params
from mlembed_jax.data.tokenizer import Tokenizer
from mlembed_jax.hf.export import export_folder
from mlembed_jax.matryoshka import Slice
from mlembed_jax.workdir import Run, read_evaluation

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
NAME = flags.DEFINE_string("name", None, "Model name. Default: export.name and what is cut.")
FORCE = flags.DEFINE_bool("force", False, "Allow sizes that were not trained; the card says so.")


def main() -> None:
  """Reads the flags."""
  workdir = pathlib.Path(CHECKPOINT.value).absolute()
  run = Run.load(workdir)
  step, params = load_params(workdir, run.config.model)
  evaluation = {"step": step, "scores": read_evaluation(workdir, step)}
  folder = export_folder(
    pathlib.Path(OUT.value).absolute(),
    run=run,
    params=params,
    tokenizer=Tokenizer(workdir / "tokenizer.json", run.config.data.pooled_token),
    step=step,
    cut=Slice(rank=RANK.value, depth=DEPTH.value, dim=DIM.value),
    name=NAME.value,
    evaluation=evaluation if evaluation["scores"] else None,
    force=FORCE.value,
  )
  print(f"exported step {step} to {folder}")


if __name__ == "__main__":
  cli.run(main)
