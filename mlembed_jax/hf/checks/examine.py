"""All checks of a folder, and what they mean for each program that reads it."""

import dataclasses
import pathlib
from collections.abc import Iterator, Sequence

from mlembed_jax.hf.checks import small_files, tokenizer, weights
from mlembed_jax.hf.checks.finding import (
  AGAIN,
  CONSUMERS,
  EMBEDDERS,
  ERROR,
  LEVELS,
  LLAMA,
  OK,
  OURS,
  OWN,
  SERVERS,
  SKIPPED,
  ST,
  TEI,
  TRANSFORMERS,
  VLLM,
  WARNING,
  Check,
  Finding,
  Said,
  Subject,
)

# None computes vectors or imports torch; the weights are read once.
CHECKS = (
  Check("D01", small_files.d01, CONSUMERS),
  Check("D02", small_files.d02, CONSUMERS),
  Check("D03", weights.d03, CONSUMERS),
  Check("D04", weights.d04, CONSUMERS),
  Check("D05", small_files.d05, CONSUMERS),
  Check("D06", small_files.d06, (ST, TRANSFORMERS)),
  Check("D07", small_files.d07, (ST, *SERVERS), (small_files.MODULES,)),
  Check("D08", small_files.d08, EMBEDDERS, (small_files.MODULES,)),
  Check("D09", weights.d09, (ST, TEI, VLLM)),
  Check("D10", small_files.d10, (OURS, ST), (small_files.PROMPTS,)),
  Check("D11", small_files.d11, (OURS, ST, TEI, VLLM), (small_files.BERT,)),
  Check("D12", tokenizer.d12, EMBEDDERS, (tokenizer.FILE,)),
  Check("D13", tokenizer.d13, (LLAMA,), (tokenizer.FILE,)),
  Check("D14", weights.d14, (OURS,), (OWN,)),
  Check("D15", small_files.d15, (), (small_files.CARD, OWN)),  # the card, which people read
)


@dataclasses.dataclass(frozen=True)
class Verdict:
  """What a program makes of the folder."""

  consumer: str
  level: str
  because: tuple[str, ...]  # checks
  note: str

  def __str__(self) -> str:
    """Returns the line of this program."""
    said = {
      OK: "ok",
      SKIPPED: "does not read it",
      WARNING: "warnings: " + ", ".join(self.because),
      ERROR: "would fail because of " + ", ".join(self.because),
    }[self.level]
    return f"{self.consumer:<22} {said}" + (f"; {self.note}" if self.note else "")


def examine(path: pathlib.Path, checks: Sequence[Check] = CHECKS) -> list[Finding]:
  """Returns what each check found in a folder, at least one finding each; nothing is raised."""
  subject = Subject(path)
  return [finding for check in checks for finding in _findings(subject, check)]


def _findings(subject: Subject, check: Check) -> Iterator[Finding]:
  said = list(_said(subject, check)) or [Said(OK, "", "")]
  for level, file, found, remedy, consumers in said:
    yield Finding(check.name, level, file, found, remedy, consumers or check.consumers)


def _said(subject: Subject, check: Check) -> Iterator[Said]:
  if absent := [file for file in check.needs if not subject.has(file)]:
    yield Said(SKIPPED, "", f"{absent[0]} is not there")
    return
  try:
    yield from check.run(subject)
  except Exception as error:  # a file may hold anything at all, and tokenizers raises bare ones
    found = f"cannot be examined, {type(error).__name__}: {error}"
    yield Said(ERROR, "", found, AGAIN)


def verdicts(path: pathlib.Path, findings: Sequence[Finding]) -> list[Verdict]:
  """Returns one verdict for each program."""
  remote = Subject(path).is_remote
  return [
    Verdict(name, SKIPPED, (), "the token table is stored as two factors")
    if remote and name in SERVERS
    else _verdict(name, [f for f in findings if name in f.consumers])
    for name in CONSUMERS
  ]


def _verdict(name: str, findings: Sequence[Finding]) -> Verdict:
  level = ERROR if any(f.level == ERROR for f in findings) else WARNING
  because = tuple(dict.fromkeys(f.check for f in findings if f.level == level))
  # What is said to this program alone.
  said = [f.found for f in findings if f.level in (OK, SKIPPED) and f.consumers == (name,)]
  notes = [found.removeprefix(name).lstrip(": ") for found in said if found]
  return Verdict(name, level if because else OK, because, "; ".join(notes))


def worst(findings: Sequence[Finding]) -> str:
  """Returns the gravest level among findings; what was skipped is no fault."""
  level = max((f.level for f in findings), key=LEVELS.index, default=OK)
  return OK if level == SKIPPED else level
