"""Eight simulated devices, strict numerics, and tiny real inputs that the tests share."""

import dataclasses
import os
import pathlib
import tempfile
from collections.abc import Iterator
from typing import Any

import jax
import pytest

CACHE = tempfile.TemporaryDirectory()  # factors of token tables are kept between runs
os.environ["XDG_CACHE_HOME"] = CACHE.name
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_numpy_rank_promotion", "raise")

from mlembed_jax.config import from_mapping  # noqa: E402
from mlembed_jax.config_fields import Config  # noqa: E402
from mlembed_jax.data.tokenizer import Tokenizer  # noqa: E402
from mlembed_jax.hf import stored_ranges  # noqa: E402
from mlembed_jax.hf.export import TrainedModel, export_folder  # noqa: E402
from mlembed_jax.matryoshka import Slice  # noqa: E402
from mlembed_jax.workdir import Run  # noqa: E402
from tests import material  # noqa: E402

# Files and folders of tests that import torch, or what brings it.
NEED_TORCH = (
  "eval/test_mteb.py",
  "hf",
  "objective/test_distillation.py",
  "objective/test_losses.py",
  "objective/test_regularizers.py",
  "objective/test_tiles.py",
  "test_inference.py",
  "test_teach.py",
  "training/test_frozen.py",
)


def pytest_addoption(parser: pytest.Parser) -> None:
  text = "Leave out the tests that need torch, and say which they are."
  parser.addoption("--without-torch", action="store_true", help=text)
  text = "long: the tests of tests/faults make all their damage and kills; short: a few of each."
  parser.addoption("--faults", choices=("short", "long"), default="short", help=text)


def pytest_ignore_collect(collection_path: pathlib.Path, config: pytest.Config) -> bool | None:
  """Leaves a test out where that is asked for; without the flag a missing torch is an error."""
  paths = [pathlib.Path(__file__).parent / name for name in NEED_TORCH]
  return True if config.getoption("--without-torch") and collection_path in paths else None


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
  if config.getoption("--without-torch"):
    terminalreporter.write_line(f"Left out, as they need torch: {', '.join(NEED_TORCH)}")


def pytest_configure(config: pytest.Config) -> None:
  assert jax.device_count() == 8, "another platform was started before the tests"


@pytest.fixture
def fast_compile() -> Iterator[None]:
  """Whole steps compile without optimisation, in half the time."""
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  """A folder with manifest, tokenizer, three training files and two held-out files."""
  folder = tmp_path_factory.mktemp("data")
  material.write(folder)
  return folder


@pytest.fixture(scope="session")
def tiny(data: pathlib.Path) -> Config:
  """The configuration of a model small enough for any test."""
  return from_mapping(material.config_dict(data))


@pytest.fixture(scope="session")
def params(tiny: Config) -> dict:
  """Random parameters of `tiny`, norm scales too, so that a forgotten norm shows."""
  return material.random_params(tiny.model)


@pytest.fixture(scope="session")
def exported(
  tiny: Config, params: dict, data: pathlib.Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, pathlib.Path]:
  """Exported folders: the whole model, and one cut in depth and dimension."""
  trained = dataclasses.replace(tiny.matryoshka, exits=(1, 3), dims=(16, 48), ranks=(8, 24))
  run = Run(dataclasses.replace(tiny, matryoshka=trained), {}, "f" * 64)
  tokenizer = Tokenizer(data / "tokenizer.json", tiny.data.pooled_token)
  root = tmp_path_factory.mktemp("exported")
  texts = [text for language in ("en", "de", "zh") for text in material.sentences(language)]
  sample = tokenizer.encode(texts, stored_ranges.TOKENS)
  model = TrainedModel(run, 1, params, tokenizer, sample=sample)
  cuts = {"full": Slice(), "cut": Slice(depth=1, dim=16)}
  return {name: export_folder(root / name, model, cut) for name, cut in cuts.items()}
