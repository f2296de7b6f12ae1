"""Writes Hugging Face folders from a training run, whole or cut along any of the three axes.

  python -m mlembed_jax.export --checkpoint WORKDIR --out DIR [--depth L] [--rank R] [--dim D]
  python -m mlembed_jax.export --checkpoint WORKDIR --out DIR --variants d256-l8,uv,onnx-int8

The second command writes DIR, DIR-d256-l8, DIR-uv and DIR-onnx-int8.
"""

from absl import flags

from mlembed_jax import cli
from mlembed_jax.errors import ConfigError

CHECKPOINT = flags.DEFINE_string(
  "checkpoint",
  None,
  "Workdir of a training run; its newest checkpoint is exported, or that of --step.",
  required=True,
)
OUT = flags.DEFINE_string(
  "out", None, "Folder to write; an earlier export there is replaced.", required=True
)
STEP = flags.DEFINE_string(
  "step", None, "A checkpoint that the workdir keeps, or best: of the held-out scores."
)
DEPTH = flags.DEFINE_integer("depth", None, "Layers to keep; a trained exit. Default: all.")
RANK = flags.DEFINE_integer("rank", None, "Rank of the token table; a trained one. Default: all.")
DIM = flags.DEFINE_integer("dim", None, "Output dimensions; a trained size. Default: all.")
VARIANTS = flags.DEFINE_list(
  "variants",
  [],
  "More folders, named as their cut after --out: parts d<dim>, l<layers>, r<rank> joined by -; uv "
  "keeps the token table as two factors, which sentence-transformers reads with trust_remote_code; "
  "onnx adds onnx/model.onnx, onnx-int8 one of a quarter of its size; v-de-sw keeps the tokens of "
  "training texts in de and sw, v alone those of all, or of --keep_texts.",
)
KEEP_TEXTS = flags.DEFINE_list(
  "keep_texts", [], "Files of texts (column `text`) whose tokens variants with v keep."
)
KEEP_TOKENS = flags.DEFINE_integer(
  "keep_tokens", None, "Tokens that variants with v keep at most; the rarest go.", lower_bound=1
)
GGUF = flags.DEFINE_list(
  "gguf", [], "Adds GGUF files for llama.cpp to every folder: f32, f16 or q8_0, joined by commas."
)
NAME = flags.DEFINE_string("name", None, "Model name. Default: export.name and what is cut.")
PUSH = flags.DEFINE_string(
  "push",
  None,
  "hf:ORG/NAME: puts the folders on the Hugging Face Hub, each under the suffix of its variant.",
)
PRIVATE = flags.DEFINE_bool("private", False, "Repositories that --push makes are private.")
DRY_RUN = flags.DEFINE_bool("dry_run", False, "List what --push would put there, and end.")
ADAPTER = flags.DEFINE_bool(
  "adapter", False, "Write the adapter (model.lora) alone, a folder that peft loads."
)
FORCE = flags.DEFINE_bool("force", False, "Allow sizes that were not trained; the card says so.")


def _step() -> int | str | None:
  """Returns what --step names; raises ConfigError where it is neither a number nor best."""
  given = STEP.value
  if given is None or given == "best":
    return given
  if not (given.isascii() and given.isdigit()):
    raise ConfigError(f"--step: {given!r} is no step, such as 4000, and not best")
  return int(given)


def main() -> None:
  """Reads the flags and writes the folders."""
  # Imported here, jax does not slow down --help.
  from mlembed_jax.matryoshka import Slice
  from mlembed_jax.training.export import export_adapter, export_model

  if not PUSH.value and (PRIVATE.value or DRY_RUN.value):
    raise ConfigError("--private, --dry_run: they say how --push works; give it, too")
  if ADAPTER.value:
    whole = (DEPTH, RANK, DIM, VARIANTS, GGUF, NAME, PUSH, KEEP_TEXTS, KEEP_TOKENS, FORCE)
    if other := next((flag.name for flag in whole if flag.present), None):
      raise ConfigError(f"--{other}: --adapter writes the adapter alone; give one of the two")
    with cli.flags_in_errors("step", "adapter", "out"):
      export_adapter(CHECKPOINT.value, OUT.value, step=_step())
    return
  cut = Slice(rank=RANK.value, depth=DEPTH.value, dim=DIM.value)
  with cli.flags_in_errors("step"):
    export_model(
      CHECKPOINT.value,
      OUT.value,
      cut,
      tuple(VARIANTS.value),
      step=_step(),
      gguf=tuple(GGUF.value),
      keep_texts=tuple(KEEP_TEXTS.value),
      keep_tokens=KEEP_TOKENS.value,
      name=NAME.value,
      force=FORCE.value,
      push_to=PUSH.value,
      private=PRIVATE.value,
      dry_run=DRY_RUN.value,
    )


if __name__ == "__main__":
  cli.run(main)
