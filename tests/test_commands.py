"""Every command answers --help without jax, which takes seconds to import."""

import os
import re
import subprocess
import sys
import tomllib

import pytest

from mlembed_jax import __main__ as commands
from mlembed_jax.config import load_config
from tests.test_architecture import COMMANDS, PACKAGE, ROOT

ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT)}
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


def train(*arguments):
  words = [sys.executable, "-m", "mlembed_jax.train", *arguments, "--print_config"]
  return subprocess.run(words, capture_output=True, text=True)


CONFIGS = {
  "import_fails": "import nope",
  "code_fails": "def get_config():\n  return {}['a']",
  "value_fails": "from mlembed_jax.errors import LoadError\n"
  "def get_config(source):\n  raise LoadError(f'{source} is no folder')",
  "no_config": "def get_config():\n  return 3",
}


@pytest.mark.parametrize(
  ("file", "said"),
  [
    ("absent.py", "there is no absent.py; the package has 0_6b, 140m,"),
    ("import_fails.py", "import_fails.py, line 1: ModuleNotFoundError: No module named 'nope'"),
    ("code_fails.py", "code_fails.py, line 2: KeyError: 'a'"),
    ("value_fails.py", "value_fails.py: needs a value after a colon:"),
    ("value_fails.py:here", "here is no folder"),
    ("no_config.py", "get_config returns a int, not a ConfigDict"),
    ("8b:v9", "8b:v9: unknown variant 'v9'; known: reference, v5e, v5p, v6e"),
  ],
)
def test_a_configuration_that_fails_ends_in_one_sentence(file, said, tmp_path):
  for name, content in CONFIGS.items():
    (tmp_path / f"{name}.py").write_text(content, encoding="utf-8")
  made = file.partition(".py")[0] in CONFIGS
  result = train("--config", str(tmp_path / file) if made else file)
  assert result.returncode == 1 and said in result.stderr
  assert result.stderr.startswith("error: --config:") and len(result.stderr.splitlines()) == 1


def test_a_configuration_of_the_package_is_known_by_its_name(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert load_config("quickstart:smoke") == load_config(ROOT / "configs/quickstart.py:smoke")
  result = train("--config=quickstart:smoke")
  assert result.returncode == 0 and "train.steps" in result.stdout


def test_a_wheel_holds_every_package_and_the_configurations():
  project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
  setuptools = project["tool"]["setuptools"]
  folders = {path.parent for path in PACKAGE.rglob("*.py")}
  names = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
  assert set(setuptools["packages"]) == names | {"mlembed_jax.configs"}
  assert setuptools["package-dir"] == {"mlembed_jax.configs": "configs"}


def test_one_program_lists_and_runs_all_commands(capsys, monkeypatch):
  assert set(commands.COMMANDS) == COMMANDS
  monkeypatch.setattr(sys, "argv", ["mlembed"])
  commands.main()
  listed = {line.split()[0] for line in capsys.readouterr().out.splitlines()[2:]}
  assert listed == COMMANDS
  arguments = [sys.executable, "-m", "mlembed_jax", "doctor", "--help"]
  result = subprocess.run(arguments, capture_output=True, text=True)
  assert result.returncode == 0 and "--[no]torch" in result.stdout
  monkeypatch.setattr(sys, "argv", ["mlembed", "serve"])
  with pytest.raises(SystemExit, match="'serve' is no command; there are prepare, vocabulary"):
    commands.main()


@pytest.mark.parametrize(
  ("flags", "said"),
  [
    (("--out=a.json",), "--texts, --dataset: name what holds the texts"),
    (("--out=a.json", "--texts=t", "--languages=de"), "--languages: they are those of the rows of"),
    (("--out=a", "--texts=t.txt"), "--out: a is not the name of a .json file"),
    (("--out=/tok", "--texts=t.txt"), "--out: .* is also --tokenizer, which it would replace"),
    (("--out=a.json", "--texts=/none.txt"), "--texts: /none.txt does not exist"),
    (("--out=a.json", "--dataset=/none"), "data.dataset: /none is no prepared dataset"),
    (
      ("--out=a.json", "--dataset=/set", "--languages=sw"),
      "--languages: .* have no swa-Latn; they",
    ),
    (("--out=a.json", "--dataset=/set", "--keep_tokens=9"), "9 tokens are fewer than the 258"),
    (("--out=a.json", "--texts=/empty.txt"), "--texts: .*empty.txt has no texts"),
  ],
)
def test_a_vocabulary_that_cannot_be_made_is_refused(data, tmp_path, flags, said):
  tokenizer = data / "tokenizer.json"
  (empty := data / "empty.txt").touch()
  for name, path in (("/tok", tokenizer), ("/set", data / "dataset"), ("/empty.txt", empty)):
    flags = [flag.replace(name, str(path)) for flag in flags]
  words = [sys.executable, "-m", "mlembed_jax.vocabulary", f"--tokenizer={tokenizer}", *flags]
  result = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, env=ENVIRONMENT)
  assert result.returncode == 1 and not list(tmp_path.iterdir())
  last = result.stderr.splitlines()[-1]
  assert last.startswith("error: ") and re.search(said, last), result.stderr


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_help_ends_with_status_0_and_names_the_flags(command):
  arguments = [sys.executable, "-m", f"mlembed_jax.{command}", "--help"]
  result = subprocess.run(arguments, capture_output=True, text=True)
  assert result.returncode == 0 and f"mlembed_jax/{command}.py:" in result.stdout
