"""GGUF files, by llama.cpp."""

import dataclasses
import json
import pathlib
import urllib.request
from collections.abc import Iterator
from typing import Any

import gguf
import numpy as np
import pytest
import xllamacpp

from mlembed_jax.data.tokenizer import Tokenizer
from mlembed_jax.errors import ExportError
from mlembed_jax.hf import gguf_file, parity
from mlembed_jax.hf.config_files import GGUF_TYPES, Forms
from mlembed_jax.matryoshka import Slice
from tests.hf.exports import Trained, read, trained

# Cosines. llama.cpp keeps keys and values of attention in float16, whatever the weights are.
LEAST = {"f32": 0.9999, "f16": 0.9999, "q8_0": 0.99}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
CUT = Slice(depth=2, dim=16, rank=16)


class Server:
  """llama-server with one file, whose metadata alone say how it embeds."""

  def __init__(self, file: pathlib.Path):
    params = xllamacpp.CommonParams()
    params.model.path = str(file)
    params.embedding = True
    params.n_parallel = 1
    params.n_ctx = params.n_batch = params.n_ubatch = 128
    params.verbosity = 0
    self.server = xllamacpp.Server(params)

  def ids(self, text: str) -> list[int]:
    return self._post("/tokenize", content=text, add_special=True, parse_special=True)["tokens"]

  def vector(self, text: str | list[int]) -> np.ndarray:
    found = self.server.handle_embeddings({"input": text, "model": "m"})
    return np.array(found["data"][0]["embedding"], np.float32)

  def _post(self, path: str, **body: Any) -> dict[str, Any]:
    headers = {"Content-Type": "application/json"}
    address = self.server.listening_address + path
    request = urllib.request.Request(address, json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=60) as answer:
      return json.load(answer)


def texts(folder: pathlib.Path) -> Iterator[tuple[str, list[int], np.ndarray]]:
  """Yields text, ids and vector of parity.json, but what llama.cpp does not do.

  It composes no letters, and refuses texts that it would have to cut.
  """
  prompts = read(folder / "config_sentence_transformers.json")["prompts"]
  for item in read(folder / "parity.json")["items"]:
    if item["id"] not in ("decomposed", "long", "truncated"):
      text = prompts.get(item["prompt_name"], "") + item["text"]
      yield text, item["input_ids"], parity.embedding(item)


@pytest.mark.parametrize("family", ["qwen3", "qwen2", "llama"])
def test_llama_cpp_gives_our_ids_and_vectors(
  family: str, data: pathlib.Path, tmp_path: pathlib.Path
):
  head_dim = 12 if family == "qwen2" else 16
  made = trained(data, **{"model.family": family, "model.head_dim": head_dim})
  folder = made.export(tmp_path / "out", CUT, forms=Forms(gguf=("f32",)))
  [file] = read(folder / "mlembed.json")["gguf"]
  assert file == "tiny-d16-l2-r16-F32.gguf"
  server = Server(folder / file)
  for text, ids, expected in texts(folder):
    assert server.ids(text) == ids
    vector = server.vector(text)
    assert vector.shape == (made.run.config.model.width,)
    assert vector[: CUT.dim] @ expected > LEAST["f32"]
    np.testing.assert_array_equal(vector[CUT.dim :], 0)


@pytest.mark.parametrize("kind", GGUF_TYPES)
def test_each_type_keeps_directions(kind: str, factorised: Trained, tmp_path: pathlib.Path):
  folder = factorised.export(tmp_path / "out", forms=Forms(factors=True, gguf=(kind,)))
  server = Server(folder / read(folder / "mlembed.json")["gguf"][0])
  cosines = [server.vector(ids) @ expected for _, ids, expected in texts(folder)]
  assert min(cosines) > LEAST[kind]


def test_llama_cpp_composes_no_letters_and_refuses_what_it_would_have_to_cut(
  factorised: Trained, tmp_path: pathlib.Path
):
  path = tmp_path / "tokenizer.json"
  path.write_text(json.dumps(read(factorised.tokenizer.path) | {"normalizer": {"type": "NFC"}}))
  tokenizer = Tokenizer(path, factorised.tokenizer.pooled_token)
  made = dataclasses.replace(factorised, tokenizer=tokenizer)
  folder = made.export(tmp_path / "out", forms=Forms(gguf=("f32",)))
  server = Server(folder / read(folder / "mlembed.json")["gguf"][0])
  items = {item["id"]: item for item in read(folder / "parity.json")["items"]}
  composed, other = items["composed"], items["decomposed"]
  assert composed["input_ids"] == other["input_ids"] == server.ids(composed["text"])
  assert server.ids(other["text"]) != other["input_ids"]
  assert len(server.ids(items["long"]["text"])) > 128
  answer = server.server.handle_embeddings({"input": items["long"]["text"], "model": "m"})
  assert answer["error"]["code"] == 400


def test_the_file_says_what_a_server_needs(factorised: Trained, tmp_path: pathlib.Path):
  folder = factorised.export(tmp_path / "out", CUT, forms=Forms(gguf=("f16", "q8_0")))
  for file, most in zip(read(folder / "mlembed.json")["gguf"], ("F16", "Q8_0"), strict=True):
    reader = gguf.GGUFReader(folder / file)
    said = {name: field.contents() for name, field in reader.fields.items()}
    assert said["qwen3.pooling_type"] == gguf.PoolingType.LAST
    assert said["qwen3.context_length"] == factorised.run.config.export.max_seq_length
    assert said["qwen3.block_count"] == CUT.depth
    assert said["tokenizer.ggml.eos_token_id"] == factorised.tokenizer.pooled_id
    assert said["tokenizer.ggml.add_eos_token"] and not said["tokenizer.ggml.add_bos_token"]
    assert len(said["tokenizer.ggml.tokens"]) == factorised.run.config.model.vocab
    kinds = {t.tensor_type.name for t in reader.tensors if len(t.shape) == 2}
    assert most in kinds and kinds <= {"F16", "Q8_0"}


@pytest.mark.parametrize(
  ("pre_tokenizer", "name"),
  [
    (BYTES, "gpt-2"),
    (BYTES | {"add_prefix_space": True}, None),
    (
      {
        "type": "Sequence",
        "pretokenizers": [{"type": "Digits", "individual_digits": True}, BYTES],
      },
      "smollm",
    ),
    ({"type": "Whitespace"}, None),
    (None, None),
    (
      {
        "type": "Sequence",
        "pretokenizers": [
          {"type": "Split", "pattern": {"Regex": r"\s+"}, "behavior": "Isolated"},
          {"type": "ByteLevel", "use_regex": False},
        ],
      },
      None,
    ),
  ],
)
def test_how_texts_are_split_is_known_or_refused(pre_tokenizer: Any, name: str | None):
  spec = {"model": {"type": "BPE"}, "pre_tokenizer": pre_tokenizer}
  if name:
    assert gguf_file.splitting(spec) == name
  else:
    with pytest.raises(ExportError, match=r"splits texts as llama\.cpp cannot"):
      gguf_file.splitting(spec)


def test_what_is_done_to_a_text_before_is_known_or_refused():
  spec = {"model": {"type": "BPE"}, "pre_tokenizer": BYTES}
  assert gguf_file.splitting(spec | {"normalizer": {"type": "NFC"}}) == "gpt-2"
  with pytest.raises(ExportError, match=r"normalizer of tokenizer\.json is Lowercase"):
    gguf_file.splitting(spec | {"normalizer": {"type": "Lowercase"}})


def test_heads_that_llama_cpp_does_not_read_are_refused(data: pathlib.Path, tmp_path: pathlib.Path):
  made = trained(data, **{"model.family": "qwen2"})
  with pytest.raises(ExportError, match=r"is the width, found 4 \* 16 and 48"):
    made.export(tmp_path / "out", forms=Forms(gguf=("f32",)))
  assert not list(tmp_path.iterdir())


def test_an_unknown_type_is_refused_before_anything_is_written(
  factorised: Trained, tmp_path: pathlib.Path
):
  with pytest.raises(ExportError, match="gguf: 'q4_0' is no type; choose f32, f16, q8_0"):
    factorised.export(tmp_path / "out", forms=Forms(gguf=("q4_0",)))
  assert not list(tmp_path.iterdir())
