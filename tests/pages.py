"""The pages for people, and what stands in them: blocks, commands, code spans, links, tables."""

import pathlib
import re
import shlex
from collections.abc import Iterator, Sequence

ROOT = pathlib.Path(__file__).parents[1]
PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))
HISTORY = ROOT / "CHANGELOG.md"  # may name what is gone
NEEDS = r"<!-- needs [^>]+ -->"  # before a block that not everybody can run
BLOCK = re.compile(rf"^(?:({NEEDS})\n)?```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?://)([^)#\s]*)(?:#([^)\s]+))?\)")
# The two commands that README begins with; .ci/run runs the tests and the first one in short form.
SET_UP = (
  'pip install -e ".[quickstart]" && python -m mlembed_jax.train --config configs/quickstart.py'
  " --workdir /tmp/quickstart\n",
  'pip install -e ".[test]" && python -m pytest -n 2\n',
)


def text_of(path: pathlib.Path) -> str:
  return path.read_text(encoding="utf-8")


def anchors(page: pathlib.Path) -> set[str]:
  """Returns the anchors of the headings, as forges make them."""
  headings = re.findall(r"^#+ (.+)$", text_of(page), re.MULTILINE)
  return {
    re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings
  }


def all_blocks(page: pathlib.Path) -> list[tuple[bool, str, str]]:
  """Returns (whether it is marked with what it needs, language, content) of the code blocks."""
  found = BLOCK.findall(text_of(page))
  fences = re.findall(r"^\s*```", text_of(page), re.MULTILINE)
  assert len(found) == len(fences) / 2, f"{page.name}: a fence is not understood; is it indented?"
  return [(bool(needs), of, content) for needs, of, content in found]


def blocks(page: pathlib.Path, language: str) -> list[tuple[bool, str]]:
  """Returns (whether it is marked with what it needs, content) of the blocks of a language."""
  return [(needs, content) for needs, of, content in all_blocks(page) if of == language]


def commands(content: str) -> Iterator[list[str]]:
  """Yields the words of each command of a block."""
  for line in content.replace("\\\n", " ").splitlines():
    words = shlex.split(line, comments=True)
    while words:
      end = words.index("&&") if "&&" in words else len(words)
      yield words[:end]
      words = words[end + 1 :]


def spans(page: pathlib.Path) -> list[str]:
  """Returns the code that stands inside sentences and tables."""
  return re.findall(r"`([^`]+)`", BLOCK.sub("", text_of(page)).replace("\n", " "))


def table(page: pathlib.Path, heading: str) -> list[list[str]]:
  """Returns the cells of the table rows below a heading, up to the next one of any level."""
  section = text_of(page).partition(f"\n{heading}\n")[2].partition("\n#")[0]
  lines = [line for line in section.splitlines() if line.startswith("|") and "---" not in line]
  return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def is_after_quickstart(words: Sequence[str]) -> bool:
  """Returns whether a command is one that tests/release/docs_commands.py runs.

  Those read and write below /tmp alone. The compilation of `aot` takes minutes and is left out.
  """
  set_up = [command for text in SET_UP for command in commands(text)]
  if list(words[:2]) != ["python", "-m"] or list(words) in set_up:
    return False
  if list(words[2:4]) == ["pip", "install"]:
    return True  # what the next blocks of the page need
  paths = [path for path in (word.rpartition("=")[2] for word in words) if path.startswith("/")]
  ours = words[2].startswith("mlembed_jax.") and words[2] != "mlembed_jax.aot"
  return ours and all(path.startswith("/tmp/") for path in paths)
