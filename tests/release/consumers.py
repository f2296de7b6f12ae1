"""Loads exported folders in pinned versions of sentence-transformers and transformers.

    python -m tests.release.consumers FOLDER...

Before a release, with the folders of a real model: whole, cut along each axis, and -uv. Makes a
virtual environment for each of ENVIRONMENTS in `--root`, where the next run finds it again; they
share the torch of this interpreter, if it has the right one. Every text of parity.json must have
the same ids, and a vector of cosine 0.9999 or more, in float32; ends with status 1 otherwise.
"""

import argparse
import importlib.metadata
import json
import math
import os
import pathlib
import re
import subprocess
import sys
import venv
from collections.abc import Iterator
from importlib.metadata import Distribution
from typing import Any

TORCH = "2.13.0"
PROGRAMS = ("sentence-transformers", "transformers")
ENVIRONMENTS = (  # versions of PROGRAMS
  ("6.2.0", "5.24.0"),
  ("5.1.2", "4.57.1"),
)
MIN_COSINE = 0.9999


def make(root: pathlib.Path, versions: tuple[str, ...]) -> pathlib.Path:
  """Returns the interpreter of an environment with these versions."""
  path = root / "-".join(versions)
  venv.create(path, with_pip=True, symlinks=True)
  python, wanted = path / "bin" / "python", list(zip(PROGRAMS, versions, strict=True))
  if shared := share_torch(root / "torch"):
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    own = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    (pathlib.Path(own.stdout.strip()) / "torch.pth").write_text(f"{shared}\n", encoding="utf-8")
  else:
    wanted.append(("torch", TORCH))
  pins = [f"{name}=={version}" for name, version in wanted]
  subprocess.run([python, "-m", "pip", "install", "--quiet", *pins], check=True)
  return python


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


def probe(python: pathlib.Path, folder: pathlib.Path) -> dict[str, Any]:
  """Returns what probe.py says; {"error": its last line} where it fails."""
  script = pathlib.Path(__file__).with_name("probe.py")
  # Code of -uv folders is copied there, and no folder may be looked up elsewhere.
  environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(python.parents[1] / "hf")}
  done = subprocess.run(
    [python, script, folder], capture_output=True, text=True, env=environment, check=False
  )
  if done.returncode:
    return {"error": (done.stderr.strip() or "no output").splitlines()[-1]}
  return json.loads(done.stdout.splitlines()[-1])


def line(
  folder: pathlib.Path, versions: tuple[str, ...], found: dict[str, Any]
) -> tuple[str, bool]:
  """Returns the line of a folder in an environment, and whether all is well."""
  wanted = dict(zip(PROGRAMS, versions, strict=True))
  parts = [folder.name, ", ".join(f"{name} {version}" for name, version in wanted.items())]
  if "error" in found:
    return "  ".join([*parts, "FAILED", found["error"]]), False
  results = found["results"].values()
  least = min(result["cosine"] for result in results)
  other = sorted({name for result in results for name in result["other_ids"]})
  installed = {name: found["versions"][name] for name in PROGRAMS}
  well = not math.isnan(least) and least >= MIN_COSINE and not other and installed == wanted
  parts.append(f"least cosine {least:.7f} of {sum(result['texts'] for result in results)} vectors")
  parts.append(f"other ids: {', '.join(other)}" if other else "ids equal")
  parts += [] if installed == wanted else [f"but it has {installed}"]
  return "  ".join([*parts, "ok" if well else "FAILED"]), well


def lines(root: pathlib.Path, folders: list[pathlib.Path]) -> Iterator[tuple[str, bool]]:
  for versions in ENVIRONMENTS:
    python = make(root, versions)
    for folder in folders:
      yield line(folder, versions, probe(python, folder))


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("folders", nargs="+", type=pathlib.Path, help="that export wrote")
  parser.add_argument(
    "--root",
    type=pathlib.Path,
    default=pathlib.Path("/tmp/mlembed_consumers"),
    help="of the environments",
  )
  args = parser.parse_args()
  all_well = True
  for text, well in lines(args.root.absolute(), [f.absolute() for f in args.folders]):
    print(text, flush=True)
    all_well &= well
  sys.exit(0 if all_well else 1)


if __name__ == "__main__":
  main()
