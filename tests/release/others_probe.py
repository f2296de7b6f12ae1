"""Tries statements of docs/compatibility.md in one program, where there is no mlembed_jax.

    python others_probe.py PROGRAM WHOLE CUT

WHOLE and CUT are exported folders, the second of fewer dimensions. Prints a JSON object: whether
each statement was seen to be true.
"""

import json
import pathlib
import shutil
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np

Seen = dict[str, bool]


def edited(folder: pathlib.Path, file: str, **fields: Any) -> pathlib.Path:
  """Returns a copy of a folder, one of whose JSON files has other fields; None: one is absent."""
  copy = pathlib.Path(tempfile.mkdtemp()) / folder.name
  shutil.copytree(folder, copy)
  content = json.loads((copy / file).read_text(encoding="utf-8")) | fields
  kept = {key: value for key, value in content.items() if value is not None}
  (copy / file).write_text(json.dumps(kept), encoding="utf-8")
  return copy


def unit(vectors: np.ndarray) -> np.ndarray:
  return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def transformers(whole: pathlib.Path, cut: pathlib.Path) -> Seen:
  """A tokenizer class decides the normalizer, not tokenizer.json."""
  from tokenizers import Tokenizer
  from transformers import AutoTokenizer

  text, seen = "Straße ÀÉ", {}
  lower = edited(whole, "tokenizer.json", normalizer={"type": "Lowercase"})
  stated = Tokenizer.from_file(str(lower / "tokenizer.json")).encode(text).ids
  for kind, kept in (("Qwen2Tokenizer", False), (None, False), ("PreTrainedTokenizerFast", True)):
    folder = edited(lower, "tokenizer_config.json", tokenizer_class=kind)
    ids = AutoTokenizer.from_pretrained(folder)(text).input_ids
    seen[f"{kind}: tokenizer.json is {'obeyed' if kept else 'not obeyed'}"] = (
      ids == stated
    ) == kept
  return seen


def sentence_transformers(whole: pathlib.Path, cut: pathlib.Path) -> Seen:
  from sentence_transformers import SentenceTransformer

  prompts = {"query": "Q: ", "passage": "P: "}
  folder = edited(whole, "config_sentence_transformers.json", prompts=prompts)
  model = SentenceTransformer(str(folder), device="cpu")
  document = model.encode_document("Germany")
  bare, passage = model.encode(["Germany", "P: Germany"])
  model = SentenceTransformer(str(whole), device="cpu")
  model.max_seq_length = 100
  saved = tempfile.mkdtemp()
  model.save(saved)
  files = ("sentence_bert_config.json", "tokenizer_config.json")
  bert, tokenizer = (json.loads(pathlib.Path(saved, file).read_text()) for file in files)
  return {
    "encode_document has no prompt": np.allclose(document, bare, atol=1e-4),
    "encode_document differs from the prompt passage": not np.allclose(
      document, passage, atol=0.01
    ),
    "sentence_bert_config.json loses the length": "max_seq_length" not in bert,
    "tokenizer_config.json gets it": tokenizer["model_max_length"] == 100,
  }


def txtai(whole: pathlib.Path, cut: pathlib.Path) -> Seen:
  from txtai import Embeddings

  width = json.loads((cut / "config.json").read_text(encoding="utf-8"))["hidden_size"]
  vector = Embeddings(path=str(cut)).transform("Germany")
  return {"a cut dimension is not cut": len(vector) == width}


def mlx_embeddings(whole: pathlib.Path, cut: pathlib.Path) -> Seen:
  import mlx.core as mx
  from mlx_embeddings.utils import load

  mx.set_default_device(mx.cpu)
  rows, mask = [[0, 0, 0, 5, 6, 7], [1, 2, 3, 4, 5, 6]], [[0, 0, 0, 1, 1, 1], [1] * 6]

  def vectors(folder: pathlib.Path) -> np.ndarray:
    model, _ = load(str(folder))
    return np.array(model(mx.array(rows), attention_mask=mx.array(mask)).text_embeds)

  other = edited(whole, "config.json", rope_theta=None)  # rope_parameters says the same
  both, one = vectors(whole), vectors(other)
  return {
    "a text with padding before it is NaN": bool(np.isnan(both[0]).all()),
    "the longest is right": bool(np.isfinite(both[1]).all()),
    "without rope_theta it is another vector": float(both[1] @ one[1]) < 0.9999,
  }


def quantize_dynamic(whole: pathlib.Path, cut: pathlib.Path) -> Seen:
  import onnx
  import onnxruntime
  from onnx import helper, numpy_helper
  from onnxruntime.quantization import QuantType
  from onnxruntime.quantization import quantize_dynamic as quantize

  drawn, path = np.random.default_rng(0), tempfile.mkdtemp()
  kernels = [drawn.normal(size=(64, 64)).astype("f4") for _ in range(3)]

  def quantized(attention: bool) -> str:
    kinds = [helper.make_node("MatMul", ["x", name], [f"{name}x"]) for name in "qkv"]
    last = helper.make_node("Identity", ["qx"], ["y"])
    if attention:
      heads = {"q_num_heads": 4, "kv_num_heads": 4}
      last = helper.make_node("Attention", ["qx", "kx", "vx"], ["y"], **heads)
    ends = [helper.make_tensor_value_info(name, 1, [1, "n", 64]) for name in "xy"]
    arrays = [numpy_helper.from_array(k, name) for k, name in zip(kernels, "qkv", strict=True)]
    graph = helper.make_graph([*kinds, last], "model", ends[:1], ends[1:], arrays)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)
    onnx.save(model, f"{path}/float.onnx")
    onnxruntime.InferenceSession(f"{path}/float.onnx")
    quantize(f"{path}/float.onnx", f"{path}/int8.onnx", weight_type=QuantType.QInt8)
    return f"{path}/int8.onnx"

  session = onnxruntime.InferenceSession(quantized(attention=False))
  states = drawn.normal(size=(1, 2, 64)).astype("f4") * [[[1], [30]]]
  alone, beside = (
    session.run(None, {"x": x.astype("f4")})[0][0, 0] for x in (states[:, :1], states)
  )
  try:
    onnxruntime.InferenceSession(quantized(attention=True))
    refused = False
  except Exception as error:
    refused = "QAttention" in str(error)
  return {
    "a state depends on those beside it": float(unit(alone) @ unit(beside)) < 0.999,
    "Attention becomes QAttention, which is refused": refused,
  }


def indexes(whole: pathlib.Path, cut: pathlib.Path) -> Seen:
  import lancedb
  import pyarrow as pa
  from usearch.index import Index

  vectors = unit(np.random.default_rng(0).normal(size=(8, 64))).astype(np.float32)
  bits, codes = np.packbits(vectors > 0, axis=1), np.rint(vectors * 127 + 128).astype(np.uint8)

  def index(added: np.ndarray, **options: Any) -> Index:
    found = Index(ndim=64, **options)
    found.add(np.arange(8), added)
    return found

  stored = [index(vectors * size, metric="ip", dtype="i8").get(0) for size in (1, 3)]
  own = index((codes - 128).view(np.int8), metric="cos", dtype="i8").get(0)
  cosines = index(bits, metric="cos", dtype="b1").search(bits[0], 3, exact=True).distances
  column = pa.FixedSizeListArray.from_arrays(codes.ravel(), 64)
  table = lancedb.connect(tempfile.mkdtemp()).create_table("codes", pa.table({"vector": column}))
  near = table.search(codes[0].tolist()).limit(8).to_arrow()["_distance"].to_numpy()
  apart = np.unpackbits(codes[0] ^ codes, axis=1).sum(axis=1)
  return {
    "usearch i8: floats lose their length, also for ip": bool((stored[0] == stored[1]).all()),
    "usearch i8: codes are taken as they are": bool((own == (codes - 128).view(np.int8)[0]).all()),
    "usearch b1: cosines are NaN": bool(np.isnan(cosines).any()),
    "LanceDB: uint8 is compared bit by bit": bool((np.sort(near) == np.sort(apart)).all()),
  }


PROGRAMS: dict[str, Callable[[pathlib.Path, pathlib.Path], Seen]] = {
  f.__name__: f
  for f in (transformers, sentence_transformers, txtai, mlx_embeddings, quantize_dynamic, indexes)
}


if __name__ == "__main__":
  program, whole, cut = sys.argv[1:]
  seen = PROGRAMS[program](pathlib.Path(whole), pathlib.Path(cut))
  print(json.dumps({statement: bool(value) for statement, value in seen.items()}))
