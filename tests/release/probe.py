"""Compares a folder with its parity.json in one program, where there is no mlembed_jax.

    python probe.py PROGRAM FOLDER

Prints one JSON object: the texts compared, those of other ids (none where the program does not show
ids), and the least cosine.
"""

import base64
import json
import os
import pathlib
import sys
import tempfile
import urllib.request
from collections.abc import Callable
from typing import Any

import numpy as np

Item = dict[str, Any]
Found = tuple[list[list[int]] | None, list[Any]]  # ids and vectors of the items

# Texts that a program does not treat as the folder says; docs/compatibility.md tells of each.
NOT_COMPARED = {
  "fastembed": ("truncated",),  # has one limit
  "langchain": ("code", "truncated"),  # makes line breaks blanks, and has one limit
  "llama_cpp": ("decomposed",),  # composes no letters
  "llama_index": ("truncated",),
  "vllm": ("truncated",),
}


CUTS_NOTHING = ("llama_cpp",)  # refuses texts that are too long


def items(folder: pathlib.Path) -> list[Item]:
  """Returns texts with their prompts, token limits, ids and vectors."""
  stated = json.loads((folder / "parity.json").read_text(encoding="utf-8"))
  prompts = json.loads((folder / "config_sentence_transformers.json").read_text(encoding="utf-8"))
  bert = json.loads((folder / "sentence_bert_config.json").read_text(encoding="utf-8"))
  found = []
  for item in stated["items"]:
    prompt = prompts["prompts"].get(item["prompt_name"], "")
    limit = item.get("max_length", bert["max_seq_length"])
    vector = np.frombuffer(base64.b64decode(item["embedding"]), "<f4")
    text = {"text": prompt + item["text"], "bare": item["text"]}
    found.append(item | text | {"limit": limit, "vector": vector})
  return found


def is_remote(folder: pathlib.Path) -> bool:
  """Returns whether the folder needs the code that an export writes for a factorised table."""
  return "auto_map" in json.loads((folder / "config.json").read_text(encoding="utf-8"))


def _sentence_transformers(folder: pathlib.Path, found: list[Item], **options: Any) -> Found:
  from sentence_transformers import SentenceTransformer

  model = SentenceTransformer(
    str(folder), device="cpu", trust_remote_code=is_remote(folder), **options
  )
  vectors = []
  for item in found:
    model.max_seq_length = item["limit"]
    vectors.append(model.encode(item["text"]))
  return _ids(model.tokenizer, found), vectors


def _ids(tokenizer: Any, found: list[Item]) -> list[list[int]]:
  return [tokenizer(i["text"], truncation=True, max_length=i["limit"])["input_ids"] for i in found]


def sentence_transformers(folder: pathlib.Path, found: list[Item]) -> Found:
  import torch

  return _sentence_transformers(folder, found, model_kwargs={"torch_dtype": torch.float32})


def sentence_transformers_onnx(folder: pathlib.Path, found: list[Item]) -> Found:
  return _sentence_transformers(folder, found, backend="onnx")


def transformers(folder: pathlib.Path, found: list[Item]) -> Found:
  """Takes the last state, cut and normalised: transformers reads no modules."""
  import torch
  from transformers import AutoModel, AutoTokenizer

  model, report = AutoModel.from_pretrained(
    folder,
    trust_remote_code=is_remote(folder),
    torch_dtype=torch.float32,
    output_loading_info=True,
  )
  assert not report["missing_keys"], report
  vectors = []
  for item in found:
    with torch.no_grad():
      states = model(input_ids=torch.tensor([item["input_ids"]])).last_hidden_state
    vectors.append(states[0, -1, : len(item["vector"])].numpy())
  tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=is_remote(folder))
  return _ids(tokenizer, found), vectors


def onnxruntime(folder: pathlib.Path, found: list[Item]) -> Found:
  """Feeds the graph with ids of the library tokenizers, all texts in one batch."""
  import onnxruntime
  from tokenizers import Tokenizer

  tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
  ids = []
  for item in found:
    tokenizer.enable_truncation(item["limit"])
    ids.append(tokenizer.encode(item["text"]).ids)
  width = max(map(len, ids))
  tokens = np.array([[0] * (width - len(row)) + row for row in ids])
  mask = np.array([[0] * (width - len(row)) + [1] * len(row) for row in ids])
  session = onnxruntime.InferenceSession(folder / "onnx/model.onnx")
  feeds = {"input_ids": tokens, "attention_mask": mask}
  return ids, list(session.run(["sentence_embedding"], feeds)[0])


def fastembed(folder: pathlib.Path, found: list[Item]) -> Found:
  from fastembed import TextEmbedding
  from fastembed.common.model_description import ModelSource, PoolingType

  TextEmbedding.add_custom_model(
    model=folder.name,
    pooling=PoolingType.DISABLED,
    normalization=False,
    sources=ModelSource(hf=folder.name),
    dim=len(found[0]["vector"]),
    model_file="onnx/model.onnx",
    output_name="sentence_embedding",
  )
  model = TextEmbedding(folder.name, specific_model_path=str(folder))
  return None, list(model.embed([item["text"] for item in found], batch_size=4))


def llama_cpp(folder: pathlib.Path, found: list[Item]) -> Found:
  """Serves the GGUF file of the folder by llama-server, whose metadata say how it embeds."""
  import xllamacpp

  params = xllamacpp.CommonParams()
  params.model.path = str(next(folder.glob("*.gguf")))
  params.embedding, params.n_parallel, params.verbosity = True, 1, 0
  params.n_ctx = params.n_batch = params.n_ubatch = max(len(i["input_ids"]) for i in found) + 512
  server = xllamacpp.Server(params)
  ids, vectors = [], []
  for item in found:
    body = json.dumps({"content": item["text"], "add_special": True, "parse_special": True})
    headers = {"Content-Type": "application/json"}
    url = server.listening_address + "/tokenize"
    with urllib.request.urlopen(urllib.request.Request(url, body.encode(), headers)) as answer:
      ids.append(json.load(answer)["tokens"])
    answer = server.handle_embeddings({"input": item["text"], "model": folder.name})
    vectors.append(answer["data"][0]["embedding"])
  return ids, vectors


def langchain(folder: pathlib.Path, found: list[Item]) -> Found:
  """Names the prompt of queries, as a prompt in the text would lose its line break."""
  from langchain_huggingface import HuggingFaceEmbeddings

  options: Any = {"device": "cpu", "trust_remote_code": is_remote(folder)}
  options["model_kwargs"] = {"torch_dtype": "float32"}
  model = HuggingFaceEmbeddings(
    model_name=str(folder), model_kwargs=options, query_encode_kwargs={"prompt_name": "query"}
  )
  vectors = model.embed_documents([item["bare"] for item in found])
  queries = {i["id"]: model.embed_query(i["bare"]) for i in found if i["prompt_name"] == "query"}
  return None, [queries.get(i["id"], v) for i, v in zip(found, vectors, strict=True)]


def llama_index(folder: pathlib.Path, found: list[Item]) -> Found:
  from llama_index.embeddings.huggingface import HuggingFaceEmbedding

  model = HuggingFaceEmbedding(
    str(folder),
    device="cpu",
    trust_remote_code=is_remote(folder),
    query_instruction="",
    text_instruction="",
    model_kwargs={"torch_dtype": "float32"},
  )
  return None, model.get_text_embedding_batch([item["text"] for item in found])


def vllm(folder: pathlib.Path, found: list[Item]) -> Found:
  from vllm import LLM

  model = LLM(
    str(folder),
    runner="pooling",
    dtype="float32",
    enforce_eager=True,
    gpu_memory_utilization=0.4,  # of the memory of the machine
    trust_remote_code=is_remote(folder),
  )
  cut = {"truncate_prompt_tokens": found[0]["limit"]}
  answers = model.embed([item["text"] for item in found], tokenization_kwargs=cut)
  # Left to the end of the program, its threads abort it in some runs: std::terminate, status 134.
  model.llm_engine.engine_core.shutdown()
  return [list(a.prompt_token_ids) for a in answers], [a.outputs.embedding for a in answers]


def is_compared(program: str, item: Item) -> bool:
  """Returns whether a program treats a text as the folder says."""
  was_cut = len(item["input_ids"]) >= item["limit"]
  if program in CUTS_NOTHING and was_cut:
    return False
  return item["id"] not in NOT_COMPARED.get(program, ())


def compared(found: list[Item], ids: list[list[int]] | None, vectors: list[Any]) -> dict[str, Any]:
  """Returns the names of the texts whose ids differ, and the least cosine of all."""
  other = [
    i["id"] for i, row in zip(found, ids or [], strict=ids is not None) if row != i["input_ids"]
  ]
  cosines = []
  for item, vector in zip(found, vectors, strict=True):
    vector = np.asarray(vector, np.float32)[: len(item["vector"])]
    cosines.append(float(item["vector"] @ vector / np.linalg.norm(vector)))
  return {"other_ids": other if ids else None, "cosine": min(cosines), "texts": len(found)}


PROGRAMS: dict[str, Callable[[pathlib.Path, list[Item]], Found]] = {
  f.__name__: f
  for f in (
    *(sentence_transformers, transformers, sentence_transformers_onnx, onnxruntime, fastembed),
    *(llama_cpp, langchain, llama_index, vllm),
  )
}


def main() -> None:
  program, folder = sys.argv[1], pathlib.Path(sys.argv[2])
  found = [item for item in items(folder) if is_compared(program, item)]
  os.chdir(tempfile.mkdtemp())  # no folder of this name may stand in the way
  print(json.dumps(compared(found, *PROGRAMS[program](folder, found))))


if __name__ == "__main__":
  main()
