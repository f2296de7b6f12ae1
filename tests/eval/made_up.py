"""An evaluation as a trained 0.6B model could give it; every number is invented."""

import itertools
import math
import random

from mlembed_jax.eval.evaluation import BodyCost, Costs, Evaluation, Latency, TaskSummary
from mlembed_jax.slice_scores import AsymmetricScore, SliceScore

DEPTHS, DIMS = (4, 8, 12, 16, 20, 24, 28), (8, 16, 32, 64, 128, 256, 512, 1024)
RANKS, PRECISIONS = (64, 128, 256, 512), ("float32", "int8", "binary")
LANGUAGES = "en de fr es it pt nl pl ru uk tr ar fa hi bn sw yo zh ja th".split()
TASKS = (
  ("udhr_bitext.parquet", "bitext", "f1", 0.86),
  ("home_intents.parquet", "classification", "accuracy", 0.74),
  ("wiki_titles.parquet", "retrieval", "ndcg10", 0.62),
  ("sts_languages.parquet", "sts", "spearman", 0.71),
)
PENALTY = {"float32": 0.0, "int8": 0.004, "binary": 0.05}


def score(top, noise, rank, depth, dim, precision):
  lost = 0.9 / math.log2(dim) ** 1.6 + 0.25 * math.exp(-depth / 6) + 1.6 / rank
  small = 1 + 6 / math.log2(dim) if precision == "binary" else 1
  return top * (1.1 - lost - small * PENALTY[precision]) + noise.gauss(0, 0.0015)


def pairs(task, metric, ranks, depths):
  """Returns what deeper queries and documents score more, at the largest rank."""
  return [
    AsymmetricScore(task, metric, ranks[-1], query, ranks[-1], depth, (query + 2 * depth) / 100, {})
    for query, depth in itertools.permutations(depths, 2)
  ]


def evaluation(
  depths=DEPTHS, dims=DIMS, ranks=RANKS, precisions=PRECISIONS, tasks=TASKS, languages=LANGUAGES
):
  noise = random.Random(7)
  hard = {language: noise.uniform(-0.18, 0.1) for language in languages}
  scores = []
  for name, _, metric, top in tasks:
    for rank in ranks:
      for depth in depths:
        for dim in dims:
          for precision in precisions:
            mean = score(top, noise, rank or 512, depth, dim, precision)
            by_language = {
              language: min(1.0, mean * (1 + hard[language]) + noise.gauss(0, 0.004))
              for language in languages
            }
            mean = sum(by_language.values()) / len(by_language)
            others = {"top1": mean - 0.04} if metric == "f1" else {}
            size = rank, depth, dim, precision
            scores.append(SliceScore(name, metric, *size, mean, by_language, others))
  return Evaluation(
    model="mlembed-0.6b",
    precisions=list(precisions),
    tasks=[
      TaskSummary(name, task_type, metric, 1230, len(languages))
      for name, task_type, metric, _ in tasks
    ],
    scores=scores,
    costs=Costs(
      parameters=[
        BodyCost(
          rank=rank,
          depth=depth,
          count=152_000 * (rank or 1024) + 15_730_000 * depth,
          flops_per_token=2.0 * (rank or 0) * 1024 + 31_460_000 * depth,
        )
        for rank in ranks
        for depth in depths
      ],
      latency_ms=[Latency(depth, 1.9 + 1.41 * depth, 32) for depth in depths],
      device="cpu (2 cores)",
    ),
    skipped={"texts_truncated": 12},
    asymmetric=[
      pair for name, _, metric, _ in tasks for pair in pairs(name, metric, ranks, depths)
    ],
  )
