"""All checks of a folder, and what they mean for each program that reads it."""

import dataclasses
import pathlib
from collections.abc import Iterator, Sequence

from mlembed_jax.hf.checks import small_files, tokenizer, vectors, weights
from mlembed_jax.hf.checks.consumers import CONSUMERS, Consumer, Fact, concerned
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
from mlembed_jax.hf.checks.installed import LLAMA

# None computes vectors or imports torch; the weights are read once.
CHECKS = (
  Check("D01", "files", small_files.check_files, Fact.MODEL),
  Check("D02", "json", small_files.check_json, Fact.MODEL),
  Check("D03", "tensors", weights.check_tensors, Fact.MODEL),
  Check("D04", "depth", weights.check_depth, Fact.MODEL),
  Check("D05", "rotary", small_files.check_rotary_base, Fact.MODEL),
  Check("D06", "architecture", small_files.check_architecture, Fact.AUTO_MAP),
  Check("D07", "modules", small_files.check_modules, File.MODULES, (File.MODULES,)),
  Check("D08", "pooling", small_files.check_pooling, Fact.LAST_TOKEN, (File.MODULES,)),
  Check("D09", "dimension", weights.check_dimension, Fact.DENSE_MODULE),
  Check("D10", "prompts", small_files.check_prompts, File.PROMPTS, (File.PROMPTS,)),
  Check("D11", "length", small_files.check_text_length, Fact.TEXT_LENGTH, (File.BERT,)),
  Check("D12", "token", tokenizer.check_pooled_token, Fact.LAST_TOKEN, (File.TOKENIZER,)),
  Check("D13", "converter", tokenizer.check_llama_converter, Fact.GGUF, (File.TOKENIZER,)),
  Check("D14", "factors", weights.check_factors, File.OWN, (File.OWN,)),
  Check("D15", "card", small_files.check_card, "", (File.CARD, File.OWN)),  # people read the card
)
DIGESTS = Check("D17", "digests", small_files.check_digests, "", (File.OWN,))  # reads every byte
VECTORS = Check("D16", "vectors", vectors.check_vectors, vectors.OURS)
# VECTORS of the other programs, with torch; skipped where they are not installed.
UNCHECKED = "unchecked"  # level of the verdict of a program that was not run
INSTALLED = tuple(
  Check(VECTORS.code, VECTORS.name, consumer.load, consumer.name)
  for consumer in CONSUMERS
  if consumer.load
)


@dataclasses.dataclass(frozen=True)
class Verdict:
  """What a program makes of the folder."""

  consumer: str
  level: str  # OK is of programs that were run
  because: tuple[str, ...]  # checks
  note: str
  ran: bool = False  # the verdict is that of running it, not of reading its files

  def __str__(self) -> str:
    """Returns the line of this program."""
    checks = ", ".join(self.because)
    said = {
      OK: "ok",
      SKIPPED: "does not read it",
      UNCHECKED: "not checked: it was not run; what it reads has no fault",
      WARNING: f"warnings: {checks}",
      ERROR: f"{'fails' if self.ran else 'would fail'} because of {checks}",
    }[self.level]
    said = f"not run: {said}" if self.level in (WARNING, ERROR) and not self.ran else said
    return f"{self.consumer:<22} {said}" + (f"; {self.note}" if self.note else "")


def examine(path: pathlib.Path, checks: Sequence[Check] = CHECKS) -> list[Finding]:
  """Returns what each check found in a folder, at least one finding each; nothing is raised."""
  subject = Subject(path)
  return [finding for check in checks for finding in _findings(subject, check)]


def _findings(subject: Subject, check: Check) -> Iterator[Finding]:
  for finding in list(_run(subject, check)) or [Finding(OK, "", "")]:
    yield dataclasses.replace(
      finding, fact=finding.fact or check.fact, check=check.code, name=check.name
    )


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
  subject = Subject(path)
  return [
    Verdict(consumer.name, SKIPPED, (), why)
    if (why := _unread(subject, consumer))
    else _verdict(consumer.name, [f for f in findings if consumer.depends_on(f.fact)])
    for consumer in CONSUMERS
  ]


def _unread(s: Subject, consumer: Consumer) -> str:
  """Returns why a program does not read the folder, "" where it does."""
  if consumer.own_file:
    wanted = f"there is no {consumer.own_file}; export --variants onnx writes one"
    return "" if s.has(consumer.own_file) else wanted
  if consumer.name == LLAMA and (why := tokenizer.unread_by_llama_cpp(s)):
    return why
  alone = s.is_remote and not consumer.depends_on(Fact.TWO_FACTORS)
  return "the token table is stored as two factors" if alone else ""


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
  well = OK if ran else UNCHECKED
  return Verdict(name, level if because else well, because, "; ".join(notes), bool(ran))


def _is_of_running(name: str, finding: Finding) -> bool:
  return (finding.check, finding.fact) == (VECTORS.code, name) and finding.level != SKIPPED


def _is_skipped_for(name: str, finding: Finding) -> bool:
  return finding.level == SKIPPED and concerned(finding.fact) == (name,)


def worst(findings: Sequence[Finding]) -> str:
  """Returns the gravest level among findings; what was skipped is no fault."""
  level = max((f.level for f in findings), key=LEVELS.index, default=OK)
  return OK if level == SKIPPED else level
