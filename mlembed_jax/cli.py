"""What every command shares: flags in one style, and one way to end."""

import sys
from collections.abc import Callable, Sequence

from absl import app

from mlembed_jax.config import ConfigError
from mlembed_jax.data.tokenizer import DataError
from mlembed_jax.hf.files import ExportError
from mlembed_jax.hf.load import LoadError


def run(main: Callable[[], None]) -> None:
  """Parses the flags and runs `main`; exits with 0 on success alone.

  Input that cannot be used ends the program with its message and status 1, without a traceback.
  """

  def wrapped(argv: Sequence[str]) -> None:
    if len(argv) > 1:
      raise app.UsageError(f"unexpected argument {argv[1]!r}; every option is a --flag")
    try:
      main()
    except (ConfigError, DataError, ExportError, LoadError) as error:
      sys.exit(f"error: {error}")

  # Libraries log each checkpoint in thirty lines. A later --verbosity=0 shows them.
  app.run(wrapped, argv=[sys.argv[0], "--verbosity=-1", *sys.argv[1:]])
