"""Each check of mlembed_jax.doctor on whole folders, and on copies that were broken on purpose."""

import dataclasses
import json
import pathlib
import shutil
import subprocess
import sys
from typing import Any

import pytest
from transformers import Qwen3Config, Qwen3Model

from mlembed_jax.errors import ExportError, LoadError
from mlembed_jax.hf import own_file, parity
from mlembed_jax.hf.checks import examine, installed
from mlembed_jax.hf.checks.consumers import Fact, concerned
from mlembed_jax.hf.checks.finding import (
  ERROR,
  OK,
  SKIPPED,
  WARNING,
  Check,
  File,
  Finding,
  Subject,
)
from mlembed_jax.hf.config_files import Forms
from tests.hf.broken import (
  BROKEN,
  CONFIG,
  CONSUMERS,
  LLAMA,
  ONNX,
  OURS,
  OWN,
  PROMPTS,
  ST,
  TEI,
  TOKENIZER,
  TRANSFORMERS,
  VLLM,
  WEIGHTS,
  Edit,
  change,
  nested,
  remove,
  swap_vectors,
  tensors,
  text,
  without,
)
from tests.hf.exports import CUTS, Trained, load_st, trained

ROOT = pathlib.Path(__file__).parents[2]
ALL = (*examine.CHECKS, examine.VECTORS)


@pytest.fixture(scope="module")
def uv(factorised: Trained, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  return factorised.export(
    tmp_path_factory.mktemp("doctor") / "uv", CUTS["all"], forms=Forms(factors=True)
  )


@pytest.fixture
def copy(folders: dict, tmp_path: pathlib.Path) -> pathlib.Path:
  """A folder that is cut along all axes, to be broken."""
  return pathlib.Path(shutil.copytree(folders["all"], tmp_path / "copy"))


def faults(findings: list[Finding]) -> list[Finding]:
  return [f for f in findings if f.level in (WARNING, ERROR)]


def verdicts(folder: pathlib.Path, findings: list[Finding]) -> dict[str, examine.Verdict]:
  return {v.consumer: v for v in examine.verdicts(folder, findings)}


@pytest.mark.parametrize("cut", CUTS)
def test_an_export_is_in_order(cut: str, folders: dict):
  findings = examine.examine(folders[cut], ALL)
  assert not faults(findings)
  assert {f.check for f in findings} == {f"D{i:02}" for i in range(1, 17)}
  assert [f.check for f in findings if f.level == SKIPPED] == ["D13"], "not Qwen's vocabulary"
  found = {name: v.level for name, v in verdicts(folders[cut], findings).items()}
  assert found.pop(LLAMA) == SKIPPED, "its converter stops at the vocabulary"
  assert found.pop(ONNX) == SKIPPED
  assert found.pop(OURS) == OK
  assert set(found.values()) == {examine.UNCHECKED}, "only ours was run"


def test_only_a_program_that_was_run_is_ok(folders: dict):
  findings = examine.examine(folders["all"], [examine.VECTORS, *examine.INSTALLED])
  found = verdicts(folders["all"], findings)
  assert {name for name, v in found.items() if v.level == OK} == {OURS, ST, TRANSFORMERS}
  assert str(found[TEI]).endswith("not checked: it was not run; what it reads has no fault")


@pytest.fixture(scope="module")
def served(factorised: Trained, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  root = tmp_path_factory.mktemp("served")
  forms = Forms(onnx="int8", gguf=("f16", "q8_0"))
  return factorised.export(root / "out", CUTS["all"], forms=forms)


def test_the_files_of_servers_are_run(served: pathlib.Path):
  findings = examine.examine(served, [examine.DIGESTS, *examine.INSTALLED])
  assert not faults(findings)
  found = verdicts(served, findings)
  for name, file in ((ONNX, "onnxruntime"), (LLAMA, "all-F16.gguf")):
    assert found[name].level == OK and "least cosine" in found[name].note, file
  assert "Q8_0.gguf: least cosine" in found[LLAMA].note


def test_files_of_another_model_are_found(served: pathlib.Path, dense: Trained, tmp_path):
  folder = pathlib.Path(shutil.copytree(served, tmp_path / "copy"))
  other = dense.export(tmp_path / "other", CUTS["depth"], forms=Forms(onnx="int8", gguf=("f16",)))
  shutil.copy(other / "onnx/model.onnx", folder / "onnx/model.onnx")
  shutil.copy(next(other.glob("*.gguf")), next(folder.glob("*F16.gguf")))
  found = verdicts(folder, examine.examine(folder, examine.INSTALLED))
  assert found[ONNX].level == found[LLAMA].level == ERROR
  changed = {f.file for f in faults(examine.examine(folder, [examine.DIGESTS]))}
  assert changed == {"onnx/model.onnx", next(folder.glob("*F16.gguf")).name}


def test_a_file_that_changed_or_is_gone_is_named(copy: pathlib.Path):
  text("README.md", "## Data", "## Texts")(copy)
  remove("mlembed/uv.safetensors")(copy)
  found = {f.file: f.found for f in examine.examine(copy, [examine.DIGESTS])}
  assert found == {
    "README.md": "is not the one that was exported",
    "mlembed/uv.safetensors": "was exported, and is gone",
  }


@pytest.mark.parametrize(("family", "note"), [("qwen3", ""), ("llama", "on CUDA alone")])
def test_tei_serves_some_architectures_on_cuda_alone(
  family: str, note: str, data: pathlib.Path, tmp_path: pathlib.Path
):
  folder = trained(data, **{"model.family": family}).export(tmp_path / "out")
  assert note in verdicts(folder, examine.examine(folder))[TEI].note
  assert bool(note) == ("CUDA" in verdicts(folder, examine.examine(folder))[TEI].note)


def test_a_folder_of_factors_is_in_order_and_not_for_servers(uv: pathlib.Path):
  findings = examine.examine(uv, ALL)
  assert not faults(findings)
  found = verdicts(uv, findings)
  skipped = {name for name, v in found.items() if v.level == SKIPPED}
  assert skipped == {TEI, LLAMA, ONNX}
  levels = {name: v.level for name, v in found.items() if name not in skipped}
  assert levels == {OURS: OK} | dict.fromkeys((ST, TRANSFORMERS, VLLM), examine.UNCHECKED)


@pytest.mark.parametrize("case", BROKEN, ids=lambda case: f"{case[0]} {case[2]}")
def test_a_fault_is_found_by_its_check(case: tuple, copy: pathlib.Path):
  check, level, said, edit, programs = case
  edit(copy)
  findings = examine.examine(copy, ALL if check == "D16" else examine.CHECKS)
  matching = [f for f in faults(findings) if f.check == check and said in f.found]
  assert matching, [f for f in findings if f.check == check]
  assert (matching[0].level, set(concerned(matching[0].fact))) == (level, set(programs))
  assert matching[0].remedy
  assert not [f.found for f in findings if "cannot be examined" in f.found]
  found = verdicts(copy, findings)
  said = {examine.UNCHECKED, OK}
  assert all(found[name].level not in said for name in programs)


def test_every_fact_concerns_a_program():
  assert all(concerned(fact) for fact in (*Fact, *File, parity.FILE))


def test_every_check_has_a_fault():
  assert {case[0] for case in BROKEN} == {check.code for check in ALL}


def test_the_code_and_the_rank_of_a_folder_of_factors_are_checked(
  uv: pathlib.Path, tmp_path: pathlib.Path
):
  folder = pathlib.Path(shutil.copytree(uv, tmp_path / "uv"))
  (folder / "modeling_mlembed.py").write_text("import os\n")
  findings = examine.examine(folder)
  assert [(f.check, f.level) for f in faults(findings)] == [("D06", WARNING)]
  check = Check("D16", "vectors", installed.transformers, TRANSFORMERS)
  assert "code that is not ours" in examine.examine(folder, [check])[0].found
  (folder / "modeling_mlembed.py").unlink()
  nested(OWN, "table", "rank_exported", to=16)(folder)
  found = {(f.check, f.level) for f in faults(examine.examine(folder))}
  assert {("D06", ERROR), ("D14", ERROR)} <= found


@pytest.mark.parametrize(
  ("edit", "file"),
  [
    (lambda folder: (folder / "1_Pooling/own.py").write_text("import os\n"), "1_Pooling/own.py"),
    (nested("modules.json", 1, "type", to="own/module.Own"), "modules.json"),
    (change(CONFIG, auto_map={"AutoModel": "some/one--modeling_mlembed.Model"}), CONFIG),
    (change(TOKENIZER, auto_map={"AutoTokenizer": ["a.A", None]}), TOKENIZER),
  ],
)
def test_code_below_or_elsewhere_is_not_run(uv: pathlib.Path, tmp_path: pathlib.Path, edit, file):
  folder = pathlib.Path(shutil.copytree(uv, tmp_path / "uv"))
  assert installed.foreign_code(Subject(folder)) == []
  edit(folder)
  assert installed.foreign_code(Subject(folder)) == [file]


def test_a_fault_of_one_program_is_not_one_of_others(copy: pathlib.Path):
  nested(PROMPTS, "prompts", "document", to=None)(copy)
  found = verdicts(copy, examine.examine(copy))
  assert [name for name, v in found.items() if v.level == ERROR] == [TEI]
  assert str(found[TEI]).split("  ")[-1].strip() == "not run: would fail because of D02"


def test_a_check_that_stumbles_says_so(copy: pathlib.Path):
  change(CONFIG, matryoshka_dimensions=3)(copy)
  change(OWN, dims=1, pooling=[])(copy)
  (copy / "modules.json").write_text('{"a": 1}')
  found = [f for f in examine.examine(copy, ALL) if "cannot be examined" in f.found]
  assert found and all(f.level == ERROR for f in found)


@pytest.mark.parametrize(
  ("edit", "said"),
  [
    (nested(OWN, "exits", "trained", to=["1"]), "exits.trained[0] is '1', expected int"),
    (nested(OWN, "pooling", "token", to=None), "pooling.token is None, expected str"),
    (nested(OWN, "training", "step", to=True), "training.step is True, expected int"),
    (nested(OWN, "files", "README.md", to={}), "files.README.md.sha256 is missing"),
    (change(OWN, dims=1), "dims is 1, expected dict"),
    (change(OWN, table=...), "table is missing"),
    (change(OWN, format_version=2), "format_version 2"),
    (lambda folder: (folder / OWN).write_text("[]"), "no JSON object"),
  ],
)
def test_a_damaged_file_of_ours_is_a_finding(edit: Edit, said: str, copy: pathlib.Path):
  edit(copy)
  with pytest.raises(LoadError) as raised:
    own_file.read(copy)
  assert str(raised.value).startswith(f"{copy / OWN}") and said in str(raised.value)
  findings = examine.examine(copy, ALL)
  assert [(f.check, f.file, concerned(f.fact)) for f in faults(findings)] == [("D02", OWN, (OURS,))]
  assert said in faults(findings)[0].found
  assert {"D14", "D16"} <= {f.check for f in findings if f.level == SKIPPED}


def test_a_folder_of_others_is_examined_without_our_files(folders: dict, tmp_path: pathlib.Path):
  ours = pathlib.Path(shutil.copytree(folders["full"], tmp_path / "ours"))
  for file in (OWN, parity.FILE):
    remove(file)(ours)
  findings = examine.examine(ours, ALL)
  assert not faults(findings)
  assert {f.check for f in findings if f.level == SKIPPED} == {"D01", "D13", "D14", "D15"}

  plain = tmp_path / "plain"
  sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 1}
  heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
  Qwen3Model(Qwen3Config(**sizes, **heads, eos_token_id=3)).save_pretrained(plain)
  shutil.copy(folders["full"] / "tokenizer.json", plain)
  findings = examine.examine(plain, ALL)
  assert not [f.found for f in findings if "cannot be examined" in f.found]
  assert {"D01", "D05", "D12"} <= {f.check for f in findings if f.level == ERROR}
  assert not {"D03", "D04", "D08"} & {f.check for f in faults(findings)}


def test_programs_that_are_not_installed_are_skipped(
  folders: dict, monkeypatch: pytest.MonkeyPatch
):
  monkeypatch.setitem(sys.modules, "torch", None)
  checks = [Check("D16", "vectors", installed.sentence_transformers, ST)]
  findings = examine.examine(folders["full"], checks)
  assert [(f.level, f.found) for f in findings] == [(SKIPPED, "not loaded: torch is not installed")]


@pytest.mark.parametrize("fault", ["ids", "vectors", "weights", "none"])
def test_programs_that_are_installed_are_loaded(fault: str, copy: pathlib.Path):
  edits: dict[str, Edit] = {
    "ids": nested(parity.FILE, "items", 3, "input_ids", to=[5, 0]),
    "vectors": swap_vectors,
    "weights": tensors(WEIGHTS, without("layers.2.mlp.up_proj.weight")),
    "none": lambda folder: None,
  }
  edits[fault](copy)
  theirs, plain = examine.examine(copy, examine.INSTALLED[:2])
  said = {
    "ids": ["other ids to 1 of 17 texts, first 'arabic'"] * 2,
    "vectors": ["least cosine"] * 2,
    "weights": ["least cosine", "invents 1 tensors"],  # sentence-transformers only warns
    "none": ["least cosine 1.0", "least cosine 1.0"],
  }[fault]
  for finding, expected in zip((theirs, plain), said, strict=True):
    assert expected.removesuffix(" 1.0") in finding.found
    assert finding.level == (OK if fault == "none" else ERROR)


def test_an_export_that_readers_refuse_is_not_kept(factorised: Trained, tmp_path: pathlib.Path):
  config = factorised.run.config
  short = dataclasses.replace(config.export, max_positions=64)
  run = dataclasses.replace(factorised.run, config=dataclasses.replace(config, export=short))
  with pytest.raises(ExportError, match=r"(?s)readers would fail.*D11 .*128 is more than .* 64"):
    dataclasses.replace(factorised, run=run).export(tmp_path / "out")
  assert not list(tmp_path.iterdir())


def doctor(*arguments: Any) -> subprocess.CompletedProcess:
  command = [sys.executable, "-m", "mlembed_jax.doctor", *map(str, arguments)]
  return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_the_command_says_all_as_json(folders: dict):
  done = doctor(folders["all"], "--json")
  assert done.returncode == 0, done.stderr
  report = json.loads(done.stdout)
  assert report["result"] == "ok"
  assert [f["check"] for f in report["findings"]][-5:] == ["D16"] * 5
  assert report["findings"][-1]["name"] == "vectors"
  levels = {v["consumer"]: v["level"] for v in report["consumers"]}
  assert levels == {
    **dict.fromkeys((OURS, ST, TRANSFORMERS), OK),
    **dict.fromkeys((TEI, VLLM), examine.UNCHECKED),
    **dict.fromkeys((LLAMA, ONNX), SKIPPED),
  }
  notes = {v["consumer"]: v["note"] for v in report["consumers"]}
  assert all("least cosine" in notes[name] for name in (OURS, ST, TRANSFORMERS))


def test_the_command_knows_a_folder_that_was_saved_again(folders: dict, tmp_path: pathlib.Path):
  load_st(folders["full"]).save(str(tmp_path / "again"))
  done = doctor(tmp_path / "again")
  assert done.returncode == 2, done.stderr
  assert "re-saved by sentence-transformers 5.4 or newer" in done.stdout
  lines = done.stdout.splitlines()[-len(CONSUMERS) - 1 :]
  assert [line.split("  ")[0] for line in lines] == [*CONSUMERS, ONNX]
  assert "would fail because of D05, D07" in lines[CONSUMERS.index(TEI)]


def test_the_command_ends_with_1_for_warnings(copy: pathlib.Path):
  text("README.md", "## Data", "## Texts")(copy)
  done = doctor(copy, "--notorch")
  assert done.returncode == 1, done.stderr
  assert "D15 card         warning  README.md: there is no heading 'Data'. Add it." in done.stdout
  assert (
    "sentence-transformers  not checked: it was not run; what it reads has no fault\n"
    in done.stdout
  )


def test_the_command_refuses_what_is_no_folder(tmp_path: pathlib.Path):
  done = doctor(tmp_path)
  assert (done.returncode, done.stdout) == (2, "")
  said = "is neither a model folder (no config.json) nor a workdir (no run.json)"
  assert done.stderr == f"error: {tmp_path} {said}\n"
  assert doctor().stderr == "error: DIR is missing; --help tells more\n"
  said = "error: unexpected argument 'b'; the one argument is DIR, options are --flags\n"
  assert doctor("a", "b").stderr == said
