"""Who may import whom, by the table of docs/architecture.md, over the syntax trees."""

import ast
import functools
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "mlembed_jax"
COMMANDS = {"train", "prepare", "vocabulary", "evaluate", "encode", "search", "export", "doctor"}
COMMANDS |= {"aot", "teach"}
# remote/ is copied into exported folders and never imported.
PATHS = sorted(path for path in PACKAGE.rglob("*.py") if "remote" not in path.parts)
# What starts jax, also by way of another library. `data` uses grain and tfds, which import it only
# where a run reads batches.
JAX = {"jax", "jaxlib", "flax", "optax", "orbax"}
WITHOUT_JAX = {
  *("data", "batch", "errors", "files", "families", "config", "config_fields", "cli"),
  *("workdir", "slice_scores", "typed", "progress"),
}
# `objective` imports these beside our own rooms: none of them reads, writes or asks the system.
FOR_ARRAYS = {
  *("jax", "jaxtyping", "dataclasses", "functools", "math", "operator", "collections", "typing"),
}


def name_of(path):
  parts = path.relative_to(ROOT).with_suffix("").parts
  return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in PATHS}


@functools.cache
def imports(path):
  """Returns the modules that a file imports, also inside functions: ours whole, others' roots."""
  found = set()
  for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
    if isinstance(node, ast.Import):
      found |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      assert not node.level and node.module, f"{path}: a relative import"
      names = {f"{node.module}.{alias.name}" for alias in node.names}
      found |= {name if name in MODULES else node.module for name in names}
  return {name if name in MODULES else name.split(".")[0] for name in found}


def room(module):
  """Returns the folder or module below the package; "" for the package itself."""
  return module.partition(".")[2].partition(".")[0]


def table():
  text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
  rows = re.findall(r"^\| `(\w+)` \| [^|]+ \| ([^|]*)\|$", text, re.MULTILINE)
  return {name: set(re.findall(r"`(\w+)`", allowed)) for name, allowed in rows}


def test_the_table_names_every_room():
  rooms = {room(module) for module in MODULES} - COMMANDS - {"", "__main__"}
  assert set(table()) == rooms


@pytest.mark.parametrize("name", sorted(table()))
def test_a_room_imports_what_the_table_allows_and_no_less(name):
  used = {
    room(target)
    for module, path in MODULES.items()
    if room(module) == name
    for target in imports(path)
    if target in MODULES
  }
  assert used - {name, ""} == table()[name]


def test_nobody_imports_a_command():
  for module, path in MODULES.items():
    commands = {
      target for target in imports(path) if target in MODULES and room(target) in COMMANDS
    }
    assert not commands, f"{module} imports {commands}"


def test_no_module_imports_itself_by_way_of_others():
  done, under_way = set(), []

  def visit(module):
    assert module not in under_way, f"a circle: {[*under_way, module]}"
    if module in done:
      return
    under_way.append(module)
    for target in sorted(imports(MODULES[module])):
      if target in MODULES and target != module:
        visit(target)
    under_way.pop()
    done.add(module)

  for module in MODULES:
    visit(module)


def test_rooms_without_jax_never_import_it():
  for module, path in MODULES.items():
    if room(module) in WITHOUT_JAX:
      assert not imports(path) & JAX, module


@pytest.mark.parametrize("name", sorted(WITHOUT_JAX))
def test_rooms_without_jax_import_each_other_alone(name):
  """Else jax would come by way of a room that the list leaves out."""
  assert table()[name] <= WITHOUT_JAX


def test_arrays_only_in_the_objective():
  """It knows settings, axes and the mesh of its caller, and reads or writes nothing."""
  for module, path in MODULES.items():
    if room(module) == "objective":
      assert imports(path) - set(MODULES) <= FOR_ARRAYS, module
