"""Loads exported folders in pinned versions of the programs that people serve them with.

    python -m tests.release.consumers FOLDER...

Before a release, with the folders of a real model: whole, cut along each axis, -uv, -onnx,
-onnx-int8, and with GGUF files. Makes an environment for each of ENVIRONMENTS in `--root`, where
the next run finds it again; those of PyTorch share that of this interpreter, if it has the right
one. Every text of parity.json that the program treats as the folder says must have the same ids,
and a vector of cosine 0.9999 or more, in float32 (0.98 where the weights have 8 bits). Prints a
table; ends with status 1 where a program fails. What cannot be installed is named, and skipped.
"""

import argparse
import dataclasses
import importlib.metadata
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import venv
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import Distribution
from typing import Any, NoReturn

from tests.release.programs import ENVIRONMENTS, TORCH, Environment

MIN_COSINE, MIN_COSINE_INT8 = 0.9999, 0.98


class NotInstalled(Exception):
  """An environment cannot be made; the message is the last line of its installer."""


@dataclasses.dataclass(frozen=True)
class Row:
  """What a program makes of a folder."""

  folder: str
  program: str
  said: str
  well: bool

  def __str__(self) -> str:
    """Returns the row of the table."""
    return f"{self.folder:<32} {self.program:<62} {self.said}"


def make(root: pathlib.Path, environment: Environment) -> pathlib.Path:
  """Returns the folder of an environment; makes it where it is not there, of the same packages.

  Raises:
    NotInstalled: a package cannot be installed.
  """
  path = root / environment.name
  made = path / "packages.txt"  # written last
  packages = "\n".join(environment.packages)
  if not made.is_file() or made.read_text(encoding="utf-8") != packages:
    _make(path, root, environment)
    made.write_text(packages, encoding="utf-8")
  return path


def _make(path: pathlib.Path, root: pathlib.Path, environment: Environment) -> None:
  if environment.is_node:
    path.mkdir(parents=True, exist_ok=True)
    # The scripts of its packages fetch libraries for GPUs.
    quiet = ("--silent", "--ignore-scripts", "--prefix", str(path))
    install(["npm", "install", *quiet, *environment.packages])
    return
  venv.create(path, with_pip=True, symlinks=True)
  python, packages = str(path / "bin" / "python"), list(environment.packages)
  if environment.needs_torch:
    if shared := share_torch(root / "torch"):
      code = "import sysconfig; print(sysconfig.get_path('purelib'))"
      own = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
      (pathlib.Path(own.stdout.strip()) / "torch.pth").write_text(f"{shared}\n", encoding="utf-8")
    else:
      packages.append(f"torch=={TORCH}")
  index = ["--extra-index-url", environment.index] if environment.index else []
  install([python, "-m", "pip", "install", "--quiet", *index, *packages])
  if environment.removed:
    install([python, "-m", "pip", "uninstall", "--quiet", "--yes", *environment.removed])


def probe_words(path: pathlib.Path, environment: Environment) -> list[str]:
  """Returns the words that run a probe in an environment."""
  here = pathlib.Path(__file__)
  if environment.is_node:
    return ["node", shutil.copy(here.with_name("probe.mjs"), path)]  # packages lie beside it
  return [str(path / "bin" / "python"), str(here.with_name("probe.py"))]


def install(words: list[str]) -> None:
  """Runs an installer; raises NotInstalled where it fails."""
  try:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
  except FileNotFoundError as error:
    raise NotInstalled(f"{words[0]} is not there") from error
  if done.returncode:
    raise NotInstalled((done.stderr.strip() or "no output").splitlines()[-1])


def share_torch(folder: pathlib.Path) -> pathlib.Path | None:
  """Returns a folder of links to torch and what it needs; None where another torch is here.

  Nothing else is shared: transformers imports whatever it finds, of any version.
  """
  try:
    version = importlib.metadata.version("torch").partition("+")[0]
  except importlib.metadata.PackageNotFoundError:
    version = None
  if version != TORCH:
    return None
  folder.mkdir(parents=True, exist_ok=True)
  for distribution in _with_requirements("torch", {}).values():
    for name in {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}:
      if not (folder / name).exists():
        (folder / name).symlink_to(pathlib.Path(str(distribution.locate_file(name))))
  return folder


def _with_requirements(name: str, found: dict[str, Distribution]) -> dict[str, Distribution]:
  """Returns `found` with a distribution and all that it requires, of what is installed."""
  try:
    distribution = importlib.metadata.distribution(name)
  except importlib.metadata.PackageNotFoundError:
    return found  # of another platform
  found[name] = distribution
  for requirement in distribution.requires or ():
    required = re.split(r"[^\w.-]", requirement, maxsplit=1)[0]
    if "extra ==" not in requirement and required not in found:
      _with_requirements(required, found)
  return found


def probe(words: list[str], folder: pathlib.Path, home: pathlib.Path) -> dict[str, Any]:
  """Returns what a probe says of a folder; {"error": its last line} where it fails."""
  # Code of -uv folders is copied there, and no folder may be looked up elsewhere.
  environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(home)}
  done = subprocess.run(
    [*words, str(folder)], capture_output=True, text=True, env=environment, check=False
  )
  if done.returncode:
    return {"error": (done.stderr.strip() or "no output").splitlines()[-1]}
  return json.loads([line for line in done.stdout.splitlines() if line.startswith("{")][-1])


def read(folder: pathlib.Path, program: str, found: dict[str, Any]) -> tuple[str, bool]:
  """Returns what a probe found in words, and whether all is well."""
  if "error" in found:
    return f"FAILED: {found['error']}", False
  least, other = found["cosine"], found["other_ids"]
  well = least >= bound(folder, program) and not other  # NaN is no more than any bound
  ids = (
    "ids not shown" if other is None else f"other ids: {', '.join(other)}" if other else "ids equal"
  )
  said = f"least cosine {least:.7f} of {found['texts']} texts, {ids}"
  return f"{said}  {'ok' if well else 'FAILED'}", well


def bound(folder: pathlib.Path, program: str) -> float:
  """Returns the least cosine that is right; the files that each program reads differ."""
  own = json.loads((folder / "mlembed.json").read_text(encoding="utf-8"))
  reads_onnx = "onnx" in program or program in ("fastembed", "transformers_js")
  if reads_onnx and own["onnx"] == "int8":
    return MIN_COSINE_INT8
  if program == "llama_cpp" and own["gguf"][0].endswith("Q8_0.gguf"):
    return MIN_COSINE_INT8
  return MIN_COSINE


def rows(root: pathlib.Path, folders: list[pathlib.Path], names: Sequence[str]) -> Iterator[Row]:
  """Yields a row for each program of some environments that reads the files of a folder."""
  for environment in (e for e in ENVIRONMENTS if e.name in names):
    wanted = [f for f in folders if environment.reads(f)]
    if not wanted:
      continue
    try:
      words = probe_words(make(root, environment), environment)
    except NotInstalled as error:
      yield Row("", environment.title, f"skipped, as it cannot be installed: {error}", True)
      continue
    for folder in wanted:
      for program in environment.programs:
        arguments = words if environment.is_node else [*words, program]
        found = probe(arguments, folder, root / environment.name / "hf")
        title = f"{program} ({environment.title})"
        yield Row(folder.name, title, *read(folder, program, found))


def new_parser(description: str) -> argparse.ArgumentParser:
  """Returns a parser of the flag that all scripts with environments have."""
  parser = argparse.ArgumentParser(description=description.split("\n")[0])
  parser.add_argument(
    "--root",
    type=pathlib.Path,
    default=pathlib.Path("/tmp/mlembed_consumers"),
    help="of the environments",
  )
  return parser


def end(found: Iterable[Row]) -> NoReturn:
  """Prints the rows as they come, and ends with status 1 where one is not well."""
  all_well = True
  for row in found:
    print(row, flush=True)
    all_well &= row.well
  sys.exit(0 if all_well else 1)


def main() -> None:
  parser = new_parser(__doc__)
  parser.add_argument("folders", nargs="+", type=pathlib.Path, help="that export wrote")
  names = [environment.name for environment in ENVIRONMENTS]
  parser.add_argument("--only", nargs="+", choices=names, default=names, help="environments")
  args = parser.parse_args()
  end(rows(args.root.absolute(), [f.absolute() for f in args.folders], args.only))


if __name__ == "__main__":
  main()
