"""Says what each program that reads Hugging Face folders would make of one, or checks a workdir.

  python -m mlembed_jax.doctor DIR

One line for each finding: check, result, file, what was found, and the remedy; then one for each
program. Our loader, and sentence-transformers and transformers where they are installed, really
load the folder, and their vectors are compared with parity.json. What TEI, vLLM and llama.cpp parse
is checked, without them. Of a workdir, every checkpoint is compared with its digests, and every
other file is read. Nothing is written or downloaded. Ends with status 0 where all is well, 1 where
there are warnings, 2 where there are errors.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from absl import flags

from mlembed_jax import cli
from mlembed_jax.hf.checks.finding import ERROR, OK, WARNING, Finding
from mlembed_jax.workdir import RUN

# What imports jax is imported in the functions, so that --help does not wait for it.
if TYPE_CHECKING:
  from mlembed_jax.hf.checks.examine import Verdict

TORCH = flags.DEFINE_bool(
  "torch", True, "Load the folder with sentence-transformers and transformers, if installed."
)
JSON = flags.DEFINE_bool("json", False, "Print one JSON object instead of lines.")


STATUS = {OK: 0, WARNING: 1, ERROR: 2}


def main(directory: str) -> None:
  """Examines a folder; ends with the status."""
  import jax

  from mlembed_jax.hf.checks import examine

  path = pathlib.Path(directory).absolute()
  jax.config.update("jax_platforms", "cpu")  # parity.json is of it, and accelerators may be in use
  if (path / RUN).is_file():
    from mlembed_jax.training.examine import examine as examine_workdir

    _end(path, examine_workdir(path), [])
  if not (path / "config.json").is_file():
    print(
      f"error: {directory} is neither a model folder (no config.json) nor a workdir (no run.json)",
      file=sys.stderr,
    )
    sys.exit(STATUS[ERROR])
  os.environ["HF_HUB_OFFLINE"] = "1"
  installed = examine.INSTALLED if TORCH.value else ()
  checks = [*examine.CHECKS, examine.DIGESTS, examine.VECTORS, *installed]
  findings = examine.examine(path, checks)
  _end(path, findings, examine.verdicts(path, findings))


def _end(path: pathlib.Path, findings: Sequence[Finding], found: Sequence[Verdict]) -> NoReturn:
  """Prints all findings; ends with the status of the worst."""
  from mlembed_jax.hf.checks.examine import worst

  print(_json(path, findings, found) if JSON.value else _text(findings, found))
  sys.exit(STATUS[worst(findings)])


def _text(findings: Sequence[Finding], found: Sequence[Verdict]) -> str:
  return "\n".join([*map(_line, findings), "", *map(str, found)])


def _line(finding: Finding) -> str:
  said = ": ".join(part for part in (finding.file, finding.found.rstrip(".")) if part)
  end = " " if said.endswith("?") else ". "
  remedy = f"{end}{finding.remedy}" if finding.remedy else ""
  return f"{finding.check} {finding.name:<12} {finding.level:<8} {said}{remedy}".rstrip()


def _json(path: pathlib.Path, findings: Sequence[Finding], found: Sequence[Verdict]) -> str:
  from mlembed_jax.hf.checks import examine

  level = examine.worst(findings)
  report = {
    "folder": str(path),
    "result": level,
    "findings": [_fields(finding) for finding in findings],
    "consumers": [dataclasses.asdict(verdict) for verdict in found],
  }
  return json.dumps(report, indent=2, ensure_ascii=False)


def _fields(finding: Finding) -> dict[str, Any]:
  from mlembed_jax.hf.checks.consumers import concerned

  return {
    "check": finding.check,
    "name": finding.name,
    "level": finding.level,
    "file": finding.file,
    "found": finding.found,
    "remedy": finding.remedy,
    "consumers": concerned(finding.fact) if finding.fact else (),
  }


if __name__ == "__main__":
  cli.run(main, "DIR")
