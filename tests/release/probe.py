"""Compares a folder with its parity.json, in an environment that has no mlembed_jax.

    python probe.py FOLDER

Prints one JSON object: versions, and per program the texts of other ids and the least cosine.
"""

import base64
import importlib.metadata
import json
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, AutoTokenizer

PROGRAMS = ("sentence-transformers", "transformers")


def items(folder: pathlib.Path) -> Iterator[dict[str, Any]]:
  """Yields texts with their prompts, token limits, ids and vectors."""
  stated = json.loads((folder / "parity.json").read_text(encoding="utf-8"))
  prompts = json.loads((folder / "config_sentence_transformers.json").read_text(encoding="utf-8"))
  bert = json.loads((folder / "sentence_bert_config.json").read_text(encoding="utf-8"))
  for item in stated["items"]:
    prompt = prompts["prompts"].get(item["prompt_name"], "")
    limit = item.get("max_length", bert["max_seq_length"])
    vector = np.frombuffer(base64.b64decode(item["embedding"]), "<f4")
    yield item | {"text": prompt + item["text"], "limit": limit, "vector": vector}


def by_sentence_transformers(
  folder: pathlib.Path, remote: bool, found: list[dict[str, Any]]
) -> tuple[Any, list[np.ndarray]]:
  """Returns the tokenizer and the vectors, computed in float32."""
  model = SentenceTransformer(
    str(folder),
    device="cpu",
    trust_remote_code=remote,
    model_kwargs={"torch_dtype": torch.float32},
  )
  vectors = []
  for item in found:
    model.max_seq_length = item["limit"]
    vectors.append(np.asarray(model.encode(item["text"])))
  return model.tokenizer, vectors


def by_transformers(
  folder: pathlib.Path, remote: bool, found: list[dict[str, Any]]
) -> tuple[Any, list[np.ndarray]]:
  """Returns the same of transformers alone: the last state, cut and normalised."""
  model, report = AutoModel.from_pretrained(
    folder, trust_remote_code=remote, torch_dtype=torch.float32, output_loading_info=True
  )
  assert not report["missing_keys"], report
  vectors = []
  for item in found:
    with torch.no_grad():
      states = model(input_ids=torch.tensor([item["input_ids"]])).last_hidden_state
    vector = states[0, -1, : len(item["vector"])].numpy()
    vectors.append(vector / np.linalg.norm(vector))
  return AutoTokenizer.from_pretrained(folder, trust_remote_code=remote), vectors


def compared(found: list[dict[str, Any]], tokenizer: Any, vectors: list[np.ndarray]) -> dict:
  """Returns the names of the texts whose ids differ, and the least cosine of all."""
  other = []
  for item in found:
    ids = tokenizer(item["text"], truncation=True, max_length=item["limit"])["input_ids"]
    other += [item["id"]] if ids != item["input_ids"] else []
  cosines = [float(i["vector"] @ v) for i, v in zip(found, vectors, strict=True)]
  return {"other_ids": other, "cosine": float(np.min(cosines)), "texts": len(found)}


def main() -> None:
  folder = pathlib.Path(sys.argv[1])
  found = list(items(folder))
  config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
  remote = "auto_map" in config  # the code that an export writes for a factorised table
  loaders = dict(zip(PROGRAMS, (by_sentence_transformers, by_transformers), strict=True))
  results = {name: compared(found, *load(folder, remote, found)) for name, load in loaders.items()}
  versions = {name: importlib.metadata.version(name) for name in (*PROGRAMS, "torch")}
  print(json.dumps({"versions": versions, "results": results}))


if __name__ == "__main__":
  main()
