"""Folders of strangers: each fault is one sentence before anything is allocated or read beyond."""

import hashlib
import json
import os
import pathlib
import shutil
import struct
import time
import tracemalloc

import numpy as np
import pytest
import safetensors.numpy

from mlembed_jax.errors import ConfigError, LoadError
from mlembed_jax.files import parse_json, read_json, write_json, write_safetensors
from mlembed_jax.hf import factors, own_file
from mlembed_jax.hf.folder import open_file, open_model_folder, read_model
from mlembed_jax.hf.torch_file import read_tensor
from mlembed_jax.inference import Encoder
from tests.faults import fuzz_torch_file


@pytest.fixture
def folder(exported, tmp_path):
  return pathlib.Path(shutil.copytree(exported["cut"], tmp_path / "folder"))


def change(path, keys, value):
  content = json.loads(path.read_text(encoding="utf-8"))
  at = content
  for key in keys[:-1]:
    at = at[key]
  at[keys[-1]] = value
  path.write_text(json.dumps(content), encoding="utf-8")


def opened(folder):
  return open_model_folder(folder, read_model(folder))


BAD_NUMBERS = [
  ("num_hidden_layers", 10**9),
  ("num_hidden_layers", 0),
  ("vocab_size", 2**40),
  ("hidden_size", -1),
  ("head_dim", 10**30),
  ("num_attention_heads", True),
  ("max_position_embeddings", 0),
  ("rope_theta", float("inf")),
  ("rope_theta", 10**400),
  ("rope_theta", -1),
  ("rms_norm_eps", float("nan")),
  ("rms_norm_eps", -1e-6),
]


@pytest.mark.parametrize(("key", "value"), BAD_NUMBERS)
def test_numbers_that_no_model_has_are_refused_at_once(key, value, folder):
  change(folder / "config.json", [key], value)
  start = time.perf_counter()
  with pytest.raises(LoadError, match=rf"E105 config: config\.json: {key} is ") as raised:
    opened(folder)
  assert time.perf_counter() - start < 1 and len(str(raised.value)) < 500


@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(4, 3, 16), (4, 2, 15)])
def test_heads_that_no_model_has_are_refused(heads, kv_heads, width, folder):
  for key, value in (
    ("num_attention_heads", heads),
    ("num_key_value_heads", kv_heads),
    ("head_dim", width),
  ):
    change(folder / "config.json", [key], value)
  with pytest.raises(LoadError, match="coordinates come in pairs"):
    read_model(folder)


BAD_OWN = [
  (("dims", "exported"), -1, "dims.exported is -1, which is out of range"),
  (("dims", "exported"), 0, "dims.exported is 0"),
  (("dims", "exported"), 10**6, "dims.exported is 1000000, but the model has 48"),
  (("dims", "exported"), True, "dims.exported is True, expected int"),
  (("dims", "trained"), [16, 8], r"dims.trained is \[16, 8\], expected ascending"),
  (("exits", "trained"), [1, 99], "exits.trained is .* up to 3"),
  (("exits", "exported"), 3, "exits.exported is 3, but the model has 1"),
  (("table", "ranks"), [float("nan")], r"table.ranks\[0\] is nan, expected int"),
  (("pooling", "max_seq_length"), 2**60, "pooling.max_seq_length is .* out of range"),
  (("training", "step"), float("inf"), "training.step is inf, expected int"),
  (("range_file",), "a", "range_file is unknown"),
]


@pytest.mark.parametrize(("keys", "value", "message"), BAD_OWN)
def test_mlembed_json_is_obeyed_or_refused(keys, value, message, folder):
  change(folder / own_file.NAME, keys, value)
  with pytest.raises(LoadError, match=rf"mlembed\.json: {message}"):
    Encoder.load(folder)


def test_ranges_are_read_from_their_file_alone(folder):
  change(folder / own_file.NAME, ["ranges_file"], "../../elsewhere.safetensors")
  with pytest.raises(LoadError, match=r"ranges_file is .*elsewhere\.safetensors', expected"):
    Encoder.load(folder).encode("one", precision="int8")


@pytest.fixture
def sharded(folder):
  """A folder whose weights lie in another file, as the index says."""
  file = folder / "model.safetensors"
  names = dict.fromkeys(open_file(file), "model-1.safetensors")
  file.rename(folder / "model-1.safetensors")
  write_json(folder / "model.safetensors.index.json", {"weight_map": names})
  return folder


@pytest.mark.parametrize(
  "name", ["../model-1.safetensors", "/{outside}", "a/../../model-1.safetensors", 3, None, ""]
)
def test_an_index_names_files_of_its_folder_alone(name, sharded):
  outside = sharded.parent / "model-1.safetensors"
  shutil.copy(sharded / "model-1.safetensors", outside)
  index = sharded / "model.safetensors.index.json"
  if isinstance(name, str):
    name = name.format(outside=str(outside)[1:])
  change(index, ["weight_map", "norm.weight"], name)
  with pytest.raises(LoadError, match=r"E104 index: .*index\.json names .* no file of the folder"):
    opened(sharded)


def test_links_as_in_the_cache_of_the_hub_are_followed(sharded):
  blobs, snapshot = sharded.parent / "blobs", sharded.parent / "snapshots" / "1"
  shutil.move(sharded, blobs)
  for file in (path for path in blobs.rglob("*") if path.is_file()):
    link = snapshot / file.relative_to(blobs)
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(os.path.relpath(file, link.parent))
  assert len(opened(snapshot).tensors) > 10


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("[" * 100_000, "nested without end"),
    ("[" * 500 + "]" * 500, "nested deeper than 100 levels"),
    ('{"a": {"b": 1, "b": 2}}', "'b' stands there twice"),
    ('{"a": "\\ud83d"}', "surrogates not allowed"),
    ("{", "is not JSON: "),
    (b"\xff", "is not JSON: "),
    ("1" * 5000, "digits"),
  ],
)
def test_json_that_cannot_be_meant_is_one_sentence(text, message):
  with pytest.raises(ConfigError, match=rf"^FILE\b.*{message}"):
    parse_json(text, "FILE")


def test_json_that_can_be_meant_is_read():
  value = {"a": ["\U0001f600", "\\ud83d", 1e300, None], "b": {}}
  for ascii in (True, False):
    assert parse_json(json.dumps(value, ensure_ascii=ascii), "FILE") == value
  assert parse_json("[" * 100 + "]" * 100, "FILE")


def test_a_pipe_is_not_waited_for(folder):
  for name in ("config.json", "model.safetensors"):
    (folder / name).rename(folder / "away")
    os.mkfifo(folder / name)
    with pytest.raises(LoadError, match=f"{name}|neither"):
      opened(folder)
    (folder / name).unlink()
    (folder / "away").rename(folder / name)
  with pytest.raises(ConfigError, match="no such file"):
    read_json(folder, "FILE")


GEOMETRY = [
  ("many rows of one number", 0, (2**40, 4), (0, 1), 12),
  ("beyond the end", 0, (4, 4), (4, 1), 12),
  ("beyond the end by its offset", 5, (3, 4), (4, 1), 12),
  ("before the start", 0, (3, 4), (-4, 1), 12),
  ("before the start by its offset", -4, (3, 4), (4, 1), 12),
  ("sizes below zero", 0, (-3, -4), (4, 1), 12),
  ("more than 64 bits", 0, (2**32, 2**32), (1, 1), 12),
  ("more strides than sizes", 0, (3,), (4, 1), 12),
  ("a storage of another size", 0, (3, 4), (4, 1), 2**40),
]


@pytest.mark.parametrize(("offset", "size", "stride", "count"), [row[1:] for row in GEOMETRY])
def test_a_tensor_of_torch_lies_in_its_storage(offset, size, stride, count, tmp_path):
  path = tmp_path / "U.pth"
  path.write_bytes(fuzz_torch_file.file(fuzz_torch_file.pickled(offset, size, stride, count)))
  tracemalloc.start()
  with pytest.raises(LoadError, match=r"E104 file: .*U\.pth is no tensor that torch.save wrote"):
    read_tensor(path)
  assert tracemalloc.get_traced_memory()[1] < 10_000_000
  tracemalloc.stop()


def test_a_file_of_an_archive_is_no_larger_than_the_archive(tmp_path):
  path, content = tmp_path / "U.pth", bytearray(fuzz_torch_file.file(fuzz_torch_file.RIGHT))
  sizes = content.index(b"PK\x01\x02") + 20  # of the first file in the directory
  content[sizes : sizes + 8] = struct.pack("<II", 200_000_000, 200_000_000)
  path.write_bytes(content)
  tracemalloc.start()
  with pytest.raises(LoadError, match="is said to be larger than the archive"):
    read_tensor(path)
  assert tracemalloc.get_traced_memory()[1] < 10_000_000
  tracemalloc.stop()


@pytest.mark.parametrize("order", ["C", "F", "cut"])
def test_arrays_are_written_as_they_are_indexed(order, tmp_path):
  array = np.arange(24, dtype=np.float32).reshape(4, 6)
  array = array[:, 1:4] if order == "cut" else np.asarray(array, order=order)
  write_safetensors(tmp_path / "a.safetensors", {"a": array})
  np.testing.assert_array_equal(safetensors.numpy.load_file(tmp_path / "a.safetensors")["a"], array)


def test_factors_of_earlier_versions_are_not_read(tmp_path, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  table = np.random.default_rng(0).normal(size=(32, 8)).astype(np.float32)
  digest = hashlib.sha256(f"{table.dtype} {table.shape} 8 ".encode() + table.tobytes())
  before = factors.cache_folder() / f"factors-{digest.hexdigest()[:32]}.safetensors"
  before.parent.mkdir()
  write_safetensors(before, {"U": np.zeros((32, 8), np.float32), "V": np.eye(8, dtype=np.float32)})
  u, v = factors._kept(table, 8)
  np.testing.assert_allclose(u @ v, table, atol=1e-5)


@pytest.mark.parametrize(
  "made", [{"U": (6, 2)}, {"U": (6,), "V": (2, 4)}, {"U": (6, 2), "V": (4,)}]
)
def test_factors_that_are_no_pair_of_matrices_are_refused(made, tmp_path, monkeypatch):
  (tmp_path / "mlembed").mkdir()
  arrays = {name: np.zeros(shape, np.float32) for name, shape in made.items()}
  write_safetensors(tmp_path / factors.FACTORS, arrays)
  folder = factors.Folder(tmp_path, 6, 0, [])
  with pytest.raises(LoadError, match=r"E108 factors: .*uv\.safetensors has "):
    factors._trained(folder)
