"""The nearest texts of a file: exact, of float32 and of codes."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest

from mlembed_jax.errors import ConfigError
from mlembed_jax.inference import Encoder
from mlembed_jax.nearest import nearest
from mlembed_jax.quantize import decoded, quantize, ranges, unit
from mlembed_jax.vector_files import Encoding, encoding_path


def vectors(count, dim=24, seed=0):
  return np.random.default_rng(seed).normal(size=(count, dim)).astype(np.float32)


@pytest.mark.parametrize("block", [7, 1000])
def test_the_nearest_are_those_of_a_full_sort_over_any_blocks(monkeypatch, block):
  monkeypatch.setattr("mlembed_jax.nearest.BLOCK", block)
  documents, queries = vectors(100), vectors(5, seed=1)
  documents[40:50] = documents[60:70]  # ties
  scores, rows = nearest(queries, documents, 12)
  every = unit(queries) @ unit(documents).T
  expected = np.argsort(-every, axis=1, kind="stable")[:, :12]
  np.testing.assert_array_equal(rows, expected)
  np.testing.assert_allclose(scores, np.take_along_axis(every, expected, axis=1), atol=1e-6)
  assert nearest(queries, documents[:3], 12)[1].shape == (5, 3)


@pytest.mark.parametrize("precision", ["int8", "uint8"])
def test_codes_are_compared_decoded(precision):
  documents, queries = vectors(300), vectors(5, seed=1)
  calibration = ranges(documents)
  codes = quantize(documents, precision, calibration)
  found = nearest(queries, codes, 10, calibration)[1]
  np.testing.assert_array_equal(found, nearest(queries, decoded(codes, calibration), 10)[1])
  with pytest.raises(ValueError, match="need the ranges"):
    nearest(queries, codes, 10)
  with pytest.raises(ValueError, match="documents: 23 dimensions, queries 24"):
    nearest(queries, documents[:, :23], 10)


def test_similarity_is_the_cosine():
  first, second = vectors(3), vectors(4, seed=1)
  found = Encoder.similarity(first, second)
  lengths = np.linalg.norm(first, axis=1)[:, None] * np.linalg.norm(second, axis=1)
  np.testing.assert_allclose(found, first @ second.T / lengths, atol=1e-6)


TEXTS = [f"the book number {i}" for i in range(120)]


@pytest.fixture(scope="module")
def files(exported, tmp_path_factory):
  root = tmp_path_factory.mktemp("search")
  (root / "texts.txt").write_text("\n".join(TEXTS), encoding="utf-8")
  encoder = Encoder.load(exported["full"])
  found = encoder.encode_document(TEXTS)
  np.save(root / "v.npy", found)
  calibration = ranges(found)
  np.save(root / "codes.npy", quantize(found, "int8", calibration))
  np.save(root / "codes.ranges.npy", calibration)
  np.save(root / "bare.npy", quantize(found, "int8", calibration))
  np.save(root / "scalar.npy", np.float64(1))
  np.save(root / "bits.npy", quantize(found, "ubinary"))
  Encoding("Find: ", 1, None, False, None).write(root / "cut.npy")
  np.save(root / "cut.npy", encoder.encode(TEXTS, prompt="Find: ", depth=1, dim=16))
  shutil.copy(root / "cut.npy", root / "swapped.npy")
  shutil.copy(root / "cut.npy.json", root / "swapped.npy.json")
  # A narrow range, as of few texts: many values lie beyond it.
  narrow = np.stack([np.full_like(found[0], -0.05), np.full_like(found[0], 0.05)])
  Encoding("", None, None, False, None).write(root / "narrow.npy")
  np.save(root / "narrow.npy", quantize(encoder.encode(TEXTS, prompt=""), "int8", narrow))
  np.save(root / "narrow.ranges.npy", narrow)
  (root / "moved.txt").write_text("\n".join([TEXTS[0], *TEXTS[2:-1], TEXTS[1], TEXTS[-1]]))
  (root / "swapped.txt").write_text("\n".join(TEXTS[::-1]), encoding="utf-8")
  return root


def search(exported, files, vectors="v.npy", texts="texts.txt", *more):
  words = [sys.executable, "-m", "mlembed_jax.search", "--model", str(exported["full"])]
  words += ["--vectors", str(files / vectors), "--texts", str(files / texts), *more]
  return subprocess.run(words, capture_output=True, text=True)


@pytest.mark.parametrize("name", ["v.npy", "codes.npy"])
def test_the_command_prints_the_nearest_texts(exported, files, name):
  query = TEXTS[31]
  result = search(exported, files, name, "texts.txt", "--query", query, "--k", "3")
  assert result.returncode == 0, result.stderr
  first, *lines = result.stdout.splitlines()
  encoder = Encoder.load(exported["full"])
  wanted = nearest(encoder.encode_query([query]), np.load(files / "v.npy"), 3)[1][0]
  assert first == query and len(lines) == 3
  if name == "v.npy":
    assert [line.split("  ")[2:] for line in lines] == [[str(i), TEXTS[i]] for i in wanted]


def test_what_does_not_fit_is_refused(exported, files):
  (files / "fewer.txt").write_text("one\ntwo", encoding="utf-8")
  asked = ("--query", "a")
  for name, texts, more, said in [
    ("v.npy", "texts.txt", (), "--query: give at least one"),
    ("v.npy", "texts.txt", ("--query=",), "--query: give at least one, none of them empty"),
    ("absent.npy", "texts.txt", asked, "absent.npy cannot be read"),
    ("bare.npy", "texts.txt", asked, "bare.npy holds int8, and there is no "),
    (
      "bits.npy",
      "texts.txt",
      asked,
      "and int8 and uint8 beside their ranges, but no bits",
    ),
    ("v.npy", "fewer.txt", asked, "fewer.txt has 2 texts, --vectors"),
    ("v.npy", "nope.txt", asked, "error: --texts: "),
    ("scalar.npy", "texts.txt", asked, "scalar.npy holds float64 [], expected [N, D] float32"),
    ("v.parquet", "texts.txt", asked, "v.parquet is no .npy; write one with `encode"),
    ("cut.npy", "texts.txt", (*asked, "--depth=0"), "--depth: 0, but the model has 1 to 3"),
  ]:
    result = search(exported, files, name, texts, *more)
    assert result.returncode == 1 and said in result.stderr, (said, result.stderr)
    lines = [line for line in result.stderr.strip().splitlines() if not line.startswith("note: ")]
    assert len(lines) == 1


def test_queries_are_as_deep_as_the_texts_and_vectors_are_those_of_the_texts(exported, files):
  asked = ("--query", TEXTS[31], "--k", "3")
  result = search(exported, files, "cut.npy", "texts.txt", *asked)
  assert result.returncode == 0, result.stderr
  encoder = Encoder.load(exported["full"])
  queries = encoder.encode_query([TEXTS[31]], depth=1, dim=16)
  wanted = nearest(queries, np.load(files / "cut.npy"), 3)[1][0]
  found = [line.split("  ")[2:] for line in result.stdout.splitlines()[1:]]
  assert found == [[str(i), TEXTS[i]] for i in wanted]
  result = search(exported, files, "swapped.npy", "swapped.txt", *asked)
  assert result.returncode == 1 and "row 0 of " in result.stderr, result.stderr
  assert "name the model and the texts that `encode` was given" in result.stderr
  result = search(exported, files, "cut.npy", "moved.txt", *asked)  # both ends are the same
  assert result.returncode == 1 and "is not what --model" in result.stderr, result.stderr


def test_codes_are_those_of_the_texts_also_beyond_their_ranges(exported, files):
  result = search(exported, files, "narrow.npy", "texts.txt", "--query", "a", "--k", "3")
  assert result.returncode == 0 and not result.stderr, result.stderr


def test_vectors_without_their_encoding_are_said(exported, files):
  result = search(exported, files, "v.npy", "texts.txt", "--query", "a", "--k", "3")
  assert result.returncode == 0
  assert result.stderr.startswith(f"note: {files / 'v.npy.json'} is not there"), result.stderr


@pytest.mark.parametrize(
  ("changes", "said"),
  [
    ({"prompt": 3}, "encoding.prompt is 3, expected str"),
    ({"dim": 3}, "encoding.dim is unknown"),
    ({"depth": 0}, "encoding.depth is 0, which is out of range"),
  ],
)
def test_what_an_encoding_says_is_read_or_refused(tmp_path, changes, said):
  vectors = tmp_path / "v.npy"
  assert Encoding.read(vectors) is None
  written = Encoding("a: ", 2, None, True, "</s>")
  written.write(vectors)
  assert Encoding.read(vectors) == written
  vectors.write_bytes(b"vectors")
  written.write(vectors)
  assert vectors.exists()
  dataclasses.replace(written, depth=3).write(vectors)
  assert not vectors.exists()
  written.write(vectors)
  value = json.loads(encoding_path(vectors).read_text(encoding="utf-8"))
  value["encoding"] |= changes
  encoding_path(vectors).write_text(json.dumps(value), encoding="utf-8")
  with pytest.raises(ConfigError, match="is not what was written"):
    Encoding.read(vectors)
  del value["sha256"]
  encoding_path(vectors).write_text(json.dumps(value), encoding="utf-8")
  with pytest.raises(ConfigError, match=re.escape(f"{encoding_path(vectors)}: {said}")):
    Encoding.read(vectors)


def test_what_encode_writes_is_searched_and_no_other_model_does_it(exported, files, tmp_path):
  out = tmp_path / "v.npy"
  words = [sys.executable, "-m", "mlembed_jax.encode", "--model", str(exported["full"])]
  words += ["--input", str(files / "texts.txt"), "--out", str(out), "--prompt_name=query"]
  flags = ("--depth=3", "--dim=16", "--precision=int8")
  done = subprocess.run([*words, *flags], capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  prompt = Encoder.load(exported["full"]).prompts["query"]
  assert Encoding.read(out) == Encoding(prompt, 3, None, False, None)
  asked = ("--query", TEXTS[31], "--k", "3", "--prompt_name=query")
  found = search(exported, tmp_path, "v.npy", files / "texts.txt", *asked)
  assert found.returncode == 0 and not found.stderr, found.stderr
  assert found.stdout.splitlines()[1].endswith(f"31  {TEXTS[31]}")
  found = search({"full": exported["cut"]}, tmp_path, "v.npy", files / "texts.txt", *asked)
  assert found.returncode == 1 and "depth: 3, but the model has 1 to 1" in found.stderr
  assert "name the model that `encode` was given" in found.stderr
