#!/usr/bin/env bash
# The dot products of sentence-transformers overflow on its own int8 embeddings.
#
# Guess: `util.dot_score` of int8 codes, as `encode(precision="int8")` and `quantize_embeddings` give
# them, are whole numbers up to 64 * 128 * 128 (64 dimensions), or an error, as `util.cos_sim` raises
# one; `util.semantic_search` with `dot_score` finds a code by itself.
#
# Seen (sentence-transformers 6.2.0, torch 2.13.0): `dot_score` multiplies with `torch.mm`, whose
# result is int8, too: 157,784 comes out as 88. `pairwise_dot_score` wraps each product of two codes
# to 8 bits before it adds them up. Only 1 % of 200 codes find themselves. `cos_sim` refuses int8
# with an error of torch, which names no remedy.
#
# Why it matters: the scores look like scores, with both signs and no NaN, and every ranking is
# noise. A benchmark of int8 by these functions says that int8 is useless.
#
# What to do: turn codes into float before any product (`codes.astype("float32")`), or decode them by
# their ranges, which also removes what the dimensions have in common.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet sentence-transformers==6.2.0 torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import sys
from importlib.metadata import version

import numpy as np
from sentence_transformers import util
from sentence_transformers.util.quantization import quantize_embeddings

drawn = np.random.default_rng(0).normal(size=(200, 64)).astype(np.float32)
vectors = drawn / np.linalg.norm(drawn, axis=1, keepdims=True)
codes = quantize_embeddings(vectors, "int8", calibration_embeddings=vectors)
wide = codes.astype(np.int64)


def found(searched):
  hits = util.semantic_search(searched, searched, top_k=1, score_function=util.dot_score)
  return float(np.mean([hit[0]["corpus_id"] == row for row, hit in enumerate(hits)]))


print("sentence-transformers", version("sentence-transformers"), "torch", version("torch"))
print("guess: both scores are the product, and nearly every code finds itself")
product, score = int(wide[0] @ wide[0]), int(util.dot_score(codes[:1], codes[:1])[0, 0])
pairwise = int(util.pairwise_dot_score(codes[:1], codes[:1])[0])
print(f"a code times itself: {product}; dot_score: {score}; pairwise_dot_score: {pairwise}")
shares = found(codes), found(codes.astype(np.float32))
print("codes that find themselves, as int8 and as float32: {:.2f} {:.2f}".format(*shares))
wrapped = int(np.sum((wide[0] * wide[0]).astype(np.int8)))
try:
  util.cos_sim(codes, codes)
  refused = False
except RuntimeError as error:
  refused = True
  print("cos_sim:", error)
expected = (score, pairwise) == (int(np.int64(product).astype(np.int8)), wrapped) and refused
if not expected or score == product or shares[0] > 0.2 or shares[1] < 0.9:
  sys.exit("Seen before were 88, -168, 0.01 and 1.00.")
PYTHON
