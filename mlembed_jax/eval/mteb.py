"""MTEB: its tasks on slices of an encoder, all depths and dims of a rank from one pass over texts.

from mlembed_jax.eval.mteb import evaluate

scores = evaluate(encoder, ["STS22.v2"], [Slice(), Slice(depth=8, dim=256)], "results")

Only this module needs mteb. Text is read from where mteb keeps it; nothing else uses the network.
"""

import contextlib
import difflib
import functools
import hashlib
import os
import pathlib
import random
import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

try:
  import mteb
except ModuleNotFoundError as error:
  if error.name != "mteb":
    raise
  raise ImportError('mlembed_jax.eval.mteb: pip install "mlembed_jax[mteb]"') from error
from huggingface_hub import ModelCard
from mteb.abstasks.aggregated_task import AbsTaskAggregate
from mteb.get_tasks import TASK_LIST
from mteb.languages.iso_mappings import _hf_langs_to_iso_lang_scripts
from mteb.models import ModelMeta
from mteb.models.abs_encoder import AbsEncoder
from mteb.models.model_meta import ScoringFunction
from mteb.types import PromptType

from mlembed_jax.data import languages
from mlembed_jax.errors import DataError
from mlembed_jax.files import digests
from mlembed_jax.hf.variants import variant_name
from mlembed_jax.inference import Encoder
from mlembed_jax.matryoshka import Slice
from mlembed_jax.models.encoder import parameter_count
from mlembed_jax.quantize import unit
from mlembed_jax.slice_scores import SliceScore

PREFIX = "mteb:"
WHOLE = Slice()
BATCH = 1024  # mteb hands over so many texts at a time; batches of the device are the encoder's
PASS_BYTES = 2**30  # states of one pass may take so much memory
_parameters = functools.cache(parameter_count)  # 0.1 s, asked for every task and slice


class States:
  """Final-norm states of one rank by prompt and text, at some depths, in a file.

  It takes 4 * depths * dim bytes per text, in a folder that its maker removes.
  """

  def __init__(
    self, encoder: Encoder, rank: int | None, depths: Sequence[int], dim: int, folder: str
  ):
    """Holds the first `dim` coordinates at `depths`."""
    self._encoder, self._rank, self._dim = encoder, rank, dim
    self._depths = tuple(sorted(set(depths)))
    self._rows: dict[bytes, int] = {}
    self._path = pathlib.Path(folder) / "states.float32"

  def read(self, texts: Sequence[str], prompt: str, depth: int) -> Float[np.ndarray, "N D"]:
    """Returns the states of texts at one of the depths; what is not there is computed first."""
    keys = [_digest(prompt, text) for text in texts]
    wanted = dict(zip(keys, texts, strict=True))
    missing = [(key, text) for key, text in wanted.items() if key not in self._rows]
    for start in range(0, len(missing), self._pass_texts):
      self._append(dict(missing[start : start + self._pass_texts]), prompt)
    shape = len(self._rows), len(self._depths), self._dim
    stored = np.memmap(self._path, np.float32, "r", shape=shape)
    return stored[[self._rows[key] for key in keys], self._depths.index(depth)]

  @property
  def _pass_texts(self) -> int:
    return max(1, PASS_BYTES // (4 * len(self._depths) * self._encoder.config().width))

  def _append(self, texts: Mapping[bytes, str], prompt: str) -> None:
    ids = self._encoder.ids(list(texts.values()), prompt)
    states_END = self._encoder.states(ids, self._depths, self._depths[-1], self._rank, True)
    with self._path.open("ab") as file:
      file.write(np.ascontiguousarray(states_END[:, :, : self._dim].swapaxes(0, 1)).data)
    self._rows |= {key: row for row, key in enumerate(texts, start=len(self._rows))}


class MTEBEncoder(AbsEncoder):
  """One slice of an encoder as mteb wants it: unit vectors, float32, with the folder's prompts."""

  def __init__(self, encoder: Encoder, cut: Slice = WHOLE, states: States | None = None):
    """Takes vectors from `states`, where given.

    Raises:
      ValueError: the model lacks this size, or it was not trained.
    """
    encoder.check(cut.depth, cut.rank, cut.dim)
    self.model, self._cut, self._states = encoder, cut, states
    self.model_prompts = encoder.prompts
    self.mteb_model_meta = model_meta(encoder, cut)

  def get_prompt_name(self, task_metadata: Any, prompt_type: PromptType | None) -> str | None:
    """Returns the prompt that mteb chooses, but for documents never the one of a task or its type.

    Where a folder has "Retrieval", mteb would put this instruction before documents, too.
    """
    if prompt_type != PromptType.document:
      return super().get_prompt_name(task_metadata, prompt_type)
    names = (f"{task_metadata.name}-document", f"{task_metadata.type}-document", "document")
    return next((name for name in names if name in self.model.prompts), None)

  def encode(
    self,
    inputs: Any,
    *,
    task_metadata: Any,
    hf_split: str,
    hf_subset: str,
    prompt_type: PromptType | None = None,
    **kwargs: Any,
  ) -> Float[np.ndarray, "N D"]:
    """Returns the vectors of a loader's texts."""
    texts = [text for batch in inputs for text in batch["text"]]
    name = self.get_prompt_name(task_metadata, prompt_type)
    # As in sentence-transformers, a query or a document never gets the default prompt.
    prompt = "" if name is None and prompt_type else self.model.prompt(name)
    cut = self._cut
    if self._states is None:
      slices = {"depth": cut.depth, "rank": cut.rank, "dim": cut.dim}
      return self.model.encode(texts, prompt=prompt, normalize=True, **slices)
    depth = cut.depth or self.model.config().layers
    vectors = self._states.read(texts, prompt, depth)[:, : cut.dim or self.model.dim]
    return unit(vectors)


def model_meta(encoder: Encoder, cut: Slice = WHOLE) -> ModelMeta:
  """Returns what mteb writes beside the results of a slice.

  The revision is a hash of all files of the folder, and of how they are used. A rank is part of the
  name even where it is the full one: a merged table holds rounded products of the factors.
  """
  dim, depth = _or_none(cut.dim, encoder.dim), _or_none(cut.depth, encoder.config().layers)
  name = variant_name(encoder.name, Slice(dim=dim, depth=depth, rank=cut.rank))
  return ModelMeta(
    loader=None,
    name=f"mlembed/{name}",
    revision=_revision(
      encoder.folder, encoder.fingerprint, encoder.max_seq_length, encoder.config().dtype
    ),
    release_date=None,
    languages=_languages(encoder.folder / "README.md"),
    n_parameters=_parameters(encoder.config(cut.depth, cut.rank)),
    memory_usage_mb=None,
    max_tokens=encoder.max_seq_length,
    embed_dim=cut.dim or encoder.dim,
    license=None,
    open_weights=None,
    public_training_code=None,
    public_training_data=None,
    framework=["JAX"],
    similarity_fn_name=ScoringFunction.COSINE,
    use_instructions=any(encoder.prompts.values()),
    training_datasets=None,
  )


def _or_none(size: int | None, full: int) -> int | None:
  return None if size == full else size


@functools.lru_cache(maxsize=8)
def _revision(folder: pathlib.Path, fingerprint: str, max_tokens: int, dtype: str) -> str:
  """Returns a hash of names and contents; `fingerprint` says when it is to be computed again."""
  found = hashlib.sha256(f"{max_tokens} {dtype}\n".encode())
  for name, digest in digests(folder).items():
    found.update(f"{name} {digest}\n".encode())
  return found.hexdigest()[:40]


def _languages(card: pathlib.Path) -> list[str] | None:
  """Returns the languages of a model card as mteb spells them, eng-Latn."""
  if not card.is_file():
    return None
  data = ModelCard.load(card, ignore_metadata_errors=True).data
  return _hf_langs_to_iso_lang_scripts(data.to_dict().get("language"))


def _digest(prompt: str, text: str) -> bytes:
  whole = f"{len(prompt)} {prompt}{text}".encode("utf-8", "surrogatepass")
  return hashlib.blake2b(whole, digest_size=16).digest()


def evaluate(
  encoder: Encoder,
  names: Sequence[str | mteb.AbsTask],
  slices: Sequence[Slice],
  out: str | os.PathLike[str],
  language_key: str = languages.LANGUAGE_SCRIPT,
) -> list[SliceScore]:
  """Returns one score per task and slice, in this order.

  `names` are of mteb, with or without "mteb:" before them, or tasks of your own. A score is the
  mean over splits and subsets. Its `by_language` has the means of the languages that mteb states of
  the subsets, named as `language_key` says, see `data.language_key`. A subset of several languages
  counts for each of them, but for English only if it has no other. `out` gets the results as mteb
  writes them, results/MODEL/REVISION/TASK.json; those that are there are not computed again. Texts
  are encoded once per rank: states of 4 * depths * dim bytes per text lie in a temporary folder
  meanwhile.

  Raises:
    DataError: an unknown task, one that does not consist of text, or one whose data is not here.
    LoadError: the model's vectors are not compared by their cosine.
    ValueError: a size that the model lacks, or that was not trained.
  """
  encoder.check_similarity()
  tasks = [find_task(name) if isinstance(name, str) else name for name in names]
  for task in tasks:
    _check_modalities(task)
  for cut in slices:
    encoder.check(cut.depth, cut.rank, cut.dim)
  cache = mteb.ResultCache(pathlib.Path(out))
  return [
    _slice_score(encoder, task, cut, result, language_key)
    for task in tasks
    for cut, result in zip(slices, _evaluate_task(encoder, task, slices, cache), strict=True)
  ]


def find_task(name: str) -> mteb.AbsTask:
  """Returns a task of mteb; raises DataError, with names that are near, where there is none."""
  name = name.removeprefix(PREFIX)
  known = {task.metadata.name for task in TASK_LIST}
  if name in known:
    return mteb.get_task(name)
  near = difflib.get_close_matches(name, known, n=5, cutoff=0.5)
  hint = f"near it: {', '.join(near)}" if near else "see mteb.get_tasks() for the names"
  raise DataError(f"{PREFIX}{name}: mteb {mteb.__version__} has no such task; {hint}")


def _check_modalities(task: mteb.AbsTask) -> None:
  if others := sorted(set(task.metadata.modalities) - {"text"}):
    raise DataError(f"{PREFIX}{task.metadata.name}: has {', '.join(others)}; the model reads text")


def _evaluate_task(
  encoder: Encoder, task: mteb.AbsTask, slices: Sequence[Slice], cache: mteb.ResultCache
) -> list[mteb.TaskResult]:
  found: dict[Slice, mteb.TaskResult] = {}
  for cut in slices:
    result = cache.load_task_result(task.metadata.name, model_meta(encoder, cut))
    if result and not result.get_missing_evaluations(task):
      found[cut] = result
  missing = [cut for cut in dict.fromkeys(slices) if cut not in found]
  with _loaded(task) if missing else contextlib.nullcontext():
    for rank in dict.fromkeys(cut.rank for cut in missing):
      cuts = [cut for cut in missing if cut.rank == rank]
      found |= _evaluate_rank(encoder, task, cuts, cache)
  return [found[cut] for cut in slices]


def _evaluate_rank(
  encoder: Encoder, task: mteb.AbsTask, cuts: Sequence[Slice], cache: mteb.ResultCache
) -> dict[Slice, mteb.TaskResult]:
  """Returns the results of slices of one rank, after one pass over the texts."""
  depths = [cut.depth or encoder.config().layers for cut in cuts]
  dim = max(cut.dim or encoder.dim for cut in cuts)
  with tempfile.TemporaryDirectory(prefix="mlembed-mteb-") as folder:
    states = States(encoder, cuts[0].rank, depths, dim, folder)
    return {cut: _run(MTEBEncoder(encoder, cut, states), task, cache) for cut in cuts}


def _run(model: Any, task: mteb.AbsTask, cache: mteb.ResultCache) -> mteb.TaskResult:
  _seed(task)
  result = mteb.evaluate(
    model,
    task,
    co2_tracker=False,
    cache=cache,
    encode_kwargs={"batch_size": BATCH, "show_progress_bar": False},
    show_progress_bar=False,
  )
  return result.task_results[0]


@contextlib.contextmanager
def _loaded(task: mteb.AbsTask) -> Iterator[None]:
  """Loads the data once for all slices; mteb itself would for each."""
  parts = [part for part in _parts(task) if not part.data_loaded]
  _seed(task)
  try:
    for part in parts:
      _load(part)
    yield
  finally:
    for part in parts:
      if part.data_loaded:
        part.unload_data()


def _load(task: mteb.AbsTask) -> None:
  try:
    task.load_data()
  # ValueError: datasets has other subsets of this data, but not this one.
  except (OSError, ValueError) as error:
    name, reason = task.metadata.name, str(error).partition("\n")[0]
    fetch = f"python -c \"import mteb; mteb.get_task('{name}').load_data()\""
    way_out = f"; with a network, fetch it by {fetch}" if type(task) in TASK_LIST else ""
    raise DataError(f"{PREFIX}{name}: its data is not here: {reason}{way_out}") from error


def _parts(task: mteb.AbsTask) -> list[mteb.AbsTask]:
  """Returns the tasks that have data: those that an aggregate consists of."""
  if not isinstance(task, AbsTaskAggregate):
    return [task]
  return [part for child in task.tasks for part in _parts(child)]


def _seed(task: mteb.AbsTask) -> None:
  """Makes the generators as a new task has them.

  mteb draws samples from them on and on, so a second evaluation of a task would see other samples.
  """
  for part in _parts(task):
    random.seed(part.seed)
    part.rng_state, part.np_rng = random.Random(part.seed), np.random.default_rng(part.seed)


def _slice_score(
  encoder: Encoder, task: mteb.AbsTask, cut: Slice, result: mteb.TaskResult, language_key: str
) -> SliceScore:
  by_language: dict[str, list[float]] = {}
  for scores in (scores for split in result.scores.values() for scores in split):
    for language in _keys(scores["languages"], language_key):
      by_language.setdefault(language, []).append(_main_score(scores))
  return SliceScore(
    task=PREFIX + task.metadata.name,
    metric=task.metadata.main_score,
    rank=cut.rank or 0,
    depth=cut.depth or encoder.config().layers,
    dim=cut.dim or encoder.dim,
    precision="float32",
    score=round(float(result.get_score(getter=_main_score)), 6),
    by_language={name: round(statistics.fmean(v), 6) for name, v in by_language.items()},
  )


def _keys(tags: Sequence[str], language_key: str) -> list[str]:
  """Returns the languages that a subset with texts in these counts for; English if it is alone."""
  keys = dict.fromkeys(languages.language_key(tag, language_key) for tag in tags)
  return [key for key in keys if key not in languages.ENGLISH] or [*keys]


def _main_score(scores: Mapping[str, Any]) -> float:
  """Returns as many digits as mteb writes, so that a result read again is the same."""
  return round(float(scores["main_score"]), 6)
