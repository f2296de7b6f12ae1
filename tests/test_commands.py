"""Every command answers --help without jax, which takes seconds to import."""

import subprocess
import sys

import pytest

from tests.test_architecture import COMMANDS

# The module is imported as --help imports it; what it printed is the rest of the test.
PROBE = """
import importlib, sys
importlib.import_module("mlembed_jax." + sys.argv[1])
print(*{"jax", "flax", "orbax", "grain", "torch"} & set(sys.modules))
"""


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_a_command_imports_no_jax_before_its_flags_are_read(command):
  arguments = [sys.executable, "-c", PROBE, command]
  result = subprocess.run(arguments, capture_output=True, text=True, check=True)
  assert not result.stdout.strip()


def test_settings_of_a_file_that_is_not_there_end_in_one_line():
  arguments = [sys.executable, "-m", "mlembed_jax.train", "--config", "absent.py", "--print_config"]
  result = subprocess.run(arguments, capture_output=True, text=True)
  assert result.returncode == 1
  assert result.stderr.startswith("error: --config:") and "Traceback" not in result.stderr


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_help_ends_with_status_0_and_names_the_flags(command):
  arguments = [sys.executable, "-m", f"mlembed_jax.{command}", "--help"]
  result = subprocess.run(arguments, capture_output=True, text=True)
  assert result.returncode == 0 and f"mlembed_jax/{command}.py:" in result.stdout
