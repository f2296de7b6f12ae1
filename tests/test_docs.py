"""What the pages say exists: links, commands and their flags, settings, files, modules, codes."""

import ast
import importlib
import json
import re
import shlex

import pytest

from mlembed_jax import workdir
from mlembed_jax.config import load_module
from mlembed_jax.config_fields import DEFAULTS, NO_LORA, REFERENCE, ModelConfig
from mlembed_jax.data import catalog, manifest
from mlembed_jax.devices.tpu import TPUS
from mlembed_jax.eval import evaluation
from mlembed_jax.hf import own_file
from mlembed_jax.hf.checks import consumers, examine
from mlembed_jax.models.encoder import parameter_count
from tests.pages import (
  BLOCK,
  HISTORY,
  LINK,
  PAGES,
  ROOT,
  SET_UP,
  anchors,
  blocks,
  commands,
  is_after_quickstart,
  spans,
  table,
  text_of,
)

PACKAGE = ROOT / "mlembed_jax"
TRAIN = PACKAGE / "train.py"
# Commands that .ci/run or a reader runs, and that need nothing but this project.
TOOLS = ("python3 -m venv", ". .venv", "pip install -e", "python -m pytest", "ruff", "pyright")
TOOLS += (".ci/run", "python launch/local_processes.py")  # the last by tests/parallel
# Programs whose flags may stand in a sentence.
PROGRAMS = [*PACKAGE.glob("*.py"), *(ROOT / "launch").rglob("*"), *(ROOT / "tests").rglob("*.py")]
# Files of users, in examples.
EXAMPLES = {
  *("faq.query.npy", "faq.passage.npy", "vectors.ranges.npy"),
  *("vectors.npy.json", "full.npy.json"),
}

by_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


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
  """Returns the flags that a program defines: by absl, or literally, as argparse and shells do."""
  text = text_of(file)
  bools = {f"no{name}" for name in re.findall(r"DEFINE_bool\(\s*\"(\w+)\"", text)}
  absl = set(re.findall(r"DEFINE_\w+\(\s*\"(\w+)\"", text)) | bools
  return absl or set(re.findall(r"--([\w-]+)", text))


def flag_names(words):
  """Leaves out options of other programs, which stand together in one word."""
  given = [word for word in words if re.match(r"--\w", word) and " --" not in word]
  return [word[2:].partition("=")[0] for word in given]


def check_flags(file, arguments):
  assert file.is_file(), f"{file} does not exist"
  for flag in flag_names(arguments):
    if flag.startswith("config."):
      assert flag.removeprefix("config.") in DEFAULTS, f"--{flag}"
    else:
      assert flag in flags_of(file), f"{file.name} has no flag --{flag}"


def all_commands(page):
  """Yields (whether it need not run here, words): of blocks, then of code in sentences."""
  for marked, content in blocks(page, "sh"):
    yield from ((marked, words) for words in commands(content))
  yield from ((True, shlex.split(code)) for code in spans(page) if code.startswith("python -m"))


def test_the_set_up_commands_stand_as_they_are():
  for command in SET_UP:
    assert command in text_of(ROOT / "README.md")


def test_the_readme_stays_short():
  assert len(text_of(ROOT / "README.md").splitlines()) <= 180


@pytest.mark.parametrize("page", [*PAGES, HISTORY], ids=lambda page: page.name)
def test_links_resolve(page):
  for path, anchor in LINK.findall(text_of(page)):
    target = page.parent / path if path else page
    assert target.exists(), f"{path} does not exist"
    assert not anchor or anchor in anchors(target), f"{path} has no heading #{anchor}"


@by_page
def test_commands_and_their_flags_exist(page):
  for marked, words in all_commands(page):
    for file, arguments in calls(words):
      check_flags(file, arguments)
    runs = is_after_quickstart(words) or shlex.join(words).startswith(TOOLS)
    set_up = any(words in commands(text) for text in SET_UP)
    assert marked or runs or set_up, (
      f"{shlex.join(words)}: say what it needs: <!-- needs a cloud -->"
    )


@by_page
def test_flags_in_sentences_exist(page):
  known = {flag for file in PROGRAMS if file.suffix in (".py", ".sh") for flag in flags_of(file)}
  for flag in (flag for code in spans(page) for flag in flag_names(code.split())):
    assert flag.removeprefix("config.") in DEFAULTS or flag in known, f"--{flag}"


@by_page
def test_python_blocks_import_what_exists(page):
  for _, content in blocks(page, "python"):
    for node in ast.walk(ast.parse(content)):
      if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mlembed_jax"):
        module = importlib.import_module(node.module)
        assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)


@by_page
def test_manifests_have_the_fields_that_preparation_knows(page):
  for entry in (entry for _, text in blocks(page, "json") for entry in json.loads(text).values()):
    assert set(entry) <= set(manifest.REQUIRED | manifest.OPTIONAL)
    assert set(entry) >= set(manifest.REQUIRED) or set(entry) == set(manifest.REQUIRED_HELDOUT)


@by_page
def test_configurations_exist(page):
  for name, variant in re.findall(r"configs/(\w+)\.py(?::(\w+))?", text_of(page)):
    file = ROOT / f"configs/{name}.py"
    assert file.is_file(), file
    if name not in ("from_hf", "elastic"):  # there a model follows
      load_module(file).get_config(variant)


@by_page
def test_settings_in_sentences_exist(page):
  groups = "|".join(sorted({name.partition(".")[0] for name in DEFAULTS}))
  modules = {path.stem for path in PACKAGE.iterdir()}
  for code in spans(page):
    name = code.removeprefix("--config.").partition("=")[0].replace("{task}", "retrieval")
    if re.fullmatch(rf"({groups})\.[\w.]+", name) and not name.endswith((".json", ".md", ".py")):
      in_module = name.partition(".")[0] in modules and is_there(name)
      assert name in DEFAULTS or in_module, code


def names_in(file):
  """Returns the names that a file defines, of classes their attributes too."""
  found = set()
  for node in ast.walk(ast.parse(text_of(file))):
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
      found.add(node.name)
    elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
      found.add(node.id)
  return found


def is_there(name):
  """Returns whether a dotted name is a module of the package, or defined in one."""
  parts = name.removeprefix("mlembed_jax.").split(".")
  for end in range(len(parts), 0, -1):
    stem = PACKAGE.joinpath(*parts[:end])
    file = next((f for f in (stem.with_suffix(".py"), stem / "__init__.py") if f.is_file()), None)
    if file:
      return set(parts[end:]) <= names_in(file)
  return hasattr(importlib.import_module("mlembed_jax"), parts[0])


@by_page
def test_modules_in_sentences_exist(page):
  rooms = "|".join(sorted(path.stem for path in PACKAGE.iterdir()))
  for code in spans(page):
    found = re.match(rf"((?:mlembed_jax|{rooms})(?:\.\w+)+)(?=$|[( ])", code)
    if found and found[1] not in DEFAULTS and not found[1].endswith(".json"):
      assert is_there(found[1]), code


@by_page
def test_files_in_sentences_exist_or_are_written(page):
  code = "\n".join(text_of(path) for path in PACKAGE.rglob("*.py"))
  for name in spans(page):
    if re.fullmatch(r"[\w.\-/]+\.(?:py|md|sh|sbatch|toml|yaml|js)", name):
      homes = (ROOT, PACKAGE, ROOT / "configs", ROOT / "docs")
      assert any((home / name).exists() for home in homes), name
    elif re.fullmatch(r"[\w.\-/]+\.(?:json|jsonl|html|png|npy|safetensors|pth)", name):
      assert name in EXAMPLES or re.search(rf"[\"'/.]{name.split('/')[-1]}\b", code), name


def codes(pattern, folder):
  return set(re.findall(pattern, "\n".join(map(text_of, sorted(folder.rglob("*.py"))))))


def test_all_checks_and_error_codes_are_listed():
  rows = re.findall(r"^\| ([DE]\d+)\b", text_of(ROOT / "docs/export.md"), re.MULTILINE)
  in_code = codes(r"Check\(\"(D\d\d)\"", PACKAGE) | codes(r"(?<!noqa: )\bE\d{3}\b", PACKAGE / "hf")
  assert rows == sorted(in_code)


def test_the_readers_of_every_check_are_listed():
  rows = {row[0]: row[2] for row in table(ROOT / "docs/export.md", "## The doctor")[1:]}
  rows = {title.partition(" ")[0]: (title, readers) for title, readers in rows.items()}
  names = [consumer.name for consumer in consumers.CONSUMERS if not consumer.own_file]
  for check in (*examine.CHECKS, examine.DIGESTS):
    title, readers = rows[check.code]
    assert title == f"{check.code} {check.name}"
    listed, fact = readers.removeprefix("all but "), consumers.concerned(check.fact)
    found = {"all": names, "people": []}.get(listed, listed.split(", "))
    wanted = set(names) - set(fact) if readers != listed else set(fact)
    assert set(found) == wanted, check.code
  loaded = [consumer.name for consumer in consumers.CONSUMERS if consumer.load]
  assert rows[examine.VECTORS.code][1].split(", ") == [examine.VECTORS.fact, *loaded]


def test_the_switches_of_the_published_recipe_are_listed_with_their_values():
  rows = table(ROOT / "docs/training.md", "### The published recipe")[1:]
  listed = {name.strip("`"): values for name, *values in rows}
  assert set(listed) == {name for name in REFERENCE if REFERENCE[name] != DEFAULTS[name]}
  for name, cells in listed.items():
    stated = [cell.replace("\\", "").partition(":")[0].strip("`") for cell in cells]
    assert stated == [str(DEFAULTS[name]), str(REFERENCE[name])]


def test_the_table_of_sizes_is_that_of_the_configurations():
  for file, *cells in table(ROOT / "docs/training.md", "## Sizes")[1:]:
    values = load_module(ROOT / file.strip("`")).get_config().model
    model = ModelConfig(**{**values, "lora": NO_LORA})
    count, in_table = parameter_count(model), model.rank * (model.vocab + model.width)
    shape = f"{model.layers} x {model.width}"
    assert cells == [shape, str(model.rank), f"{count:,}", f"{100 * in_table / count:.0f} %"]


def test_the_generations_of_tpus_and_the_pods_of_all_sizes_are_listed():
  words = {row[0]: row[1] for row in table(ROOT / "docs/glossary.md", "## Machines")}
  assert set(re.findall(r"v\d\w?|tpu\d\w", words["generation"].lower())) == set(TPUS)
  rows = table(ROOT / "docs/estimate.md", "## All sizes")
  listed = {(row[0].strip("`"), row[1]) for row in rows if row[0] != "config"}
  pods = load_module(ROOT / "configs/base.py").PODS
  assert listed == {
    (f"{size}.py:{name}", f"{name}:{'x'.join(map(str, TPUS[name].pod))}")
    for name, sizes in pods.items()
    for size in sizes
  }


def test_the_task_types_are_listed_with_their_negatives():
  rows = table(ROOT / "docs/data.md", "## Files and the manifest")
  used = {row[0].strip("`"): row[-1] for row in rows if len(row) == 3 and row[0] != "`task_type`"}
  assert set(used) == set(manifest.TASK_TYPES)
  for name, negatives in used.items():
    assert negatives == str(DEFAULTS.get(f"losses.{name}.negatives", "none"))


def test_the_changelog_has_the_versions_of_all_formats():
  parity = re.search(r"\"format_version\": (\d+)", text_of(PACKAGE / "hf/parity.py"))
  versions = {
    "run.json": workdir.FORMAT,
    "eval/step_N.json": workdir.SCORES_FORMAT,
    "scores.json": evaluation.FORMAT,
    "mlembed.json": own_file.FORMAT,
    "parity.json": int(parity[1]),
    "catalog.json": catalog.VERSION,
  }
  rows = table(HISTORY, "## Formats of files")[1:]
  assert {row[0].split("`")[1]: int(re.match(r"\d+", row[-1])[0]) for row in rows} == versions


def test_no_block_of_a_page_has_an_unknown_language():
  languages = {of for page in PAGES for _, of, _ in BLOCK.findall(text_of(page))}
  assert languages <= {"sh", "python", "json", ""}
