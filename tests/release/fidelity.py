"""What weights of 8 bits cost: vectors and held-out scores, by the programs that run them.

    python -m tests.release.fidelity FOLDER --tasks HELDOUT --texts FILE

FOLDER holds onnx/model.onnx in int8 and a GGUF file in q8_0, as `export --variants onnx-int8 --gguf
q8_0` writes them. Their vectors, by ONNX Runtime and llama.cpp, are compared with those of our own
encoder in float32: on 600 texts of FILE (columns lang and text), 12 of each of 50 languages, and in
the scores of the held-out files. All get the same ids. Prints one table.
"""

import argparse
import collections
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from mlembed_jax.eval.tasks import HeldoutTask, load_folder
from mlembed_jax.inference import Encoder

LANGUAGES, TEXTS = 50, 12
BATCH = 32

Ids = Sequence[Sequence[int]]
Encode = Callable[[Ids], np.ndarray]


def onnx(folder: pathlib.Path) -> Encode:
  """Returns the graph of a folder, fed with padding on the left."""
  import onnxruntime

  session = onnxruntime.InferenceSession(folder / "onnx/model.onnx")

  def batch(ids: Ids) -> np.ndarray:
    width = max(map(len, ids))
    tokens = np.array([[0] * (width - len(row)) + list(row) for row in ids])
    mask = np.array([[0] * (width - len(row)) + [1] * len(row) for row in ids])
    feeds = {"input_ids": tokens, "attention_mask": mask}
    return session.run(["sentence_embedding"], feeds)[0]

  return lambda ids: np.concatenate(
    [batch(ids[start : start + BATCH]) for start in range(0, len(ids), BATCH)]
  )


def llama_cpp(folder: pathlib.Path) -> Encode:
  """Returns the model of the GGUF file of a folder."""
  import xllamacpp

  params = xllamacpp.CommonParams()
  params.model.path = str(next(folder.glob("*[qQ]8_0.gguf")))
  params.embedding, params.n_parallel, params.verbosity = True, 1, 0
  params.n_ctx = params.n_batch = params.n_ubatch = 2048
  server = xllamacpp.Server(params)

  def one(ids: Sequence[int]) -> Any:
    return server.handle_embeddings({"input": list(ids), "model": "m"})["data"][0]["embedding"]

  return lambda ids: np.array([one(row) for row in ids], np.float32)


def sample(path: pathlib.Path) -> list[str]:
  """Returns the first texts of each of the languages that have most."""
  by_language = collections.defaultdict(list)
  for row in pq.read_table(path, columns=["lang", "text"]).to_pylist():
    by_language[row["lang"]].append(row["text"])
  longest = sorted(by_language.values(), key=len, reverse=True)[:LANGUAGES]
  found = [text for texts in longest for text in texts[:TEXTS]]
  if len(found) < LANGUAGES * TEXTS:
    raise SystemExit(f"{path} has no {TEXTS} texts of each of {LANGUAGES} languages")
  return found


def main_score(task: HeldoutTask, vectors: np.ndarray) -> float:
  """Returns the mean over the languages of a task, in percent."""
  by_language = task.score(vectors, vectors).values()
  return 100 * float(np.mean([scores[task.metric] for scores in by_language]))


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("folder", type=pathlib.Path)
  parser.add_argument("--tasks", type=pathlib.Path, required=True)
  parser.add_argument("--texts", type=pathlib.Path, required=True, help="parquet")
  args = parser.parse_args()
  encoder, tasks, texts = Encoder.load(args.folder), load_folder(args.tasks), sample(args.texts)
  ids = encoder.recipe.tokenizer.encode
  limit = encoder.max_seq_length
  programs: dict[str, Encode | None] = {"float32": None, "onnx int8": onnx(args.folder)}
  programs["gguf q8_0"] = llama_cpp(args.folder)
  exact = encoder.encode(texts)
  names = [f"{task.name} {task.metric}" for task in tasks]
  print(" | ".join(["weights", f"mean cosine of {len(texts)} texts", "least", *names]))
  for name, run in programs.items():
    vectors = lambda texts, run=run: run(ids(texts, limit)) if run else encoder.encode(texts)  # noqa: E731
    cosines = (exact * vectors(texts)).sum(1)
    scores = [f"{main_score(task, vectors(task.texts)):.2f}" for task in tasks]
    print(" | ".join([name, f"{cosines.mean():.5f}", f"{cosines.min():.5f}", *scores]), flush=True)


if __name__ == "__main__":
  main()
