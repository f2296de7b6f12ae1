"""Factors of a token table: trained ones, in both layouts, and new ones, which are kept."""

import dataclasses
import pathlib
import pickle
import zipfile

import numpy as np
import pytest
import torch

from mlembed_jax.errors import LoadError
from mlembed_jax.hf import factors, torch_file
from mlembed_jax.hf.folder import open_model_folder, read_model
from mlembed_jax.hf.load import load_params
from tests.hf.test_families import theirs

RANK = 16


@pytest.fixture
def released(tmp_path):
  """A folder as ML-Embed was released: the product of the factors, and they beside it."""
  made = theirs("qwen3", torch.bfloat16)
  torch.manual_seed(1)
  u, v = torch.randn(640, RANK).bfloat16(), torch.randn(RANK, 48).bfloat16()
  made.model.embed_tokens.weight.data = (u.float() @ v.float()).bfloat16()
  made.save_pretrained(tmp_path)
  torch.save(u, tmp_path / "U.pth")
  torch.save(torch.nn.Parameter(v), tmp_path / "V.pth")
  return tmp_path, u.float().numpy(), v.float().numpy()


@pytest.mark.parametrize("transposed", [(), ("U",), ("V",), ("U", "V")])
def test_released_factors_are_read_however_they_lie(released, transposed):
  folder, u, v = released
  for name in transposed:
    torch.save(torch.load(folder / f"{name}.pth").data.T, folder / f"{name}.pth")
  params = load_params(folder, dataclasses.replace(read_model(folder), rank=RANK))
  np.testing.assert_array_equal(params["table"], u)
  np.testing.assert_array_equal(params["up"], v)


def test_factors_of_another_table_are_refused(released):
  folder, u, _ = released
  torch.save(torch.tensor(u * 1.02), folder / "U.pth")
  with pytest.raises(LoadError, match=r"E108 factors: U @ V of .*U\.pth is not the table"):
    load_params(folder, dataclasses.replace(read_model(folder), rank=RANK))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_tensors_of_torch_are_read_without_it(dtype, tmp_path):
  whole = torch.randn(6, 5).to(dtype)
  for tensor in (whole, whole[2:, 1:3], whole.T, torch.nn.Parameter(whole)):
    torch.save(tensor, tmp_path / "t.pth")
    found = torch_file.read_tensor(tmp_path / "t.pth").astype(np.float32)
    np.testing.assert_array_equal(found, tensor.detach().float().numpy())


class Harmful:
  def __reduce__(self):
    return pathlib.Path.touch, (pathlib.Path("/tmp/touched"),)


def with_pickle(path, data):
  with zipfile.ZipFile(path, "w") as file:
    file.writestr("t/data.pkl", data)


@pytest.mark.parametrize(
  ("write", "message"),
  [
    (lambda path: torch.save({"a": torch.ones(2)}, path), "holds a dict, not a tensor"),
    (lambda path: torch.save(torch.ones(2, dtype=torch.int64), path), r"names torch\.LongStorage"),
    (lambda path: with_pickle(path, pickle.dumps(Harmful())), "its pickle has FRAME"),
    (lambda path: with_pickle(path, pickle.dumps(Harmful(), 2)), r"it names \w+\.\w+"),
    (lambda path: path.write_bytes(b"not a zip"), "is no tensor that torch.save wrote"),
    (lambda path: None, "No such file"),
  ],
)
def test_anything_else_is_refused(write, message, tmp_path):
  write(tmp_path / "t.pth")
  with pytest.raises(LoadError, match=message):
    torch_file.read_tensor(tmp_path / "t.pth")


def test_new_factors_are_kept_by_the_table(tmp_path, monkeypatch, capsys):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  theirs("llama", torch.float32).save_pretrained(tmp_path / "model")
  model = dataclasses.replace(read_model(tmp_path / "model"), rank=32)
  folder = open_model_folder(tmp_path / "model", model)
  first = factors.of_folder(folder, 32)
  assert "640 x 48 factorised in" in capsys.readouterr().out
  again = factors.of_folder(folder, 32)
  assert "factors of rank 32 from" in capsys.readouterr().out
  for a, b in zip(first, again, strict=True):
    np.testing.assert_array_equal(a, b)
  assert factors.of_folder(folder, 8)[0].shape == (640, 8)  # another rank, another file
  kept = list((tmp_path / "cache").rglob("*"))
  assert sorted(file.suffix for file in kept) == ["", ".safetensors", ".safetensors"]


def test_factors_are_kept_however_a_device_lays_them_out(tmp_path, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  made = np.arange(24, dtype=np.float32).reshape(6, 4)[:, :2], np.eye(4, 2, dtype=np.float32).T
  monkeypatch.setattr(factors, "_factorised", lambda *_: made)
  table = np.zeros((6, 4), np.float32)
  factors._kept(table, 2)
  for kept, array in zip(factors._kept(table, 2), made, strict=True):
    np.testing.assert_array_equal(kept, array)


def test_the_error_of_each_rank_is_printed(tmp_path, monkeypatch, capsys):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  table = np.random.default_rng(0).normal(size=(300, 128)).astype(np.float32)
  u, v = factors._kept(table, 128)
  left = np.linalg.norm(table - u[:, :64] @ v[:64]) / np.linalg.norm(table)
  assert f"error by rank: 64: {left:.1%}, 128: 0.0%" in capsys.readouterr().out
  np.testing.assert_allclose(u @ v, table, atol=1e-4)
