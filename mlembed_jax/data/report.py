"""prepare_report.json: what became of every row."""

import dataclasses
import pathlib
from collections import Counter
from collections.abc import Sequence
from typing import Any

from mlembed_jax.data import languages
from mlembed_jax.data.names import REPORT
from mlembed_jax.data.records import TRAIN
from mlembed_jax.data.rows import BLANK, EXAMPLES, Chunk, Dropped
from mlembed_jax.data.transforms import RowShard, Written
from mlembed_jax.errors import DataError
from mlembed_jax.files import write_json

SHOWN = 12  # files whose rows are printed
# What messages say of reasons that do not say it themselves; the report has the reasons.
SAID = {
  "wrong_fields": "another number of fields than the header",
  "not_json": "no JSON object",
  BLANK: "a blank line",
  "wrong_type": "a value of another type",
  "invalid_utf8": "bytes that are not UTF-8, or half a surrogate pair,",
  "negative_equals_positive": "a negative equal to a positive",
}
REMEDIES = {
  "wrong_fields": "put fields that hold the separator into quotes",
  "invalid_utf8": "if the file is not UTF-8, convert it, as by iconv -f WINDOWS-1252 -t UTF-8",
}


@dataclasses.dataclass
class FileCount:
  """How many rows of one file were read, and why others were dropped."""

  name: str
  instructed: bool  # what its entry says of its queries, query_has_instruction
  chunks: int = 0
  read: int = 0
  other_instructions: int = 0
  against_manifest: int = 0  # usable rows whose query is otherwise
  dropped: dict[str, Dropped] = dataclasses.field(default_factory=dict)

  def add(self, chunk: Chunk) -> None:
    """Counts one chunk."""
    self.chunks += 1
    self.read += chunk.read
    self.other_instructions += chunk.other_instructions
    self.against_manifest += chunk.against_manifest
    for reason, more in chunk.dropped.items():
      old = self.dropped.get(reason, Dropped(0, [], {}))
      examples = (old.examples + more.examples)[:EXAMPLES]
      columns = dict(Counter(old.columns) + Counter(more.columns))
      self.dropped[reason] = Dropped(old.rows + more.rows, examples, columns)

  @property
  def lost(self) -> int:
    """Rows that cannot be used; blank lines are none."""
    return sum(dropped.rows for dropped in self.dropped.values()) - self.blank

  @property
  def blank(self) -> int:
    """Blank lines among what was read."""
    return self.dropped[BLANK].rows if BLANK in self.dropped else 0

  @property
  def reasons(self) -> str:
    """Why rows cannot be used, with columns and the numbers of the first rows."""
    return "; ".join(_reason(*item) for item in sorted(self.dropped.items()))

  @property
  def remedies(self) -> str:
    """What can be done about rows that cannot be used."""
    known = [REMEDIES[reason] for reason in sorted(self.dropped) if reason in REMEDIES]
    return "; ".join(known or ["mend the file"]) + " or raise the share" * (self.lost < self.read)

  @property
  def contradiction(self) -> str:
    """What is to be said where queries are not as the manifest says; empty where all are."""
    if not self.against_manifest:
      return ""
    begin = "do not begin with an instruction" if self.instructed else "begin with an instruction"
    return (
      f"{self.name}: {self.against_manifest} of {self.read} queries {begin}, but the manifest says "
      f"query_has_instruction: {str(self.instructed).lower()}"
    )

  def as_json(self) -> dict[str, Any]:
    """Returns the counts."""
    reasons = {reason: dataclasses.asdict(drop) for reason, drop in sorted(self.dropped.items())}
    return {
      "read": self.read,
      "other_instructions": self.other_instructions,
      "against_query_has_instruction": self.against_manifest,
      "dropped": self.lost,
      "dropped_by_reason": reasons,
    }


def _reason(name: str, drop: Dropped) -> str:
  """Returns how many rows were left out for a reason, in which columns, and which come first."""
  counted = len(drop.columns) > 1  # a row may lack several
  columns = ", ".join(f"{c} ({n})" if counted else c for c, n in drop.columns.items())
  where = f" in {columns}" if columns else ""
  return (
    f"{SAID.get(name, name)}{where}: {drop.rows}, e.g. row {', '.join(map(str, drop.examples))}"
  )


def check_dropped(counts: Sequence[FileCount], max_dropped_share: float, out: pathlib.Path) -> None:
  """Writes the report as far as it goes.

  Raises:
    DataError: too many rows of a file are unusable, or are not as the manifest says.
  """
  write_json(out / REPORT, {"files": {count.name: count.as_json() for count in counts}})
  for count in counts:
    if count.read and count.read == count.blank:
      raise DataError(f"{count.name} has only blank lines; leave it out of the manifest")
    if count.lost > max_dropped_share * count.read or count.lost + count.blank == count.read:
      raise DataError(
        f"{count.name}: {count.lost} of {count.read} rows cannot be used, more than "
        f"--max_dropped_share={max_dropped_share} ({count.reasons}); {count.remedies}"
      )
    if count.against_manifest > max_dropped_share * count.read:
      raise DataError(
        f"{count.contradiction}, which is more than --max_dropped_share={max_dropped_share}; "
        "correct the manifest or the file, or raise the share"
      )


def write_report(
  out: pathlib.Path,
  counts: Sequence[FileCount],
  shards: dict[str, list[RowShard]],
  documents: Sequence[Written],
  cut: int,
) -> None:
  """Writes the whole report; prints what is left out, and which tags count as one language.

  `cut`: texts that are not stored whole.
  """
  files = {count.name: count.as_json() for count in counts}
  for split, split_shards in shards.items():
    for name, value in files.items():
      mine = [shard for shard in split_shards if shard.file == name]
      value[split] = sum(shard.written.records for shard in mine)
      tags: Counter[str] = Counter()
      for run in (run for shard in mine for run in shard.runs):
        tags[run.language] += run.rows
      value[f"{split}_languages"] = dict(sorted(tags.items()))
  totals = {
    "read": sum(count.read for count in counts),
    "dropped": sum(count.lost for count in counts),
    **{
      split: sum(shard.written.records for shard in split_shards)
      for split, split_shards in shards.items()
    },
    "documents": sum(written.records for written in documents),
    "cut_texts": cut,
    "query_tokens": _tokens(shards, "query_tokens"),
    "positive_tokens": _tokens(shards, "positive_tokens"),
    "negative_tokens": _tokens(shards, "negative_tokens"),
  }
  merged = languages.merged(
    run.language for split_shards in shards.values() for shard in split_shards for run in shard.runs
  )
  write_json(out / REPORT, {"totals": totals, "merged": merged, "files": files})
  for count in counts[:SHOWN]:
    blank = f", and {count.blank:,} blank lines" if count.blank else ""
    print(f"{count.name}: {count.read - count.blank:,} rows{blank}", flush=True)
  if len(counts) > SHOWN:
    print(f"... and {len(counts) - SHOWN} more files, {totals['read']:,} rows in all", flush=True)
  if merged:
    print(languages.merges_text(merged), flush=True)
  for name, value in files.items():
    if unknown := languages.unknown_text(value[f"{TRAIN}_languages"]):
      said = "rows of no known language (give a tag such as de as lang) count as they stand"
      print(f"note: {name}: {said}: {unknown}", flush=True)
  for count in counts:
    if count.lost:
      left_out = f"{count.lost:,} of {count.read:,} rows are left out ({count.reasons})"
      print(f"note: {count.name}: {left_out}", flush=True)


def cut_texts(number: int, max_tokens: int) -> str:
  """Returns what is to be said of texts that are not stored whole."""
  return f"{number:,} texts are longer than --max_tokens {max_tokens}; the rest is not stored"


def _tokens(shards: dict[str, list[RowShard]], field: str) -> int:
  return sum(
    getattr(run, field)
    for split_shards in shards.values()
    for shard in split_shards
    for run in shard.runs
  )
