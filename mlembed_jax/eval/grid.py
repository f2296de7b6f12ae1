"""Held-out quality of every slice: one pass over the texts per rank gives all depths."""

import dataclasses
import itertools
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float

from mlembed_jax import progress
from mlembed_jax.config_fields import Config
from mlembed_jax.data.tokenizer import Tokenizer
from mlembed_jax.eval.tasks import ByLanguage, HeldoutTask
from mlembed_jax.matryoshka import Slice, axes_of, slice_config, slice_params
from mlembed_jax.models.batched import Batching, encode_batched
from mlembed_jax.parallel import processes
from mlembed_jax.parallel.sharding import batch_sharding
from mlembed_jax.quantize import rounded, unit
from mlembed_jax.slice_scores import AsymmetricScore, Size, SliceScore

Ids = Sequence[Sequence[int]]
Encode = Callable[[Ids, int], Float[np.ndarray, "E N D"]]


@dataclasses.dataclass(frozen=True)
class Axes:
  """The slices to score: all combinations."""

  ranks: tuple[int, ...]  # 0: the token table as it is
  depths: tuple[int, ...]
  dims: tuple[int, ...]
  precisions: tuple[str, ...] = ("float32",)


def score_slices(
  config: Config,
  params: Any,
  tasks: Sequence[HeldoutTask],
  tokenizer: Tokenizer,
  mesh: Mesh,
  before_each: Callable[[], None] = lambda: None,
) -> list[SliceScore]:
  """Returns the scores of all trained slices of parameters on a mesh, on every process.

  `before_each` is called before the texts of a task are encoded at a rank. Process 0 shows how many
  texts are encoded.
  """
  trained = axes_of(config.model, config.matryoshka)
  axes = Axes(trained.ranks or (0,), trained.exits, trained.dims)

  batching = Batching(
    config.data.lengths, rows=lambda _: config.eval.batch_size, sharding=batch_sharding(mesh)
  )

  def encode(ids: Ids, rank: int) -> Float[np.ndarray, "E N D"]:
    before_each()
    cut = Slice(rank=rank or None)
    model = slice_config(config.model, cut)
    cut_params = slice_params(params, cut)
    return encode_batched(model, cut_params, ids, axes.depths, batching, bar.update)

  def ids(task: HeldoutTask) -> Ids:
    return tokenizer.encode(task.texts, config.data.lengths[-1])

  texts = sum(len(task.texts) for task in tasks) * len(axes.ranks)
  with progress.count("scoring", texts, " texts", leave=False, shown=processes.is_first()) as bar:
    each = (score_task_slices(task, ids(task), axes, encode, pairs=False) for task in tasks)
    return [found for scores, _ in each for found in scores]


def score_task_slices(
  task: HeldoutTask, ids: Ids, axes: Axes, encode: Encode, pairs: bool
) -> tuple[list[SliceScore], list[AsymmetricScore]]:
  """Returns one score per rank, depth, dim and precision, on every process, and those of `pairs`.

  Pairs are queries at one depth and documents at another, at the largest rank and dim, and so of
  ranks at the largest depth. `encode` gives the final-norm states at all depths at a rank; each
  process of a run scores its part of them.
  """
  scores = list[SliceScore]()
  of_ranks, of_depths = dict[tuple[int, int], np.ndarray](), dict[tuple[int, int], np.ndarray]()
  for rank in axes.ranks:
    states = encode(ids, rank)
    scores += _score_rank(task, rank, axes, states)
    if pairs and task.has_documents:
      # A copy, as a view would keep the states of all depths at every rank in memory.
      of_ranks[rank, axes.depths[-1]] = states[-1].copy()
      if rank == axes.ranks[-1]:
        of_depths = {(rank, depth): at for depth, at in zip(axes.depths, states, strict=True)}
    del states  # before the next ones are made
  return scores, [*_score_pairs(task, of_depths, axes), *_score_pairs(task, of_ranks, axes)]


def _score_rank(
  task: HeldoutTask, rank: int, axes: Axes, states_END: Float[np.ndarray, "E N D"]
) -> list[SliceScore]:
  by_depth = dict(zip(axes.depths, states_END, strict=True))

  def score(size: Size) -> dict[str, Any]:
    vectors = slice_vectors(by_depth[size.depth], size.dim, size.precision)
    return dataclasses.asdict(slice_score(task, size, task.score(vectors, vectors)))

  sizes = [Size(rank, *cut) for cut in itertools.product(axes.depths, axes.dims, axes.precisions)]
  return [SliceScore.from_json(value) for value in processes.shared(sizes, score)]


def _score_pairs(
  task: HeldoutTask, states: Mapping[tuple[int, int], Float[np.ndarray, "N D"]], axes: Axes
) -> list[AsymmetricScore]:
  """Returns the score of each pair of different sizes (rank, depth), queries at the first."""
  vectors = {
    size: slice_vectors(of_size, axes.dims[-1], axes.precisions[0])
    for size, of_size in states.items()
  }

  def score(pair: tuple[tuple[int, int], tuple[int, int]]) -> dict[str, Any]:
    (query_rank, query_depth), document = pair
    size = Size(*document, axes.dims[-1], axes.precisions[0])
    found = slice_score(task, size, task.score(vectors[pair[0]], vectors[document]))
    return dataclasses.asdict(
      AsymmetricScore(
        task.name, task.metric, query_rank, query_depth, *document, found.score, found.by_language
      )
    )

  pairs = list(itertools.permutations(vectors, 2))
  return [AsymmetricScore(**value) for value in processes.shared(pairs, score)]


def slice_score(task: HeldoutTask, size: Size, by_language: ByLanguage) -> SliceScore:
  """Returns the score of a slice: the mean of the main metric, that by language, other means."""
  names = next(iter(by_language.values())).keys()
  means = {
    name: statistics.fmean(metrics[name] for metrics in by_language.values()) for name in names
  }
  main = {lang: metrics[task.metric] for lang, metrics in by_language.items()}
  score = means.pop(task.metric)
  return SliceScore(task.name, task.metric, *size, score, main, means)


def slice_vectors(states_ND: np.ndarray, dim: int, precision: str) -> Float[np.ndarray, "N M"]:
  """Returns the unit vectors of states that a slice gives, after rounding to a precision."""
  return unit(rounded(unit(states_ND[:, :dim]), precision))
