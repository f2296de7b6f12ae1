"""What the pages say exists: links, commands and their flags, settings, files, modules, codes."""

import ast
import importlib
import pathlib
import re
import shlex

import pytest

from mlembed_jax.config import load_module
from mlembed_jax.config_fields import DEFAULTS, REFERENCE

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "mlembed_jax"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
HISTORY = ROOT / "CHANGELOG.md"  # may name what is gone
SETUP = (  # README must not change them
  'pip install -e ".[quickstart]" && python -m mlembed_jax.train --config configs/quickstart.py'
  " --workdir /tmp/quickstart\n",
  'pip install -e ".[test]" && python -m pytest -n 2\n',
)
# Commands that are not of this project and need nothing but it.
TOOLS = ("python3 -m venv", ". .venv", "pip install -e", "python -m pytest", "ruff", "pyright")
TOOLS += (".ci/run", "git merge")
NEEDS = r"<!-- needs [^>]+ -->"  # before a block that cannot be run by everybody
BLOCK = re.compile(rf"^(?:({NEEDS})\n)?```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?://)([^)#\s]*)(?:#([^)\s]+))?\)")
TRAIN = PACKAGE / "train.py"

by_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def text_of(page):
  return page.read_text(encoding="utf-8")


def anchors(page):
  """Returns the anchors of the headings, as forges make them."""
  headings = re.findall(r"^#+ (.+)$", text_of(page), re.MULTILINE)
  return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


def blocks(page, *languages):
  """Returns (what it needs, content) of the code blocks."""
  found = BLOCK.findall(text_of(page))
  assert len(found) == text_of(page).count("\n```") / 2, f"{page.name}: a fence is not understood"
  return [(needs, content) for needs, language, content in found if language in languages]


def commands(content):
  """Yields the words of each command of a block."""
  for line in content.replace("\\\n", " ").splitlines():
    words = shlex.split(line, comments=True)
    while words:
      end = words.index("&&") if "&&" in words else len(words)
      yield words[:end]
      words = words[end + 1 :]


def calls(words):
  """Yields (file, arguments) of every program of this project that a command names."""
  for i, word in enumerate(words):
    if " " in word:
      yield from calls(shlex.split(word))
    elif word == "-m" and words[i + 1].startswith(("mlembed_jax.", "tests.")):
      yield ROOT / (words[i + 1].replace(".", "/") + ".py"), words[i + 2 :]
    elif word.startswith("launch/") and word.endswith((".sh", ".py", ".sbatch")):
      yield from _launched(ROOT / word, words[i + 1 :])


def _launched(file, arguments):
  """What a launcher does not take itself is of the training command, or begins with -m."""
  end = arguments.index("--") if "--" in arguments else len(arguments)
  if file.suffix == ".sbatch":
    end = -1
  own, others = arguments[: max(end, 0)], arguments[end + 1 :]
  yield file, own
  if others[:1] != ["-m"]:
    yield TRAIN, others


def flags_of(file):
  """Returns the flags that the text of a program defines."""
  text = text_of(file)
  named = set(re.findall(r"DEFINE_\w+\(\s*\"(\w+)\"", text))
  bools = {f"no{name}" for name in re.findall(r"DEFINE_bool\(\s*\"(\w+)\"", text)}
  return named | bools | set(re.findall(r"--(\w+)", text)) if named else set(re.findall(r"--(\w+)", text))


def check_flags(file, arguments):
  assert file.is_file(), f"{file} does not exist"
  for flag in (word[2:].partition("=")[0] for word in arguments if word.startswith("--")):
    if flag.startswith("config."):
      assert flag.removeprefix("config.") in DEFAULTS, f"--{flag}"
    else:
      assert flag in flags_of(file), f"{file.name} has no flag --{flag}"


def all_commands(page):
  """Yields (whether the block is marked, words): of blocks, then of inline code."""
  for needs, content in blocks(page, "sh"):
    yield from ((bool(needs), words) for words in commands(content))
  for code in re.findall(r"`(python -m [^`]+)`", BLOCK.sub("", text_of(page)).replace("\n", " ")):
    yield True, shlex.split(code)


def test_the_set_up_commands_stand_as_they_are():
  for command in SETUP:
    assert command in text_of(ROOT / "README.md")


@pytest.mark.parametrize("page", [*PAGES, HISTORY], ids=lambda page: page.name)
def test_links_resolve(page):
  for path, anchor in LINK.findall(text_of(page)):
    target = page.parent / path if path else page
    assert target.exists(), f"{path} does not exist"
    assert not anchor or anchor in anchors(target), f"{path} has no heading #{anchor}"


@by_page
def test_commands_and_their_flags_exist(page):
  for marked, words in all_commands(page):
    found = list(calls(words))
    for file, arguments in found:
      check_flags(file, arguments)
    known = found or shlex.join(words).startswith(TOOLS)
    assert marked or known, f"{shlex.join(words)}: say what it needs, as <!-- needs a cloud -->"


@by_page
def test_python_blocks_import_what_exists(page):
  for _, content in blocks(page, "python"):
    for node in ast.walk(ast.parse(content)):
      if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mlembed_jax"):
        module = importlib.import_module(node.module)
        assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)


@by_page
def test_configurations_exist(page):
  for name, variant in re.findall(r"configs/(\w+)\.py(?::(\w+))?", text_of(page)):
    file = ROOT / f"configs/{name}.py"
    assert file.is_file(), file
    if name != "from_hf":  # there a model follows
      load_module(file).get_config(variant)
  for field in re.findall(r"--config\.([\w.]*\w)", text_of(page)):
    assert field in DEFAULTS, f"--config.{field}"


def is_there(name):
  """Returns whether a dotted name is a setting, a module of the package, or a name in one."""
  parts = name.removeprefix("mlembed_jax.").split(".")
  if name in DEFAULTS or name == "mlembed_jax":
    return True
  for end in range(len(parts), -1, -1):
    stem = PACKAGE.joinpath(*parts[:end])
    file = next((f for f in (stem.with_suffix(".py"), stem / "__init__.py") if f.is_file()), None)
    if file:
      return all(re.search(rf"\b{part}\b", text_of(file)) for part in parts[end:])
  return False


@by_page
def test_settings_modules_and_files_that_code_spans_name_exist(page):
  rooms = {path.stem for path in PACKAGE.iterdir()}
  first = "|".join(sorted(rooms | {name.partition(".")[0] for name in DEFAULTS}))
  text = BLOCK.sub("", text_of(page))
  for name in re.findall(rf"`((?:{first}|mlembed_jax)(?:\.\w+)+)`", text):
    assert is_there(name), name
  for name in re.findall(r"`([\w.\-]+(?:/[\w.\-]+)*\.(?:py|md|sh|sbatch|toml))(?::\w+)?`", text):
    homes = (ROOT, PACKAGE, ROOT / "configs", ROOT / "docs")
    assert any((home / name).exists() for home in homes), name


def codes(pattern, folder):
  return set(re.findall(pattern, "\n".join(map(text_of, sorted(folder.rglob("*.py"))))))


def test_all_checks_and_error_codes_are_listed():
  rows = re.findall(r"^\| ([DE]\d+) \|", text_of(ROOT / "docs/export.md"), re.MULTILINE)
  in_code = codes(r"Check\(\"(D\d\d)\"", PACKAGE) | codes(r"\bE\d{3}\b", PACKAGE / "hf")
  assert rows == sorted(in_code)


def test_the_switches_of_the_published_recipe_are_listed():
  section = text_of(ROOT / "docs/training.md").partition("### The published recipe")[2]
  rows = re.findall(r"^\| `([a-z_.]+)` \|", section.partition("\n#")[0], re.MULTILINE)
  assert set(rows) == {name for name in REFERENCE if REFERENCE[name] != DEFAULTS[name]}
