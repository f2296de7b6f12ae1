"""Trains an encoder: python -m mlembed_jax.train --config configs/8b.py --workdir DIR.

The same command with the same workdir goes on from the newest checkpoint, bit for bit as if the
run had never stopped. SIGTERM and Ctrl-C during training save a checkpoint first. From Python:
`mlembed_jax.training.loop.train_model`.
"""

from absl import flags
from ml_collections import config_flags

from mlembed_jax import cli
from mlembed_jax.config import described
from mlembed_jax.errors import ConfigError

CONFIG = config_flags.DEFINE_config_file(
  "config",
  None,
  "Configuration file, FILE[:variant]. Any field can be changed on the command line, e.g. "
  "--config.optimizer.learning_rate=1e-5; --print_config explains them all.",
)
WORKDIR = flags.DEFINE_string(
  "workdir",
  None,
  "Folder of the run: checkpoints, metrics, export. Made if it does not exist. Several machines "
  "need one that they share.",
)
ACCEPT_CHANGED_DATA = flags.DEFINE_bool(
  "accept_changed_data",
  False,
  "Go on from the newest checkpoint although rows, mixture or batches changed.",
)
ACCEPT_CHANGED_LEARNING_RATE = flags.DEFINE_bool(
  "accept_changed_learning_rate",
  False,
  "Go on with another optimizer.learning_rate; run.json keeps a history.",
)
ACCEPT_CHANGED_LENGTH = flags.DEFINE_bool(
  "accept_changed_length",
  False,
  "Go on with another train.steps or train.epochs, a finished run too; run.json keeps a history.",
)
STRICT_RESTORE = flags.DEFINE_bool(
  "strict_restore",
  False,
  "End where the newest checkpoint is damaged.",
)
FROM_STEP = flags.DEFINE_integer(
  "from_step", None, "Go on from this checkpoint; later ones are set aside.", lower_bound=0
)
SKIP_STEPS = flags.DEFINE_string(
  "skip_steps",
  "",
  "Steps whose rows are passed over from now on, such as 120-140,150. run.json keeps them.",
)
GRACE_S = flags.DEFINE_float(
  "grace_s",
  0.0,
  "Seconds between SIGTERM and the end of the process, whatever it does then. 0: it ends when its "
  "checkpoint is written.",
  lower_bound=0.0,
)
PRINT_CONFIG = flags.DEFINE_bool(
  "print_config", False, "Print every field with value, default, meaning and rules, and end."
)
JOIN_TIMEOUT_S = flags.DEFINE_integer(
  "join_timeout_s",
  300,
  "Seconds to wait at the start until all processes of the run are there.",
  lower_bound=1,
)


def main() -> None:
  """Joins the processes of the run, checks that they agree, and trains."""
  if PRINT_CONFIG.value:
    print(described(cli.read_values(CONFIG)))
    return
  if not WORKDIR.value:
    raise ConfigError("--workdir: give the folder of the run")
  # Imported here, jax and orbax do not slow down --help.
  from mlembed_jax.parallel import join, processes
  from mlembed_jax.training.loop import train_model

  with join.joined(JOIN_TIMEOUT_S.value):
    with processes.agreed():
      config = cli.read_config(CONFIG)
    with cli.flags_in_errors("workdir"):
      train_model(
        config,
        WORKDIR.value,
        accept_changed_data=ACCEPT_CHANGED_DATA.value,
        accept_changed_learning_rate=ACCEPT_CHANGED_LEARNING_RATE.value,
        accept_changed_length=ACCEPT_CHANGED_LENGTH.value,
        strict_restore=STRICT_RESTORE.value,
        from_step=FROM_STEP.value,
        skip_steps=SKIP_STEPS.value,
        grace_s=GRACE_S.value,
      )


if __name__ == "__main__":
  flags.mark_flag_as_required("config")
  cli.run(main)
