"""prepare_report.json: what became of every row."""

import dataclasses
import pathlib
from collections import Counter
from collections.abc import Sequence
from typing import Any

from mlembed_jax.data import languages
from mlembed_jax.data.rows import EXAMPLES, Chunk, Dropped
from mlembed_jax.data.transforms import RowShard, Written
from mlembed_jax.errors import DataError
from mlembed_jax.files import write_json

FILE = "prepare_report.json"


@dataclasses.dataclass
class FileCount:
  """How many rows of one file were read, and why others were dropped."""

  name: str
  chunks: int = 0
  read: int = 0
  other_instructions: int = 0
  dropped: dict[str, Dropped] = dataclasses.field(default_factory=dict)

  def add(self, chunk: Chunk) -> None:
    """Counts one chunk."""
    self.chunks += 1
    self.read += chunk.read
    self.other_instructions += chunk.other_instructions
    for reason, more in chunk.dropped.items():
      old = self.dropped.get(reason, Dropped(0, []))
      examples = (old.examples + more.examples)[:EXAMPLES]
      self.dropped[reason] = Dropped(old.rows + more.rows, examples)

  @property
  def lost(self) -> int:
    """Rows that cannot be used."""
    return sum(dropped.rows for dropped in self.dropped.values())

  def as_json(self) -> dict[str, Any]:
    """Returns the counts."""
    reasons = {reason: dataclasses.asdict(drop) for reason, drop in sorted(self.dropped.items())}
    return {
      "read": self.read,
      "other_instructions": self.other_instructions,
      "dropped": self.lost,
      "dropped_by_reason": reasons,
    }


def check_dropped(counts: Sequence[FileCount], max_dropped_share: float, out: pathlib.Path) -> None:
  """Writes the report as far as it goes; raises DataError where too many rows are unusable."""
  write_json(out / FILE, {"files": {count.name: count.as_json() for count in counts}})
  for count in counts:
    if count.lost > max_dropped_share * count.read or count.lost == count.read:
      reasons = "; ".join(
        f"{reason}: {drop.rows}, e.g. row {', '.join(map(str, drop.examples))}"
        for reason, drop in sorted(count.dropped.items())
      )
      raise DataError(
        f"{count.name}: {count.lost} of {count.read} rows cannot be used, more than "
        f"--max_dropped_share={max_dropped_share} ({reasons}); mend the file or raise the share"
      )


def write_report(
  out: pathlib.Path,
  counts: Sequence[FileCount],
  shards: dict[str, list[RowShard]],
  documents: Sequence[Written],
) -> None:
  """Writes the whole report, and prints which tags training will count as one language."""
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
    "query_tokens": _tokens(shards, "query_tokens"),
    "positive_tokens": _tokens(shards, "positive_tokens"),
    "negative_tokens": _tokens(shards, "negative_tokens"),
  }
  merged = languages.merged(
    run.language for split_shards in shards.values() for shard in split_shards for run in shard.runs
  )
  write_json(out / FILE, {"totals": totals, "merged": merged, "files": files})
  if merged:
    print(languages.merges_text(merged), flush=True)


def _tokens(shards: dict[str, list[RowShard]], field: str) -> int:
  return sum(
    getattr(run, field)
    for split_shards in shards.values()
    for shard in split_shards
    for run in shard.runs
  )
