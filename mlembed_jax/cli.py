"""What every command shares: flags in one style, and one way to end."""

import contextlib
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from absl import app, flags
from ml_collections import config_flags

from mlembed_jax import files
from mlembed_jax.config import REPLACED, find_file, from_mapping, no_file, read_file
from mlembed_jax.config_fields import Config
from mlembed_jax.errors import ConfigError, MlembedError


def run(main: Callable[..., None], *names: str) -> None:
  """Parses the flags and runs `main` with the arguments called `names`; exits with 0 on success.

  Input that cannot be used ends the program with its message and status 1, without a traceback.
  """

  def wrapped(argv: Sequence[str]) -> None:
    given = argv[1:]
    if len(given) > len(names):
      taken = f"the one argument is {names[0]}" if names else "there are none"
      sys.exit(f"error: unexpected argument {given[len(names)]!r}; {taken}, options are --flags")
    if len(given) < len(names):
      sys.exit(f"error: {names[len(given)]} is missing; --help tells more")
    try:
      main(*given)
    except MlembedError as error:
      sys.exit(f"error: {error}")
    except BrokenPipeError:  # as of `... | head`, whose reader has seen enough
      os._exit(128 + signal.SIGPIPE)
    except OSError as error:
      if error.errno not in files.STORAGE:
        raise
      sys.exit(f"error: {files.storage_message(None, error)}")

  if {"-h", "-help", "--help"} & set(sys.argv[1:]):
    app.usage(shorthelp=True, writeto_stdout=True)  # absl itself would end with status 1
    return
  # Libraries log each checkpoint in thirty lines. A later --verbosity=0 shows them.
  argv = [sys.argv[0], "--verbosity=-1", *sys.argv[1:]]
  for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, _stop)
  app.run(wrapped, argv=argv, flags_parser=_parse)


def _stop(number: int, _: Any) -> None:
  """Ends the program, where a run does not save first (`mlembed_jax.parallel.stop`)."""
  signal.signal(number, lambda again, _: os._exit(128 + again))  # a second press waits for nothing
  # print() could be in the middle of another one.
  said = f"\nstopped by signal {number}; the same command goes on\n"
  os.write(sys.stderr.fileno(), said.encode())
  sys.exit(128 + number)


def _parse(argv: list[str]) -> Any:
  try:
    return flags.FLAGS(_with_config_file(argv))
  except flags.Error as error:
    missing = re.findall("flag (--[a-z_]+)=None: ", str(error))
    said = f"{', '.join(missing)} must be given" if missing else " ".join(str(error).split())
    sys.exit(f"error: {said}; --help lists the flags")
  except (AttributeError, KeyError) as error:  # how ml_collections reports an override
    if "ml_collections" not in traceback.extract_tb(error.__traceback__)[-1].filename:
      raise
    reason = error.args[0]
    reason = reason.args[0] if isinstance(reason, Exception) else reason
    today = REPLACED.get(str(reason).strip("'"))
    hint = f"; did you mean {today}?" if today else ""
    sys.exit(f"error: --config: unknown field {reason}{hint}")


def _with_config_file(argv: list[str]) -> list[str]:
  """Returns the arguments with the file that `--config` means; ends where the file fails."""
  for i, argument in enumerate(argv):
    name, equals, value = argument.partition("=")
    if name.lstrip("-") != "config" or not name.startswith("-"):
      continue
    at = i if equals else i + 1
    if at < len(argv):
      path = value if equals else argv[at]
      _try_config_file(path)
      return [
        *argv[:at],
        f"{name}={find_file(path)}" if equals else find_file(path),
        *argv[at + 1 :],
      ]
  return argv


def _try_config_file(path: str) -> None:
  """Ends with one sentence where the file fails; ml_collections would print a traceback.

  One that is not there is told by `read_values`, which all processes of a run come to.
  """
  if not os.path.exists(find_file(path).partition(":")[0]):
    return
  try:
    read_file(path)
  except MlembedError as error:
    sys.exit(f"error: --config: {error}")
  except Exception as error:
    frames = traceback.extract_tb(error.__traceback__)
    inside = [frame for frame in frames if frame.filename == find_file(path).partition(":")[0]]
    where = f"{inside[-1].filename}, line {inside[-1].lineno}" if inside else path
    sys.exit(f"error: --config: {where}: {type(error).__name__}: {error}")


@contextlib.contextmanager
def flags_in_errors(*parameters: str) -> Iterator[None]:
  """Makes an error that begins with one of these parameters begin with the flag of that name."""
  try:
    yield
  except MlembedError as error:
    if str(error).startswith(tuple(f"{name}: " for name in parameters)):
      raise type(error)(f"--{error}") from error
    raise


def read_values(flag: flags.FlagHolder[Any]) -> Any:
  """Returns the ConfigDict of a `--config` flag; raises ConfigError where there is no such file."""
  try:
    flag.value.keys()  # ml_collections keeps the error until something is asked of the value
  except OSError as error:
    path = config_flags.get_config_filename(flags.FLAGS[flag.name])
    raise ConfigError(f"--config: {no_file(path)}") from error
  return flag.value


def read_config(flag: flags.FlagHolder[Any], changes: Mapping[str, Any] | None = None) -> Config:
  """Returns the checked configuration of a `--config` flag with `changes`; raises ConfigError."""
  values = read_values(flag)
  values.update_from_flattened_dict(changes or {})
  return from_mapping(values)
