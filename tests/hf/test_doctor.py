"""Each check of mlembed_jax.doctor on whole folders, and on copies that were broken on purpose."""

import base64
import dataclasses
import json
import pathlib
import shutil
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from transformers import Qwen3Config, Qwen3Model

from mlembed_jax.hf import agreement, examination, installed, parity
from mlembed_jax.hf.export import ExportError
from mlembed_jax.hf.subject import (
  CONSUMERS,
  ERROR,
  LLAMA,
  OK,
  OURS,
  SERVERS,
  SKIPPED,
  ST,
  TEI,
  TRANSFORMERS,
  VLLM,
  WARNING,
  Check,
  Finding,
)
from tests.hf.exports import CUTS, Trained, load_st, read

ROOT = pathlib.Path(__file__).parents[2]
VECTORS = Check("D16", agreement.d16, (OURS,), (parity.FILE, "mlembed.json"))
ALL = (*examination.CHECKS, VECTORS)
Edit = Callable[[pathlib.Path], Any]


@pytest.fixture(scope="module")
def uv(factorised: Trained, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  return factorised.export(tmp_path_factory.mktemp("doctor") / "uv", CUTS["all"], factors=True)


@pytest.fixture
def copy(folders: dict, tmp_path: pathlib.Path) -> pathlib.Path:
  """A folder that is cut along all axes, to be broken."""
  return pathlib.Path(shutil.copytree(folders["all"], tmp_path / "copy"))


def faults(findings: list[Finding]) -> list[Finding]:
  return [f for f in findings if f.level in (WARNING, ERROR)]


def verdicts(folder: pathlib.Path, findings: list[Finding]) -> dict[str, examination.Verdict]:
  return {v.consumer: v for v in examination.verdicts(folder, findings)}


@pytest.mark.parametrize("cut", CUTS)
def test_an_export_is_in_order(cut: str, folders: dict):
  findings = examination.examine(folders[cut], ALL)
  assert not faults(findings)
  assert {f.check for f in findings} == {f"D{i:02}" for i in range(1, 17)}
  assert [f.check for f in findings if f.level == SKIPPED] == ["D13"], "not Qwen's vocabulary"
  found = verdicts(folders[cut], findings)
  assert {v.level for v in found.values()} == {OK}
  assert ("2_Dense" in found[LLAMA].note) == (CUTS[cut].dim is not None)


def test_a_folder_of_factors_is_in_order_and_not_for_servers(uv: pathlib.Path):
  findings = examination.examine(uv, ALL)
  assert not faults(findings)
  found = verdicts(uv, findings)
  assert {name for name, v in found.items() if v.level == SKIPPED} == set(SERVERS)
  assert {v.level for name, v in found.items() if name not in SERVERS} == {OK}


def change(file: str, **values: Any) -> Edit:
  """Returns an edit that sets keys of a JSON object; ... removes a key."""

  def edit(folder: pathlib.Path) -> None:
    content = read(folder / file) | values
    content = {key: value for key, value in content.items() if value is not ...}
    (folder / file).write_text(json.dumps(content), encoding="utf-8")

  return edit


def nested(file: str, *keys: Any, to: Any) -> Edit:
  """Returns an edit that sets one value below `keys`."""

  def edit(folder: pathlib.Path) -> None:
    content = read(folder / file)
    at = content
    for key in keys[:-1]:
      at = at[key]
    at[keys[-1]] = to
    (folder / file).write_text(json.dumps(content), encoding="utf-8")

  return edit


def tensors(file: str, edit: Callable[[dict], dict], metadata: Any = None) -> Edit:
  def write(folder: pathlib.Path) -> None:
    found = edit(safetensors.numpy.load_file(folder / file))
    stated = {"format": "pt"} if metadata is None else metadata
    safetensors.numpy.save_file(found, folder / file, metadata=stated)

  return write


def without(name: str) -> Callable[[dict], dict]:
  return lambda found: {key: t for key, t in found.items() if key != name}


def times(name: str, factor: float) -> Callable[[dict], dict]:
  return lambda found: found | {name: np.asarray(found[name] * factor, found[name].dtype)}


def text(file: str, old: str, new: str) -> Edit:
  def edit(folder: pathlib.Path) -> None:
    content = (folder / file).read_text(encoding="utf-8")
    assert old in content
    (folder / file).write_text(content.replace(old, new), encoding="utf-8")

  return edit


def remove(file: str) -> Edit:
  return lambda folder: (folder / file).unlink()


def stray(file: str) -> Edit:
  return lambda folder: shutil.copy(folder / "model.safetensors", folder / file)


def swap_vectors(folder: pathlib.Path) -> None:
  stated = read(folder / parity.FILE)
  first, second = stated["items"][:2]
  first["embedding"], second["embedding"] = second["embedding"], first["embedding"]
  (folder / parity.FILE).write_text(json.dumps(stated), encoding="utf-8")


def shorter_vectors(folder: pathlib.Path) -> None:
  stated = read(folder / parity.FILE)
  for item in stated["items"]:
    item["embedding"] = base64.b64encode(parity.embedding(item)[:4].tobytes()).decode()
  (folder / parity.FILE).write_text(json.dumps(stated), encoding="utf-8")


def unended(folder: pathlib.Path) -> None:
  change("tokenizer.json", post_processor=None)(folder)
  change(TOKENIZER, add_eos_token=...)(folder)


def pooling(**values: Any) -> Edit:
  return change("1_Pooling/config.json", **values)


def modules(index: int, key: str, value: Any) -> Edit:
  return nested("modules.json", index, key, to=value)


CONFIG, TOKENIZER, BERT = "config.json", "tokenizer_config.json", "sentence_bert_config.json"
PROMPTS, OWN, WEIGHTS = "config_sentence_transformers.json", "mlembed.json", "model.safetensors"
DENSE, UV = "2_Dense/model.safetensors", "mlembed/uv.safetensors"
PREFIX = "sentence_transformers.models."
NORM, EYE = "norm.weight", "linear.weight"
OTHERS = tuple(name for name in CONSUMERS if name != OURS)
EMBEDDERS = tuple(name for name in CONSUMERS if name != TRANSFORMERS)
# (check, level, what it must say, edit, programs that it concerns)
BROKEN: list[tuple[str, str, str, Edit, tuple[str, ...]]] = [
  ("D01", ERROR, "is not there", remove(TOKENIZER), (ST, TRANSFORMERS, VLLM, LLAMA)),
  ("D01", ERROR, "nothing to compare", remove(parity.FILE), (OURS,)),
  ("D01", ERROR, "no weights", remove(WEIGHTS), CONSUMERS),
  ("D01", ERROR, "vLLM takes", stray("uv.safetensors"), (VLLM,)),
  ("D01", WARNING, "may take it", stray("pytorch_model.bin"), CONSUMERS),
  ("D01", WARNING, "asks the Hub", remove("README.md"), (ST,)),
  ("D02", ERROR, "no JSON", lambda folder: (folder / BERT).write_text("{"), CONSUMERS),
  ("D02", ERROR, "is None, expected int or float", change(CONFIG, rms_norm_eps=...), CONSUMERS),
  ("D02", ERROR, "hidden_act is None", change(CONFIG, hidden_act=...), (TEI, VLLM)),
  ("D02", ERROR, "'document' is None", nested(PROMPTS, "prompts", "document", to=None), (TEI,)),
  ("D03", ERROR, "E101 missing", tensors(WEIGHTS, without(NORM)), CONSUMERS),
  ("D03", ERROR, "E103 shape", change(CONFIG, intermediate_size=63), CONSUMERS),
  ("D03", ERROR, "E107 not finite", tensors(WEIGHTS, times(NORM, np.nan)), CONSUMERS),
  ("D03", ERROR, "format None", tensors(WEIGHTS, dict, {}), (ST, TRANSFORMERS)),
  ("D03", WARNING, "says bfloat16", change(CONFIG, torch_dtype="bfloat16"), CONSUMERS),
  ("D03", ERROR, "body.parameters is 1,", nested(OWN, "body", "parameters", to=1), (OURS,)),
  ("D04", ERROR, "is 4, the weights have 3", change(CONFIG, num_hidden_layers=4), CONSUMERS),
  (
    *("D04", ERROR, "layer_types has 1 entries"),
    change(CONFIG, layer_types=["full_attention"]),
    (ST, TRANSFORMERS, VLLM),
  ),
  ("D04", ERROR, "exits.exported is 2", nested(OWN, "exits", "exported", to=2), (OURS,)),
  ("D04", WARNING, "not trained", nested(OWN, "exits", "trained", to=[1, 2]), CONSUMERS),
  ("D05", ERROR, "rope_theta is None", change(CONFIG, rope_theta=...), OTHERS),
  ("D05", ERROR, "rope_theta is 1", change(CONFIG, rope_theta=1.0), CONSUMERS),
  ("D05", WARNING, "None", change(CONFIG, rope_parameters=None), (ST, TRANSFORMERS)),
  ("D06", ERROR, "eos_token_id is [0]", change(CONFIG, eos_token_id=[0]), (TEI,)),
  ("D06", ERROR, "classifier", change(CONFIG, id2label={}), (TEI,)),
  ("D06", ERROR, "'gemma'", change(CONFIG, model_type="gemma"), (OURS,)),
  ("D06", ERROR, "auto_map", change(CONFIG, auto_map={"AutoModel": "x.Y"}), (ST, TRANSFORMERS)),
  ("D06", WARNING, "4.58", change(CONFIG, transformers_version="4.58.0"), (ST, TRANSFORMERS)),
  ("D06", WARNING, "not run here", lambda f: (f / "x.py").write_text("1"), (ST, TRANSFORMERS)),
  ("D07", ERROR, "re-saved", modules(1, "type", "st.pooling.Pooling"), (ST, TEI, VLLM)),
  ("D07", ERROR, "not read by TEI", modules(2, "type", PREFIX + "LSTM"), (ST, *SERVERS)),
  ("D07", ERROR, "the order", modules(2, "type", PREFIX + "Normalize"), (ST, *SERVERS)),
  ("D07", ERROR, "count from 0", modules(3, "idx", 4), (ST, *SERVERS)),
  ("D07", ERROR, "no 9_No/config.json", modules(3, "path", "9_No"), (ST, *SERVERS)),
  ("D08", ERROR, "true keys", pooling(pooling_mode_mean_tokens=True), (ST, *SERVERS)),
  ("D08", ERROR, "pooling_mode is 'mean'", pooling(pooling_mode="mean"), EMBEDDERS),
  ("D08", ERROR, "look it up", pooling(pooling_mode_cls_token=...), (TEI, LLAMA)),
  ("D08", ERROR, "5.1 fails", pooling(embedding_dimension=48), (ST,)),
  ("D08", ERROR, "is 8, hidden_size 48", pooling(word_embedding_dimension=8), (ST, TEI)),
  ("D09", ERROR, "identity", tensors(DENSE, times(EYE, 2)), (OURS, ST, TEI, VLLM)),
  ("D09", ERROR, "holds nothing", tensors(DENSE, without(EYE)), (ST, TEI, VLLM)),
  ("D09", ERROR, "E104", remove(DENSE), (ST, TEI, VLLM)),
  (
    *("D09", WARNING, "is F16"),
    tensors(DENSE, lambda found: {EYE: found[EYE].astype(np.float16)}),
    (ST, TEI, VLLM),
  ),
  ("D09", ERROR, "bias is True", change("2_Dense/config.json", bias=True), (ST, TEI, VLLM)),
  (
    *("D09", ERROR, "do not know it"),
    change("2_Dense/config.json", activation_function="torch.nn.Identity"),
    (TEI, VLLM),
  ),
  ("D09", ERROR, "vLLM refuses", change(CONFIG, matryoshka_dimensions=[8, 16]), (VLLM,)),
  ("D09", WARNING, "vLLM refuses", change(CONFIG, matryoshka_dimensions=...), (VLLM,)),
  ("D09", ERROR, "says 16", nested(OWN, "dims", "exported", to=16), (OURS, ST, TEI, VLLM)),
  ("D10", ERROR, "no prompt 'query'", change(PROMPTS, prompts={"document": ""}), (OURS, ST)),
  ("D10", WARNING, "'search: '", nested(PROMPTS, "prompts", "query", to="search: "), (OURS, ST)),
  ("D11", ERROR, "vLLM ignores", change(BERT, do_lower_case=...), (VLLM,)),
  ("D11", ERROR, "not a number", change(BERT, max_seq_length=None), (ST, TEI)),
  ("D11", ERROR, "more than", change(BERT, max_seq_length=1025), (OURS, ST, TEI, VLLM)),
  (
    *("D11", WARNING, "16 times the trained 8"),
    nested(OWN, "pooling", "trained_length", to=8),
    (OURS, ST, TEI, VLLM),
  ),
  ("D12", ERROR, "'hello' becomes", change("tokenizer.json", post_processor=None), EMBEDDERS),
  ("D12", ERROR, "not a tokenizer", change("tokenizer.json", model={}), CONSUMERS),
  ("D12", ERROR, "eos_token is '<|im_end|>'", change(TOKENIZER, eos_token="<|im_end|>"), EMBEDDERS),
  ("D12", ERROR, "eos_token_id is 1", change(CONFIG, eos_token_id=1), EMBEDDERS),
  ("D12", ERROR, "pooling.token", nested(OWN, "pooling", "token", to="<|im_end|>"), (OURS,)),
  (
    *("D12", ERROR, "appends no token"),
    change(TOKENIZER, add_eos_token=False),
    (ST, TRANSFORMERS, VLLM),
  ),
  (
    *("D12", ERROR, "4 does not know it"),
    change(TOKENIZER, tokenizer_class="TokenizersBackend"),
    (ST, TRANSFORMERS, VLLM),
  ),
  ("D12", ERROR, "the table has 100 rows", change(CONFIG, vocab_size=100), CONSUMERS),
  ("D13", WARNING, "its hash", change(TOKENIZER, tokenizer_class="Qwen2Tokenizer"), (LLAMA,)),
  ("D13", WARNING, "older converters", change(CONFIG, architectures=["Qwen3Model"]), (LLAMA,)),
  ("D13", ERROR, "is appended", unended, (LLAMA,)),
  (
    *("D13", ERROR, "first other.weight"),
    tensors(WEIGHTS, lambda found: found | {"other.weight": found[NORM]}),
    (LLAMA,),
  ),
  ("D14", ERROR, "U @ V is not", tensors(UV, times("U", 1.5)), (OURS,)),
  ("D14", ERROR, "holds V", tensors(UV, without("U")), (OURS,)),
  ("D14", ERROR, "E104", remove(UV), (OURS,)),
  ("D15", WARNING, "no heading 'Data'", text("README.md", "## Data", "## Texts"), ()),
  ("D15", WARNING, "no line library_name", text("README.md", "library_name", "library"), ()),
  ("D15", WARNING, "the card says 3", nested(OWN, "exits", "exported", to=2), ()),
  ("D16", ERROR, "0.9", tensors(WEIGHTS, times("layers.0.mlp.up_proj.weight", 1.1)), (OURS,)),
  ("D16", ERROR, "least cosine", swap_vectors, (OURS,)),
  ("D16", ERROR, "gives 8 coordinates, parity.json 4", shorter_vectors, (OURS,)),
  (
    *("D16", ERROR, "other ids to 1 of 17 texts, first 'query'"),
    nested(PROMPTS, "prompts", "query", to="Instruct: Do.\nQuery: "),
    (OURS,),
  ),
  ("D16", ERROR, "refuses the folder", remove(WEIGHTS), (OURS,)),
]


@pytest.mark.parametrize("case", BROKEN, ids=lambda case: f"{case[0]} {case[2]}")
def test_a_fault_is_found_by_its_check(case: tuple, copy: pathlib.Path):
  check, level, said, edit, concerned = case
  edit(copy)
  findings = examination.examine(copy, ALL if check == "D16" else examination.CHECKS)
  matching = [f for f in faults(findings) if f.check == check and said in f.found]
  assert matching, [f for f in findings if f.check == check]
  assert (matching[0].level, set(matching[0].consumers)) == (level, set(concerned))
  assert matching[0].remedy
  assert not [f.found for f in findings if "cannot be examined" in f.found]
  found = verdicts(copy, findings)
  assert all(found[name].level != OK for name in concerned)


def test_every_check_has_a_fault():
  assert {case[0] for case in BROKEN} == {check.name for check in ALL}


def test_the_code_and_the_rank_of_a_folder_of_factors_are_checked(
  uv: pathlib.Path, tmp_path: pathlib.Path
):
  folder = pathlib.Path(shutil.copytree(uv, tmp_path / "uv"))
  (folder / "modeling_mlembed.py").write_text("import os\n")
  findings = examination.examine(folder)
  assert [(f.check, f.level) for f in faults(findings)] == [("D06", WARNING)]
  check = Check("D16", installed.transformers, (TRANSFORMERS,))
  assert "code that is not ours" in examination.examine(folder, [check])[0].found
  (folder / "modeling_mlembed.py").unlink()
  nested(OWN, "table", "rank_exported", to=16)(folder)
  found = {(f.check, f.level) for f in faults(examination.examine(folder))}
  assert {("D06", ERROR), ("D14", ERROR)} <= found


def test_a_fault_of_one_program_is_not_one_of_others(copy: pathlib.Path):
  nested(PROMPTS, "prompts", "document", to=None)(copy)
  found = verdicts(copy, examination.examine(copy))
  assert [name for name, v in found.items() if v.level != OK] == [TEI]
  assert str(found[TEI]).split("  ")[-1].strip() == "would fail because of D02"


def test_a_check_that_stumbles_says_so(copy: pathlib.Path):
  change(CONFIG, matryoshka_dimensions=3)(copy)
  change(OWN, dims=1, pooling=[])(copy)
  (copy / "modules.json").write_text('{"a": 1}')
  found = [f for f in examination.examine(copy, ALL) if "cannot be examined" in f.found]
  assert found and all(f.level == ERROR for f in found)


def test_a_folder_of_others_is_examined_without_our_files(folders: dict, tmp_path: pathlib.Path):
  ours = pathlib.Path(shutil.copytree(folders["full"], tmp_path / "ours"))
  for file in (OWN, parity.FILE):
    remove(file)(ours)
  findings = examination.examine(ours, ALL)
  assert not faults(findings)
  assert {f.check for f in findings if f.level == SKIPPED} == {"D01", "D13", "D14", "D15", "D16"}

  plain = tmp_path / "plain"
  sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 1}
  heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
  Qwen3Model(Qwen3Config(**sizes, **heads, eos_token_id=3)).save_pretrained(plain)
  shutil.copy(folders["full"] / "tokenizer.json", plain)
  findings = examination.examine(plain, ALL)
  assert not [f.found for f in findings if "cannot be examined" in f.found]
  assert {"D01", "D05", "D12"} <= {f.check for f in findings if f.level == ERROR}
  assert not {"D03", "D04", "D08"} & {f.check for f in faults(findings)}


def test_programs_that_are_not_installed_are_skipped(
  folders: dict, monkeypatch: pytest.MonkeyPatch
):
  monkeypatch.setitem(sys.modules, "torch", None)
  checks = [Check("D16", installed.sentence_transformers, (ST,))]
  findings = examination.examine(folders["full"], checks)
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
  checks = [
    Check("D16", installed.sentence_transformers, (ST,)),
    Check("D16", installed.transformers, (TRANSFORMERS,)),
  ]
  theirs, plain = examination.examine(copy, checks)
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
  assert [f["check"] for f in report["findings"]][-3:] == ["D16"] * 3
  assert {v["consumer"]: v["level"] for v in report["consumers"]} == dict.fromkeys(CONSUMERS, OK)
  notes = {v["consumer"]: v["note"] for v in report["consumers"]}
  assert all("least cosine" in notes[name] for name in (OURS, ST, TRANSFORMERS))


def test_the_command_knows_a_folder_that_was_saved_again(folders: dict, tmp_path: pathlib.Path):
  load_st(folders["full"]).save(str(tmp_path / "again"))
  done = doctor(tmp_path / "again")
  assert done.returncode == 2, done.stderr
  assert "re-saved by sentence-transformers 5.4 or newer" in done.stdout
  lines = done.stdout.splitlines()[-len(CONSUMERS) :]
  assert [line.split()[0] for line in lines] == list(CONSUMERS)
  assert "would fail because of D05, D07" in lines[CONSUMERS.index(TEI)]


def test_the_command_ends_with_1_for_warnings(copy: pathlib.Path):
  text("README.md", "## Data", "## Texts")(copy)
  done = doctor(copy, "--notorch")
  assert done.returncode == 1, done.stderr
  assert "D15 warning  README.md: there is no heading 'Data'. Add it." in done.stdout
  assert "sentence-transformers  ok\n" in done.stdout


def test_the_command_refuses_what_is_no_folder(tmp_path: pathlib.Path):
  done = doctor(tmp_path)
  assert (done.returncode, done.stdout) == (2, "")
  assert done.stderr == f"error: {tmp_path} is no model folder: it has no config.json\n"
  assert "DIR is missing" in doctor().stderr
  assert "unexpected argument 'b'; every option is a --flag" in doctor("a", "b").stderr
