"""More folders of one run, and those that keep the token table as two factors."""

import dataclasses
import pathlib

import jax
import numpy as np
import pytest
import transformers

from mlembed_jax.errors import ExportError
from mlembed_jax.hf.config_files import Forms
from mlembed_jax.hf.folder import read_model
from mlembed_jax.hf.load import load_params
from mlembed_jax.hf.variants import parse_variant, variant_name
from mlembed_jax.inference import Encoder
from mlembed_jax.matryoshka import Slice
from tests.hf.exports import TEXTS, Trained, load_st, read, trained

CUT = Slice(depth=2, dim=16, rank=16)


@pytest.fixture(scope="module")
def uv(factorised: Trained, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  return factorised.export(tmp_path_factory.mktemp("uv") / "uv", CUT, forms=Forms(factors=True))


@pytest.mark.parametrize(
  ("text", "cut", "forms"),
  [
    ("d256-l8", Slice(dim=256, depth=8), Forms()),
    ("l2-r128-d64", Slice(rank=128, depth=2, dim=64), Forms()),
    ("uv", Slice(), Forms(factors=True)),
    ("r64-uv", Slice(rank=64), Forms(factors=True)),
    ("onnx", Slice(), Forms(onnx="float32")),
    ("d64-uv-onnx-int8", Slice(dim=64), Forms(factors=True, onnx="int8")),
  ],
)
def test_a_variant_is_its_name(text: str, cut: Slice, forms: Forms):
  assert parse_variant(text) == (cut, forms, None)
  assert parse_variant(variant_name("m", cut, forms).removeprefix("m-")) == (cut, forms, None)


@pytest.mark.parametrize(
  ("text", "languages", "cut", "forms"),
  [
    ("v", (), Slice(), Forms()),
    ("v-de-sw", ("de", "sw"), Slice(), Forms()),
    ("d64-v-de-zh_Hant-l8-r256", ("de", "zh_Hant"), Slice(dim=64, depth=8, rank=256), Forms()),
    ("v-yue-uv-onnx-int8", ("yue",), Slice(), Forms(factors=True, onnx="int8")),
    ("v-de-de", ("de",), Slice(), Forms()),
  ],
)
def test_languages_follow_the_v(text: str, languages: tuple, cut: Slice, forms: Forms):
  assert parse_variant(text) == (cut, forms, languages)


@pytest.mark.parametrize(
  "text",
  [
    *(
      "",
      "8",
      "d",
      "d0",
      "x8",
      "d8-d16",
      "uv-uv",
      "d-8",
      "d8-",
      "d٢x",
      "int8",
      "onnx-onnx",
      "onnx8",
    ),
    *("de-v", "v-v", "v-d64-de", "v-x8", "v-de-", "v-Deutsch"),
  ],
)
def test_a_name_that_is_no_variant_is_refused(text: str):
  with pytest.raises(ExportError, match=r"is no variant; .*d256-l8"):
    parse_variant(text)


def test_a_folder_of_factors_gives_our_vectors_everywhere(uv: pathlib.Path, factorised: Trained):
  expected = factorised.vectors(TEXTS, CUT, "")
  np.testing.assert_allclose(load_st(uv, remote=True).encode(TEXTS), expected, atol=1e-5)
  np.testing.assert_allclose(Encoder.load(uv).encode(TEXTS), expected, atol=1e-5)
  shallow = factorised.vectors(TEXTS, dataclasses.replace(CUT, depth=1, rank=8), "")
  np.testing.assert_allclose(Encoder.load(uv).encode(TEXTS, depth=1, rank=8), shallow, atol=1e-5)


def test_a_folder_of_factors_is_smaller_and_no_stock_loader_takes_it(
  uv: pathlib.Path, folders: dict
):
  config = read(uv / "config.json")
  assert config["model_type"] == "mlembed_qwen3" and config["embedding_rank"] == 16
  size = (uv / "model.safetensors").stat().st_size
  assert size < (folders["depth"] / "model.safetensors").stat().st_size
  with pytest.raises(ValueError, match="trust_remote_code"):
    transformers.AutoModel.from_pretrained(uv)


def test_factors_are_imported_as_they_were_trained(uv: pathlib.Path, factorised: Trained):
  model = read_model(uv)
  assert model.rank == 16
  params = load_params(uv, model)
  np.testing.assert_array_equal(params["table"][:640], factorised.params["table"][:640, :16])
  np.testing.assert_array_equal(params["up"], factorised.params["up"][:16])
  smaller = load_params(uv, dataclasses.replace(model, rank=8))
  np.testing.assert_array_equal(smaller["up"], factorised.params["up"][:8])
  merged = load_params(uv, dataclasses.replace(model, rank=0))
  np.testing.assert_allclose(merged["table"], params["table"] @ params["up"], atol=1e-5)
  jax.tree.map(np.testing.assert_array_equal, merged["layers"], params["layers"])


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_the_code_of_the_folder_is_of_its_architecture(
  family: str, data: pathlib.Path, tmp_path: pathlib.Path
):
  made = trained(data, **{"model.family": family})
  folder = made.export(tmp_path / "out", CUT, forms=Forms(factors=True))
  assert read(folder / "config.json")["model_type"] == f"mlembed_{family}"
  assert read_model(folder).family == family
  vectors = load_st(folder, remote=True).encode(TEXTS)
  np.testing.assert_allclose(vectors, made.vectors(TEXTS, CUT, ""), atol=1e-5)


def test_a_full_table_has_no_factors(dense: Trained, tmp_path: pathlib.Path):
  with pytest.raises(ExportError, match="uv: the token table of this model was never factorised"):
    dense.export(tmp_path / "out", forms=Forms(factors=True))
