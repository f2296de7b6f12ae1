"""onnx/model.onnx, by ONNX Runtime."""

import pathlib
import sys

import numpy as np
import onnx
import onnxruntime
import pytest

from mlembed_jax.errors import ExportError
from mlembed_jax.hf.config_files import Forms
from mlembed_jax.matryoshka import Slice
from tests.hf.exports import TEXTS, Trained, read, trained

CUT = Slice(depth=2, dim=16, rank=16)


def session(folder: pathlib.Path) -> onnxruntime.InferenceSession:
  return onnxruntime.InferenceSession(folder / "onnx/model.onnx")


def padded(ids: list[list[int]], side: str) -> dict[str, np.ndarray]:
  """Returns the inputs of a batch; the padding is of a token that would be seen if it were read."""
  width = max(map(len, ids))
  tokens, mask = np.full((len(ids), width), 7), np.zeros((len(ids), width), np.int64)
  for i, row in enumerate(ids):
    place = slice(width - len(row), width) if side == "left" else slice(len(row))
    tokens[i, place], mask[i, place] = row, 1
  return {"input_ids": tokens.astype(np.int64), "attention_mask": mask}


def ids_of(made: Trained) -> list[list[int]]:
  return made.tokenizer.encode(TEXTS, made.run.config.export.max_seq_length)


@pytest.mark.parametrize("family", ["qwen3", "qwen2", "llama"])
@pytest.mark.parametrize("factors", [False, True])
def test_the_graph_gives_our_vectors_padded_on_either_side(
  family: str, factors: bool, data: pathlib.Path, tmp_path: pathlib.Path
):
  made = trained(data, **{"model.family": family})
  forms = Forms(factors=factors, onnx="float32")
  run = session(made.export(tmp_path / "out", CUT, forms=forms)).run
  expected = made.vectors(TEXTS, CUT, "")
  for side in ("left", "right"):
    states, vectors = run(None, padded(ids_of(made), side))
    np.testing.assert_allclose(vectors, expected, atol=1e-5)
    assert states.shape[2] == made.run.config.model.width and np.isfinite(states).all()


def test_the_states_are_those_of_transformers(folders: dict, factorised: Trained, tmp_path):
  import torch
  from transformers import AutoModel

  folder = factorised.export(tmp_path / "out", forms=Forms(onnx="float32"))
  batch = padded(ids_of(factorised)[:4], "right")
  states = session(folder).run(["last_hidden_state"], batch)[0]
  model = AutoModel.from_pretrained(folder, torch_dtype=torch.float32)
  with torch.no_grad():
    theirs = model(**{k: torch.tensor(v) for k, v in batch.items()}).last_hidden_state.numpy()
  seen = batch["attention_mask"].astype(bool)
  np.testing.assert_allclose(states[seen], theirs[seen], atol=1e-5)


@pytest.fixture(scope="module")
def int8(factorised: Trained, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  root = tmp_path_factory.mktemp("int8")
  return factorised.export(root / "out", CUT, forms=Forms(factors=True, onnx="int8"))


def test_int8_keeps_directions_and_no_vector_depends_on_its_batch(
  int8: pathlib.Path, factorised: Trained
):
  run, ids = session(int8).run, ids_of(factorised)
  vectors = run(["sentence_embedding"], padded(ids, "left"))[0]
  cosines = np.sum(vectors * factorised.vectors(TEXTS, CUT, ""), axis=1)
  assert cosines.mean() > 0.99 and cosines.min() > 0.98
  for i, row in enumerate(ids):
    alone = run(["sentence_embedding"], padded([row], "left"))[0]
    np.testing.assert_allclose(alone[0], vectors[i], atol=2e-6)


def test_int8_has_a_scale_for_each_output_and_each_row_of_the_table(
  int8: pathlib.Path, factorised: Trained
):
  held = {a.name: a for a in onnx.load(int8 / "onnx/model.onnx").graph.initializer}
  codes = {name: a for name, a in held.items() if a.data_type == onnx.TensorProto.INT8 and a.dims}
  matrices = {name: a for name, a in codes.items() if len(a.dims) == 2}
  table = matrices.pop("embed_tokens.u.weight")
  assert list(held["embed_tokens.u.weight.scale"].dims) == [table.dims[0], 1]
  assert len(matrices) == 2 * 7 + 1  # of two layers, and the second factor of the table
  for name, kernel in matrices.items():
    assert held[name.replace(".weight", ".scale")].dims == kernel.dims[1:]
  model = factorised.run.config.model
  kernel = onnx.numpy_helper.to_array(matrices["layers.1.mlp.down_proj.weight"])
  scale = onnx.numpy_helper.to_array(held["layers.1.mlp.down_proj.scale"])
  exact = np.asarray(factorised.params["layers"]["mlp"]["down"][1])
  assert exact.shape == (model.ffn, model.width)
  assert np.abs(kernel * scale - exact).max() <= scale.max() * 0.51  # and bfloat16


def test_the_file_is_what_programs_feed(int8: pathlib.Path):
  model = onnx.load(int8 / "onnx/model.onnx")
  assert [i.name for i in model.graph.input] == ["input_ids", "attention_mask"]
  assert [o.name for o in model.graph.output] == ["last_hidden_state", "sentence_embedding"]
  assert [o.domain for o in model.opset_import] == [""] and model.opset_import[0].version == 18
  assert {node.domain for node in model.graph.node} == {""}
  onnx.checker.check_model(model, full_check=True)
  own = read(int8 / "mlembed.json")
  assert own["onnx"] == "int8" and "onnx/model.onnx" in own["files"]


def test_weights_beyond_a_protocol_buffer_stand_beside_the_graph(
  factorised: Trained, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
  whole = factorised.export(tmp_path / "whole", CUT, forms=Forms(onnx="float32"))
  monkeypatch.setattr("mlembed_jax.hf.onnx_graph.MOST_BYTES", 10_000)
  split = factorised.export(tmp_path / "split", CUT, forms=Forms(onnx="float32"))
  assert (split / "onnx/model.onnx_data").stat().st_size > 10_000
  assert "onnx/model.onnx_data" in read(split / "mlembed.json")["files"]
  batch = padded(ids_of(factorised), "left")
  for one, other in zip(
    session(whole).run(None, batch), session(split).run(None, batch), strict=True
  ):
    np.testing.assert_array_equal(one, other)


def test_a_missing_package_is_said_before_anything_is_written(
  factorised: Trained, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
  monkeypatch.setitem(sys.modules, "onnx", None)
  with pytest.raises(ExportError, match=r'pip install "mlembed_jax\[onnx\]"'):
    factorised.export(tmp_path / "out", forms=Forms(onnx="int8"))
  assert not list(tmp_path.iterdir())
