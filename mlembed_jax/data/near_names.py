"""Fields and columns by the names that others give them, and what ours are called.

The others are those of sentence-transformers, MTEB and Hugging Face datasets; a misspelt name is
found by its letters. Nothing is read under another name than ours: what is found is said.
"""

import difflib
from collections.abc import Collection, Iterable

FIELDS = {  # of a manifest
  "task_type": ("task", "type", "kind", "task_name"),
  "instruction": ("prompt", "instruct", "query_prompt", "query_instruction"),
  "negatives": ("negative", "neg", "num_negatives", "n_negatives", "hard_negatives"),
  "positives": ("positive", "pos", "num_positives", "n_positives"),
  "lang": ("language", "lang_code", "language_code", "locale"),
  "licence": ("license",),
  "path": ("file", "url", "data_files", "data_dir", "filename", "location"),
}
COLUMNS = {  # of training and held-out files
  "query": ("anchor", "question", "sentence1", "sentence_1", "text1", "text_1", "premise"),
  "passage": (
    *("positive", "pos", "answer", "document", "sentence2", "sentence_2", "text2", "text_2"),
    *("hypothesis", "context", "passage_1"),
  ),
  "negative_1": ("negative", "neg", "hard_negative", "negative_0"),
  "score": ("similarity_score", "similarity", "label", "labels"),
  "lang": ("language", "lang_code", "language_code", "locale"),
  "text": ("sentence", "sentence1", "text1", "query", "source"),
  "en": ("english", "sentence2", "text2", "passage", "translation", "target"),
  "title": ("query", "question", "anchor"),
  "intent": ("label", "labels", "label_text", "class", "category"),
  "label": ("labels", "cluster", "intent", "label_text", "class", "category"),
  "split": ("subset", "partition"),
}
LIKE = 0.8  # two names with this ratio of equal letters are one, misspelt


def field_for(unknown: str, fields: Collection[str]) -> str | None:
  """Returns which of the fields an unknown one may mean, None where it is like none of them."""
  named = [field for field, others in FIELDS.items() if unknown.lower() in others]
  return (named or _alike(unknown, fields) or [None])[0]


def columns_for(missing: Iterable[str], there: Iterable[str]) -> dict[str, str]:
  """Returns the columns that are likely meant, by the names of ours that are missing."""
  left, found = list(there), {}
  for name in missing:
    by_letters = {column.lower(): column for column in reversed(left)}
    near = [other for other in (name, *COLUMNS.get(name, ())) if other in by_letters]
    alike = [] if name[-1].isdigit() else _alike(name, by_letters)  # negative_2 is no negative_3
    if near := near or alike:
      found[name] = by_letters[near[0]]
      left.remove(found[name])
  return found


def _alike(name: str, others: Collection[str]) -> list[str]:
  return difflib.get_close_matches(name.lower(), others, n=1, cutoff=LIKE)


def missing_columns(missing: Collection[str], there: Collection[str]) -> str:
  """Returns what is to be said of columns that a file lacks, with those to rename."""
  columns = f"columns {', '.join(missing)} are" if len(missing) > 1 else f"column {min(missing)} is"
  taken = columns_for(missing, there)
  renames = ", ".join(f"{other} to {name}" for name, other in taken.items())
  hint = f"; rename {renames}" if renames else ""
  if "lang" in missing:
    hint += (
      ", or" if hint else ";"
    ) + " give the language of the whole file as lang in the manifest"
  return f"{columns} missing; it has {', '.join(there)}{hint}"
