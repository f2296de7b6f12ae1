"""Exports that the tests of this folder share."""

import pathlib

import pytest

from tests.hf.exports import CUTS, Trained, trained


@pytest.fixture(scope="session")
def factorised(data: pathlib.Path) -> Trained:
  return trained(data)


@pytest.fixture(scope="session")
def dense(data: pathlib.Path) -> Trained:
  return trained(
    data, **{"model.rank": 0, "matryoshka.ranks": (), "data.pooled_token": "<|im_end|>"}
  )


@pytest.fixture(scope="session")
def folders(factorised: Trained, tmp_path_factory: pytest.TempPathFactory) -> dict:
  """The folder of every cut, written once."""
  root = tmp_path_factory.mktemp("folders")
  return {name: factorised.export(root / name, cut) for name, cut in CUTS.items()}


@pytest.fixture(scope="session")
def dense_folder(dense: Trained, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  return dense.export(tmp_path_factory.mktemp("dense") / "full")
