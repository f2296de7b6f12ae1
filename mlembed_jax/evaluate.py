"""Scores an exported model on held-out tasks, whole, cut, or in every trained slice.

  python -m mlembed_jax.evaluate --model DIR --tasks FOLDER --out OUT
  python -m mlembed_jax.evaluate --model DIR --tasks FOLDER,mteb:STS17 --grid --out OUT

Writes OUT/scores.json and OUT/report.html, one file that any browser shows. The same command goes
on after a stop: tasks that were scored with the same settings are not scored again.
`mlembed_jax.eval.evaluation.Evaluation.load` reads scores.json.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from absl import flags

from mlembed_jax import cli
from mlembed_jax.data import languages
from mlembed_jax.errors import ConfigError
from mlembed_jax.quantize import PRECISIONS

# What imports jax is imported in the functions, so that --help does not wait for it.
if TYPE_CHECKING:
  from mlembed_jax.eval.grid import Axes
  from mlembed_jax.eval.tasks import HeldoutTask
  from mlembed_jax.inference import Encoder

MODEL = flags.DEFINE_string(
  "model", None, "Folder in Hugging Face layout, or hf:ORG/NAME.", required=True
)
TASKS = flags.DEFINE_list(
  "tasks",
  None,
  "Folders of held-out files with a manifest.json in or above them, and mteb:NAME for tasks of "
  "MTEB, separated by commas.",
  required=True,
)
OUT = flags.DEFINE_string("out", None, "Folder to write.", required=True)
GRID = flags.DEFINE_bool("grid", False, "Score every trained depth, dim, rank, and 3 precisions.")
DEPTH = flags.DEFINE_integer("depth", None, "Layers to use; a trained exit. Default: all.")
RANK = flags.DEFINE_integer("rank", None, "Rank of the token table; a trained one. Default: all.")
DIM = flags.DEFINE_integer("dim", None, "Dimensions; a trained size. Default: all.")
UNTRAINED = flags.DEFINE_bool("untrained", False, "Allow sizes that were not trained.")
PRECISION = flags.DEFINE_enum("precision", "float32", PRECISIONS, "Of the vectors.")
POOLED_TOKEN = flags.DEFINE_string(
  "pooled_token", None, "Token that ends every text, of a folder that does not say which."
)
MAX_TOKENS = flags.DEFINE_integer(
  "max_tokens", None, "Of a text, longer ones are cut. Default: what the model allows.", 2
)
LANGUAGE_KEY = flags.DEFINE_enum(
  "language_key",
  languages.LANGUAGE_SCRIPT,
  languages.SCHEMES,
  "What counts as one language: tags of one language and script (he, iw and heb_Hebr), or equal "
  "tags alone.",
)

MTEB = "mteb:"  # begins the name of a task of MTEB
MTEB_LACKS = (PRECISION, UNTRAINED)


def requested_axes(encoder: Encoder) -> Axes:
  """Returns the slices that the flags ask for.

  Raises:
    ConfigError: a size that the model lacks or that was not trained; --grid beside a slice.
  """
  from mlembed_jax.eval import scoring
  from mlembed_jax.matryoshka import Slice

  if GRID.value:
    if flag := next((f.name for f in (DEPTH, RANK, DIM, PRECISION, UNTRAINED) if f.present), None):
      raise ConfigError(f"--{flag}: --grid scores all trained sizes; give one of the two")
    return scoring.trained_axes(encoder)
  cut = Slice(rank=RANK.value, depth=DEPTH.value, dim=DIM.value)
  try:
    return scoring.one_slice(encoder, cut, PRECISION.value, UNTRAINED.value)
  except ValueError as error:
    raise ConfigError(f"--{error}") from error


def _read_tasks() -> tuple[list[HeldoutTask], list[str]]:
  """Returns the tasks of folders, and the names of those of MTEB."""
  from mlembed_jax.eval import scoring

  if not TASKS.value or not all(TASKS.value):
    raise ConfigError("--tasks: an empty name; give folders, or mteb:NAME")
  named = [name.removeprefix(MTEB) for name in TASKS.value if name.startswith(MTEB)]
  folders = [name for name in TASKS.value if not name.startswith(MTEB)]
  if named and (flag := next((f.name for f in MTEB_LACKS if f.value != f.default), None)):
    raise ConfigError(f"--{flag}: tasks of MTEB have trained sizes in float32 alone")
  with cli.flags_in_errors("tasks"):
    tasks = scoring.read_tasks(folders, named, LANGUAGE_KEY.value)
  if named:
    scoring.check_named(named)  # before hours of work
  return tasks, named


def main() -> None:
  """Reads the flags, scores, and writes and prints the report."""
  from mlembed_jax.eval import scoring, summary
  from mlembed_jax.inference import Encoder

  tasks, named = _read_tasks()
  encoder = Encoder.load(MODEL.value, pooled_token=POOLED_TOKEN.value)
  with cli.flags_in_errors("out"):
    out = scoring.make_out(encoder, OUT.value)
  if MAX_TOKENS.value:
    encoder.max_seq_length = min(encoder.max_seq_length, MAX_TOKENS.value)
  axes = requested_axes(encoder)
  evaluation = scoring.evaluate_encoder(
    encoder, tasks, named, axes, out, POOLED_TOKEN.value, LANGUAGE_KEY.value
  )
  scoring.write_report(evaluation, out)
  print(summary.text_table(evaluation))
  if cut := evaluation.skipped["texts_truncated"]:
    print(f"\n{cut:,} texts were cut to {encoder.max_seq_length} tokens")
  print(f"\n{out / 'scores.json'}\n{out / 'report.html'}")


if __name__ == "__main__":
  cli.run(main)
