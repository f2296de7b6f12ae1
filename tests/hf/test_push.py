"""Exports on the Hugging Face Hub, as far as they can be tried without it."""

import os
import pathlib
import subprocess
import sys

import pytest

from mlembed_jax.errors import ExportError
from mlembed_jax.hf import push

ROOT = pathlib.Path(__file__).parents[2]


def test_a_repository_has_the_suffix_of_its_variant():
  assert push.repository("hf:org/name") == "org/name"
  assert push.repository("hf:org/name", "-d64-onnx") == "org/name-d64-onnx"


@pytest.mark.parametrize(
  "target", ["org/name", "hf:name", "hf:a/b/c", "hf:org/na me", "hf:org/a--b"]
)
def test_another_name_is_refused(target: str):
  with pytest.raises(ExportError, match="push: "):
    push.repository(target)


def test_every_file_of_a_folder_is_listed_with_its_size(folders: dict):
  first, *lines = push.listing(folders["all"], "org/name").splitlines()
  files = [path for path in folders["all"].rglob("*") if path.is_file()]
  assert first.startswith(f"hf:org/name, {len(files)} files, ") and len(lines) == len(files)
  listed = {line.split()[2] for line in lines}
  assert listed == {path.relative_to(folders["all"]).as_posix() for path in files}


@pytest.mark.parametrize(
  "environment", [{"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}, {}]
)
def test_a_hub_out_of_reach_or_without_a_login_is_one_sentence(environment: dict, tmp_path):
  code = "from mlembed_jax.hf import push; push.check('org/name')"
  clean = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
  settings = clean | {"HF_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)} | environment
  words = [sys.executable, "-c", code]
  result = subprocess.run(words, env=settings, capture_output=True, text=True)
  last = result.stderr.splitlines()[-1]
  assert "ExportError: push: org/name: " in last and last.endswith(push.LOGIN)
