"""The nearest of many vectors to a few, exact. numpy alone."""

import numpy as np
from jaxtyping import Float, Int

from mlembed_jax.quantize import LEVELED, Ranges, Vectors, decoded, unit

BLOCK = 16_384  # vectors that are compared at a time; 1,024 dimensions of them are 64 MiB


def nearest(
  queries: Vectors, documents: np.ndarray, k: int, calibration: Ranges | None = None
) -> tuple[Float[np.ndarray, "Q K"], Int[np.ndarray, "Q K"]]:
  """Returns the cosines of the `k` nearest documents to each query, and their rows, best first.

  Equal cosines stand in the order of their rows. There are fewer than `k` where there are fewer
  documents.

  Args:
    queries: float32 vectors of any length.
    documents: float32 vectors, or int8 or uint8 codes; an array that is mapped from a file is read
      a block at a time.
    k: how many.
    calibration: the ranges [2, D] of codes.

  Raises:
    ValueError: codes without ranges, or other sizes than those of the queries.
  """
  if documents.shape[1] != queries.shape[1]:
    raise ValueError(f"documents: {documents.shape[1]} dimensions, queries {queries.shape[1]}")
  if documents.dtype.name in LEVELED and calibration is None:
    raise ValueError(f"documents: codes of {documents.dtype} need the ranges they were made by")
  queries = unit(queries)
  scores = np.empty((len(queries), 0), np.float32)
  rows = np.empty((len(queries), 0), np.int64)
  for start in range(0, len(documents), BLOCK):
    block = np.asarray(documents[start : start + BLOCK])
    vectors = block.astype(np.float32) if calibration is None else decoded(block, calibration)
    scores = np.concatenate([scores, queries @ unit(vectors).T], axis=1)
    new = np.broadcast_to(start + np.arange(len(block)), (len(queries), len(block)))
    rows = np.concatenate([rows, new], axis=1)
    best = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    scores, rows = (np.take_along_axis(found, best, axis=1) for found in (scores, rows))
  return scores, rows
