#!/usr/bin/env bash
# The local mode of Qdrant keeps float vectors in a collection of whole numbers.
#
# Guess: `QdrantClient(":memory:")` treats `datatype=Datatype.UINT8` as it is documented: vectors are
# whole numbers from 0 to 255, and others are rounded or refused. A unit vector of floats comes back
# as zeros, and a search among such vectors finds nothing.
#
# Seen (qdrant-client 1.20.0): every `datatype` and every `quantization_config` is accepted and
# nothing is rounded. The vectors of UINT8, FLOAT16 and all others come back as the same numbers,
# and the ten nearest are those of float vectors, as they are with quantisation to int8 or to a bit.
#
# Why it matters: the local mode is what tests run against. A pipeline that stores unit vectors as
# UINT8, a type that has no place for them, passes them all; and a trial of int8 or of bits says
# that they cost nothing.
#
# What to do: round vectors before they are stored, or try such a collection on a server.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet qdrant-client==1.20.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import sys
from importlib.metadata import version

import numpy as np
from qdrant_client import QdrantClient, models

drawn = np.random.default_rng(0).normal(size=(600, 64))
vectors = (drawn / np.linalg.norm(drawn, axis=1, keepdims=True)).astype(np.float32)
queries, documents = np.split(vectors, [50])
exact = np.argsort(-queries @ documents.T, axis=1)[:, :10]
client = QdrantClient(":memory:")
INT8 = models.ScalarQuantization(scalar=models.ScalarQuantizationConfig(type="int8"))
BIT = models.BinaryQuantization(binary=models.BinaryQuantizationConfig())


def tried(datatype, quantization=None):
  """Returns how many of the ten nearest are found, and the vectors that come back."""
  name = f"{datatype.value} {type(quantization).__name__}"
  size = models.VectorParams(size=64, distance=models.Distance.DOT, datatype=datatype)
  client.create_collection(name, vectors_config=size, quantization_config=quantization)
  ids = list(range(len(documents)))
  client.upsert(name, models.Batch(ids=ids, vectors=documents.tolist()))
  hits = [client.query_points(name, query=query.tolist(), limit=10).points for query in queries]
  share = np.mean([
    len(set(row) & {hit.id for hit in found}) / 10
    for row, found in zip(exact, hits, strict=True)
  ])
  stored = client.retrieve(name, ids, with_vectors=True)
  return float(share), np.array([point.vector for point in stored])


print("qdrant-client", version("qdrant-client"), "- guess: UINT8 keeps whole numbers, and finds none")
kinds = [(datatype, None) for datatype in models.Datatype]
kinds += [(models.Datatype.FLOAT32, INT8), (models.Datatype.FLOAT32, BIT)]
for datatype, quantization in kinds:
  share, stored = tried(datatype, quantization)
  kept = bool(np.allclose(stored, documents, atol=1e-7))
  kind = type(quantization).__name__ if quantization else "no quantisation"
  print(f"{datatype.value}, {kind}: {share:.2f} of the ten nearest; kept as they were: {kept}")
  if share < 1 or not kept:
    sys.exit("The local mode rounds vectors now.")
PYTHON
