"""All checks of a folder, and what they mean for each program that reads it."""

import dataclasses
import pathlib
from collections.abc import Iterator, Sequence

from mlembed_jax.hf.checks import small_files, tokenizer, vectors, weights
from mlembed_jax.hf.checks.consumers import CONSUMERS, Fact, concerned
from mlembed_jax.hf.checks.finding import (
  AGAIN,
  ERROR,
  LEVELS,
  OK,
  SKIPPED,
  WARNING,
  Check,
  File,
  Finding,
  Subject,
)

# None computes vectors or imports torch; the weights are read once.
CHECKS = (
  Check("D01", small_files.check_files, Fact.MODEL),
  Check("D02", small_files.check_json, Fact.MODEL),
  Check("D03", weights.check_tensors, Fact.MODEL),
  Check("D04", weights.check_depth, Fact.MODEL),
  Check("D05", small_files.check_rotary_base, Fact.MODEL),
  Check("D06", small_files.check_architecture, Fact.AUTO_MAP),
  Check("D07", small_files.check_modules, File.MODULES, (File.MODULES,)),
  Check("D08", small_files.check_pooling, Fact.LAST_TOKEN, (File.MODULES,)),
  Check("D09", weights.check_dimension, Fact.DENSE_MODULE),
  Check("D10", small_files.check_prompts, File.PROMPTS, (File.PROMPTS,)),
  Check("D11", small_files.check_text_length, Fact.TEXT_LENGTH, (File.BERT,)),
  Check("D12", tokenizer.check_pooled_token, Fact.LAST_TOKEN, (File.TOKENIZER,)),
  Check("D13", tokenizer.check_llama_converter, Fact.GGUF, (File.TOKENIZER,)),
  Check("D14", weights.check_factors, File.OWN, (File.OWN,)),
  Check("D15", small_files.check_card, "", (File.CARD, File.OWN)),  # people read the card
)
VECTORS = Check("D16", vectors.check_vectors, vectors.OURS)
# VECTORS of the other programs, with torch; skipped where they are not installed.
INSTALLED = tuple(
  Check(VECTORS.code, consumer.load, consumer.name) for consumer in CONSUMERS if consumer.load
)


@dataclasses.dataclass(frozen=True)
class Verdict:
  """What a program makes of the folder."""

  consumer: str
  level: str
  because: tuple[str, ...]  # checks
  note: str
  ran: bool = False  # the verdict is that of running it, not of reading its files

  def __str__(self) -> str:
    """Returns the line of this program."""
    said = {
      OK: "ok",
      SKIPPED: "does not read it",
      WARNING: "warnings: " + ", ".join(self.because),
      ERROR: f"{'fails' if self.ran else 'would fail'} because of " + ", ".join(self.because),
    }[self.level]
    said = said if self.ran or self.level == SKIPPED else f"not run: {said}"
    return f"{self.consumer:<22} {said}" + (f"; {self.note}" if self.note else "")


def examine(path: pathlib.Path, checks: Sequence[Check] = CHECKS) -> list[Finding]:
  """Returns what each check found in a folder, at least one finding each; nothing is raised."""
  subject = Subject(path)
  return [finding for check in checks for finding in _findings(subject, check)]


def _findings(subject: Subject, check: Check) -> Iterator[Finding]:
  for finding in list(_run(subject, check)) or [Finding(OK, "", "")]:
    yield dataclasses.replace(finding, fact=finding.fact or check.fact, check=check.code)


def _run(subject: Subject, check: Check) -> Iterator[Finding]:
  if absent := [file for file in check.needs if not subject.has(file)]:
    yield Finding(SKIPPED, "", f"{absent[0]} is not there")
    return
  try:
    yield from check.run(subject)
  except Exception as error:  # a file may hold anything at all, and tokenizers raises bare ones
    found = f"cannot be examined, {type(error).__name__}: {error}"
    yield Finding(ERROR, "", found, AGAIN)


def verdicts(path: pathlib.Path, findings: Sequence[Finding]) -> list[Verdict]:
  """Returns one verdict for each program: of those that were run, what running them gave."""
  remote = Subject(path).is_remote
  return [
    Verdict(consumer.name, SKIPPED, (), "the token table is stored as two factors")
    if remote and not consumer.depends_on(Fact.TWO_FACTORS)
    else _verdict(consumer.name, [f for f in findings if consumer.depends_on(f.fact)])
    for consumer in CONSUMERS
  ]


def _verdict(name: str, findings: Sequence[Finding]) -> Verdict:
  ran = [f for f in findings if _is_of_running(name, f)]
  level = ERROR if any(f.level == ERROR for f in ran or findings) else WARNING
  because = tuple(dict.fromkeys(f.check for f in ran or findings if f.level == level))
  # A note says what is well, what was skipped for this program alone, and what else was read.
  said = [f.found for f in findings if f.level == OK or _is_skipped_for(name, f)]
  notes = [found.removeprefix(name).lstrip(": ") for found in said if found]
  others = {f.check: None for f in findings if f.level in (WARNING, ERROR) and f not in ran}
  if ran and others:
    notes.append(f"other versions may heed {', '.join(others)}")
  return Verdict(name, level if because else OK, because, "; ".join(notes), bool(ran))


def _is_of_running(name: str, finding: Finding) -> bool:
  return (finding.check, finding.fact) == (VECTORS.code, name) and finding.level != SKIPPED


def _is_skipped_for(name: str, finding: Finding) -> bool:
  return finding.level == SKIPPED and concerned(finding.fact) == (name,)


def worst(findings: Sequence[Finding]) -> str:
  """Returns the gravest level among findings; what was skipped is no fault."""
  level = max((f.level for f in findings), key=LEVELS.index, default=OK)
  return OK if level == SKIPPED else level
