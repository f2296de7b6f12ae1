"""Held-out tasks: the texts they need encoded, and scores per language from the vectors.

A task is a file listed in a manifest, of any form of training files, with columns by task type:
  bitext          lang, text, en               `text` finds `en` among the rows of its language
  retrieval       lang, title, passage         `title` finds `passage` among those of its language
  classification  lang, intent, text, split    labels are learnt from rows of split `support` of
                                               the language, or of English where it has none;
                                               rows of split `test` are scored
  clustering      lang, label, text            vectors of a label lie together
  scored_pairs    lang, query, passage, score  cosines are in the order of scores (STS)
`lang` counts as the key of its tag (`data.languages`): he and heb_Hebr are one language.
No jax here.
"""

import dataclasses
import glob
import hashlib
import json
import pathlib
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Float

from mlembed_jax.data import languages
from mlembed_jax.data.languages import ENGLISH, LANGUAGE_SCRIPT, language_key
from mlembed_jax.data.manifest import SCORED, File, read_manifest, select_heldout
from mlembed_jax.data.names import MANIFEST
from mlembed_jax.data.parquet_files import Columns
from mlembed_jax.data.report import REMEDIES, SAID
from mlembed_jax.data.rows import CHUNK, has_text, languages_of
from mlembed_jax.data.shards import paths_of
from mlembed_jax.data.tables import Reasons, column_names, read_tables
from mlembed_jax.data.tokenizer import with_instruction
from mlembed_jax.errors import DataError
from mlembed_jax.eval import scores
from mlembed_jax.eval.scores import Scores

Vectors = Float[np.ndarray, "N D"]
ByLanguage = dict[str, Scores]
Score = Callable[[Vectors, Vectors], ByLanguage]
SUPPORT, TEST, SCORE = "support", "test", "score"
LANG = "lang"
LABELS = ("intent", "label")  # texts or whole numbers
COLUMNS = {
  "bitext": ("lang", "text", "en"),
  "retrieval": ("lang", "title", "passage"),
  "classification": ("lang", "intent", "text", "split"),
  "clustering": ("lang", "label", "text"),
  SCORED: ("lang", "query", "passage", SCORE),
}
METRICS = {  # the main score of each task type, as in MTEB
  "bitext": "f1",
  "retrieval": "ndcg_at_10",
  "classification": "accuracy",
  "clustering": "v_measure",
  SCORED: "cosine_spearman",
}


@dataclasses.dataclass(frozen=True)
class HeldoutTask:
  """One held-out file.

  `score` takes unit vectors of `texts`, in order, once for those that are queries and once for
  those that are documents; higher is better. Documents are what is found, what labels are learnt
  from, and the second texts of pairs.
  """

  name: str
  type: str
  texts: list[str]
  score: Score
  digest: str  # of all that decides the scores of given vectors, and of the texts
  unknown: str  # tags that name no known language, each scored as one of its own

  @property
  def has_documents(self) -> bool:
    """Returns whether texts are compared with others; those of a clustering are all alike."""
    return self.type != "clustering"

  @property
  def metric(self) -> str:
    """The name of the task's main score."""
    return METRICS[self.type]


def load_task(file: File, scheme: str = LANGUAGE_SCRIPT) -> HeldoutTask:
  """Returns the task of one file of a manifest.

  Args:
    file: the file.
    scheme: how languages are named, see `data.language_key`.

  Raises:
    DataError: the file cannot be read.
  """
  task_type = file.entry["task_type"]
  if task_type not in COLUMNS:
    raise DataError(f"{file.name}: task_type {task_type!r} has no score; leave the file out")
  langs, *others = _columns(file, COLUMNS[task_type])
  keys = [language_key(tag, scheme) for tag in langs]
  prompt = "" if file.instructed else file.entry["instruction"]
  texts = _Texts(prompt, file.symmetric)
  score = MAKERS[task_type](file.name, [keys, *others], texts)
  # The first tag of each key: what 0.1.0 scored is not scored again where no tags are merged.
  first = dict(zip(reversed(keys), reversed(langs), strict=True))
  digest = _digest([task_type, [[first[key] for key in keys], *others], texts.unique()])
  unknown = languages.unknown_text(Counter(langs)) if scheme == LANGUAGE_SCRIPT else ""
  return HeldoutTask(file.name, task_type, texts.unique(), score, digest, unknown)


def _digest(value: Any) -> str:
  return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def load_folder(folder: pathlib.Path, scheme: str = LANGUAGE_SCRIPT) -> list[HeldoutTask]:
  """Returns the tasks of a folder of parquet files.

  They are listed in manifest.json of the folder, or of the one above, which may list others, too.
  `scheme` says how languages are named, see `data.language_key`.

  Raises:
    DataError: it is no folder, there is no manifest, it lists no file of the folder, or one cannot
      be read.
  """
  if not folder.is_dir():
    raise DataError(f"tasks: {folder} is no folder; give the one that holds the files")
  folder = folder.absolute()
  for place, below in ((folder, ""), (folder.parent, folder.name)):
    manifest = str(place / MANIFEST)
    if (place / MANIFEST).is_file():
      names = [name for name in read_manifest(manifest) if name.rpartition("/")[0] == below]
      if not names:
        entries = read_manifest(manifest)
        heldout = [name for name, entry in entries.items() if "negatives" not in entry]
        others = dict.fromkeys(name.rpartition("/")[0] for name in heldout or entries)
        raise DataError(
          f"tasks: {manifest} lists no file of {folder}; give one of the folders that it lists: "
          + ", ".join(str(place / other) for other in others)
        )
      files = select_heldout(manifest, map(glob.escape, names), "tasks")
      return [load_task(file, scheme) for file in files]
  raise DataError(
    f"tasks: neither {folder} nor the folder above has a manifest.json, which says what the "
    "files are"
  )


class _Texts:
  """Collects the texts of a task, each once, with the instruction where it belongs."""

  def __init__(self, instruction: str, symmetric: bool):
    self._instruction, self._symmetric = instruction, symmetric
    self._places: dict[str, int] = {}

  def queries(self, texts: Sequence[str]) -> np.ndarray:
    """Returns the place of each text among the unique ones."""
    return self._add([with_instruction(self._instruction, text) for text in texts])

  def documents(self, texts: Sequence[str]) -> np.ndarray:
    """Returns the place of each document among the unique texts.

    Documents are encoded as queries where the task is symmetric.
    """
    return self.queries(texts) if self._symmetric else self._add(texts)

  def _add(self, texts: Sequence[str]) -> np.ndarray:
    return np.array([self._places.setdefault(text, len(self._places)) for text in texts])

  def unique(self) -> list[str]:
    return list(self._places)


def _columns(file: File, names: Sequence[str]) -> list[list[Any]]:
  optional = [LANG] if LANG in file.entry else []  # of the whole file, unless a row says another
  labels, numbers = ([n for n in names if n in kind] for kind in (LABELS, (SCORE,)))
  texts = [name for name in names if name not in (*labels, *numbers, *optional)]
  wanted, paths = Columns(texts, optional, labels, numbers), paths_of(file)
  try:
    column_names(paths, wanted)
  except DataError as error:
    if "negatives" not in file.entry:
      raise
    raise DataError(
      f"{error}; or is it a file to train on, as the manifest has `negatives` for it? Give a "
      "folder of held-out files"
    ) from error
  read = [table for path in paths for table in read_tables(path, wanted, CHUNK)]
  empty = [n for n in (*labels, *texts) for table, _ in read if not has_text(table[n]).all()]
  if found := _unfit(read) or ", ".join(
    f"null or empty texts in {n}" for n in dict.fromkeys(empty)
  ):
    raise DataError(f"{file.path}: {found}; held-out files must be whole")
  columns = {name: [v for table, _ in read for v in table[name].to_pylist()] for name in names[1:]}
  columns[LANG] = [tag for table, _ in read for tag in languages_of(file, table).to_pylist()]
  return [columns[name] for name in names]


def _unfit(read: Sequence[tuple[pa.Table, Reasons]]) -> str:
  """Returns the first reason for which a row cannot be used, with its place from 0; "": none."""
  start = 0
  for table, reasons in read:
    for reason, rows in reasons.items():
      for column, unfit in rows.items():
        if unfit.any():
          place = f"{column} of row {start + int(np.argmax(unfit))}".removeprefix(" of ")
          why = "; ".join((SAID.get(reason, reason), *([REMEDIES[reason]] * (reason in REMEDIES))))
          return f"{place} cannot be used: {why}"
    start += len(table)
  return ""


def _bitext(name: str, columns: list[list[Any]], texts: _Texts) -> Score:
  langs, sources, targets = columns
  source, target = texts.queries(sources), texts.documents(targets)
  # Two rows of a language may have one target, as the same English in pt and pt-BR.
  pools = {
    lang: (source[rows], *np.unique(target[rows], return_inverse=True))
    for lang, rows in _groups(langs).items()
  }
  return lambda queries, documents: {
    lang: scores.bitext(queries[sources], documents[targets], right)
    for lang, (sources, targets, right) in pools.items()
  }


def _retrieval(name: str, columns: list[list[Any]], texts: _Texts) -> Score:
  langs, asked, found = columns
  query, document = texts.queries(asked), texts.documents(found)
  groups = {lang: _relevant(query[rows], document[rows]) for lang, rows in _groups(langs).items()}
  return lambda queries, documents: {
    lang: scores.retrieval(queries[titles], documents[passages], relevant)
    for lang, (titles, passages, relevant) in groups.items()
  }


def _relevant(query: np.ndarray, document: np.ndarray) -> tuple[np.ndarray, np.ndarray, list]:
  """Returns the queries, the documents, and for each query where its documents stand among them."""
  documents, place = np.unique(document, return_inverse=True)
  queries = np.unique(query)
  return queries, documents, [np.unique(place[query == one]) for one in queries]


def _classification(name: str, columns: list[list[Any]], texts: _Texts) -> Score:
  langs, labels, given, splits = columns
  if unknown := sorted(set(splits) - {SUPPORT, TEST}):
    raise DataError(f"{name}: split {unknown[0]!r} is neither {SUPPORT!r} nor {TEST!r}")
  place, label = texts.queries(given), np.array(labels)
  taught = _taught(name, _groups(langs), np.array(splits) == SUPPORT)

  def score(queries: Vectors, documents: Vectors) -> ByLanguage:
    found: ByLanguage = {}
    for train, tests in taught:
      rows = np.concatenate([*tests.values()])
      right = scores.classification(
        documents[place[train]], label[train], queries[place[rows]], label[rows]
      )
      language = np.repeat([*tests], [len(test) for test in tests.values()])
      for lang in tests:
        found[lang] = {metric: float(r[language == lang].mean()) for metric, r in right.items()}
    return dict(sorted(found.items()))

  return score


def _taught(
  name: str, groups: dict[str, np.ndarray], support: np.ndarray
) -> list[tuple[np.ndarray, dict[str, np.ndarray]]]:
  """Returns (rows to learn from, {language: rows to score}); English teaches all that lack rows."""
  tests = {lang: rows[~support[rows]] for lang, rows in groups.items() if not support[rows].all()}
  if not tests:
    raise DataError(f"{name}: all rows have split 'support'; there are none to be scored")
  own = {lang: groups[lang][support[groups[lang]]] for lang in tests}
  english = next((groups[name] for name in ENGLISH if name in groups), np.array([], int))
  english = english[support[english]]
  others = {lang: rows for lang, rows in tests.items() if not own[lang].size}
  if others and not english.size:
    raise DataError(
      f"{name}: no rows with split 'support' to learn the labels from, neither in "
      f"{next(iter(others))} nor in English"
    )
  alone = [(own[lang], {lang: rows}) for lang, rows in tests.items() if lang not in others]
  return [*alone, (english, others)] if others else alone


def _clustering(name: str, columns: list[list[Any]], texts: _Texts) -> Score:
  langs, labels, queries = columns
  place, label = texts.queries(queries), np.array(labels)
  groups = _groups(langs)
  return lambda vectors, _: {
    lang: scores.clustering(vectors[place[rows]], label[rows]) for lang, rows in groups.items()
  }


def _sts(name: str, columns: list[list[Any]], texts: _Texts) -> Score:
  langs, firsts, seconds, gold = columns
  first, second = texts.queries(firsts), texts.documents(seconds)
  known = np.array(gold, np.float64)
  groups = _groups(langs)
  if unfit := [lang for lang, rows in groups.items() if not 0 < np.ptp(known[rows]) < np.inf]:
    raise DataError(f"{name}: the scores of {unfit[0]} are absent, not finite or all equal")
  return lambda queries, documents: {
    lang: scores.sts(queries[first[rows]], documents[second[rows]], known[rows])
    for lang, rows in groups.items()
  }


MAKERS = {
  "bitext": _bitext,
  "retrieval": _retrieval,
  "classification": _classification,
  "clustering": _clustering,
  SCORED: _sts,
}


def _groups(langs: list[str]) -> dict[str, np.ndarray]:
  values = np.array(langs)
  return {lang: np.flatnonzero(values == lang) for lang in sorted(set(langs))}
