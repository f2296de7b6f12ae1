import dataclasses
import hashlib
import json
import pathlib
import shlex

import jax
import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers
import yaml
from sentence_transformers import SentenceTransformer

from mlembed_jax.data.tokenizer import Tokenizer
from mlembed_jax.errors import ExportError
from mlembed_jax.hf import card, config_files, export, variants
from mlembed_jax.hf.config_files import Forms
from mlembed_jax.matryoshka import Slice
from mlembed_jax.slice_scores import SliceScore
from mlembed_jax.workdir import StepScores
from tests import material
from tests.hf.exports import CUTS, TEXTS, Trained, load_st, parity_difference, read, trained
from tests.release.cards import groups


def states_of_transformers(folder: pathlib.Path, tokens: np.ndarray, sizes: np.ndarray, depth: int):
  model = transformers.AutoModel.from_pretrained(folder, num_hidden_layers=depth)
  mask = torch.arange(tokens.shape[1])[None] < torch.tensor(sizes)[:, None]
  with torch.no_grad():
    states = model(input_ids=torch.tensor(tokens), attention_mask=mask.long()).last_hidden_state
  return states[torch.arange(len(sizes)), torch.tensor(sizes) - 1].numpy()


@pytest.mark.parametrize("kind", ["factorised", "dense"])
def test_every_exit_is_the_transformers_model_of_that_depth(
  kind: str, request: pytest.FixtureRequest, folders: dict, dense_folder: pathlib.Path
):
  made: Trained = request.getfixturevalue(kind)
  folder = folders["full"] if kind == "factorised" else dense_folder
  model = made.run.config.model
  tokens, sizes = material.random_batch(model.vocab, 6, 576)
  run = jax.jit(material.padded(model))
  ours_LBD = np.asarray(run({"params": made.params}, tokens, sizes))
  for depth in range(1, model.layers + 1):
    theirs_BD = states_of_transformers(folder, tokens, sizes, depth)
    difference = np.abs(ours_LBD[depth - 1] - theirs_BD).max() / np.abs(theirs_BD).max()
    print(f"{kind} exit {depth}: {difference:.2e}")
    assert difference <= 1e-4, depth


@pytest.mark.parametrize("cut", CUTS)
def test_sentence_transformers_gives_our_vectors(cut: str, folders: dict, factorised: Trained):
  theirs = load_st(folders[cut]).encode(TEXTS, prompt_name="query", batch_size=7)
  prompt = config_files.prompts(factorised.run.datasets)["query"]
  ours = factorised.vectors(TEXTS, CUTS[cut], prompt)
  assert theirs.shape == (len(TEXTS), CUTS[cut].dim or 48)
  np.testing.assert_allclose(np.linalg.norm(theirs, axis=1), 1, atol=1e-6)
  cosines = np.sum(ours * theirs, axis=1)
  print(f"{cut}: smallest cosine {cosines.min():.9f}, difference {np.abs(ours - theirs).max():.1e}")
  assert cosines.min() >= 0.99999
  assert np.abs(ours - theirs).max() <= 1e-4


def test_sentence_transformers_uses_the_prompts(folders: dict, factorised: Trained):
  model = load_st(folders["full"])
  documents = factorised.vectors(TEXTS, Slice(), "")
  np.testing.assert_allclose(model.encode_document(TEXTS), documents, atol=1e-4)
  queries = factorised.vectors(TEXTS, Slice(), "Instruct: Answer the question.\nQuery: ")
  np.testing.assert_allclose(model.encode_query(TEXTS), queries, atol=1e-4)
  assert np.abs(queries - documents).max() > 1e-2


def test_sentence_transformers_cuts_at_request_time(folders: dict, factorised: Trained):
  theirs = load_st(folders["full"]).encode(TEXTS, truncate_dim=16, normalize_embeddings=True)
  ours = factorised.vectors(TEXTS, Slice(dim=16), "")
  np.testing.assert_allclose(theirs, ours, atol=1e-4)
  shallow = SentenceTransformer(
    str(folders["full"]), device="cpu", config_kwargs={"num_hidden_layers": 2}
  )
  ours = factorised.vectors(TEXTS, Slice(depth=2), "")
  np.testing.assert_allclose(shallow.encode(TEXTS), ours, atol=1e-4)


def test_a_bfloat16_folder_agrees_with_its_own_vectors(data: pathlib.Path, tmp_path: pathlib.Path):
  made = trained(data, **{"export.dtype": "bfloat16"})
  folder = made.export(tmp_path / "bf16", Slice(dim=16))
  assert read(folder / "config.json")["torch_dtype"] == "bfloat16"
  difference = parity_difference(folder)
  print(f"bfloat16 stored, float32 computed: {difference:.1e}")
  assert difference <= 1e-5
  rounded = load_st(folder).encode(TEXTS)
  exact = made.vectors(TEXTS, Slice(dim=16), "")
  cosines = np.sum(rounded * exact, axis=1)
  assert 0.999 <= cosines.min() < 0.9999999, "the weights were not rounded, or too much"


@pytest.mark.parametrize("cut", ["full", "all"])
def test_parity_vectors_are_those_of_sentence_transformers(cut: str, folders: dict):
  items = read(folders[cut] / "parity.json")["items"]
  assert len({(item["text"], item.get("max_length")) for item in items}) == 16
  assert [len(i["input_ids"]) for i in items if i["id"] in ("long", "truncated")] == [128, 32]
  assert parity_difference(folders[cut]) <= 1e-5


@pytest.mark.parametrize("kind", ["factorised", "dense"])
def test_the_stored_tokenizer_gives_our_ids(
  kind: str, request: pytest.FixtureRequest, folders: dict, dense_folder: pathlib.Path
):
  made: Trained = request.getfixturevalue(kind)
  folder = folders["full"] if kind == "factorised" else dense_folder
  theirs = transformers.AutoTokenizer.from_pretrained(folder)
  for length in (2, 17, 128):
    expected = made.tokenizer.encode(["", *TEXTS], length)
    ids = theirs(["", *TEXTS], truncation=True, max_length=length)["input_ids"]
    assert ids == expected
    assert {row[-1] for row in ids} == {made.tokenizer.pooled_id}
  assert theirs.eos_token == made.tokenizer.pooled_token
  assert theirs.pad_token == "<|endoftext|>"
  assert max(map(len, expected)) == 128, "no text is long enough to be truncated"


def test_the_folder_has_exactly_these_files(folders: dict):
  always = {
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "modules.json",
    "config_sentence_transformers.json",
    "sentence_bert_config.json",
    "1_Pooling/config.json",
    "README.md",
    "mlembed.json",
    "parity.json",
    "mlembed/uv.safetensors",
  }
  dense = {"2_Dense/config.json", "2_Dense/model.safetensors", "3_Normalize/config.json"}
  for name, cut in CUTS.items():
    found = {p.relative_to(folders[name]).as_posix() for p in folders[name].rglob("*.*")}
    assert found == always | (dense if cut.dim else {"2_Normalize/config.json"}), name
    recorded = read(folders[name] / "mlembed.json")["files"]
    assert set(recorded) == found - {"mlembed.json"}
    for file, entry in recorded.items():
      assert hashlib.sha256((folders[name] / file).read_bytes()).hexdigest() == entry["sha256"]


def test_config_states_what_is_stored(folders: dict, dense: Trained, dense_folder: pathlib.Path):
  config = read(folders["all"] / "config.json")
  assert config["num_hidden_layers"] == config["max_window_layers"] == 3
  assert config["matryoshka_dimensions"] == [8]
  assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 5e3
  assert config["torch_dtype"] == config["dtype"] == "float32"
  ours = read(folders["all"] / "mlembed.json")
  assert ours["exits"] == {"trained": [1, 2, 3, 4], "exported": 3}
  assert ours["table"]["form"] == "merged" and ours["table"]["rank_exported"] == 8
  config = read(dense_folder / "config.json")
  assert config["eos_token_id"] == dense.tokenizer.pooled_id != config["pad_token_id"]
  assert read(dense_folder / "mlembed.json")["table"]["form"] == "full"
  assert not (dense_folder / "mlembed").exists()


def test_pooling_has_one_true_mode_and_no_key_that_an_old_version_refuses(folders: dict):
  pooling = read(folders["full"] / "1_Pooling/config.json")
  assert next(key for key, value in pooling.items() if value is True) == "pooling_mode_lasttoken"
  assert list(pooling)[-1] == "include_prompt"
  assert "embedding_dimension" not in pooling


def test_factors_multiply_to_the_table(folders: dict):
  factors = safetensors.numpy.load_file(folders["rank"] / "mlembed/uv.safetensors")
  table = safetensors.numpy.load_file(folders["rank"] / "model.safetensors")["embed_tokens.weight"]
  assert factors["U"].shape == (640, 16)
  np.testing.assert_array_equal(factors["U"] @ factors["V"], table)


def test_large_weights_are_split(
  factorised: Trained, folders: dict, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
  monkeypatch.setattr(export, "MAX_FILE_BYTES", 100_000)
  folder = factorised.export(tmp_path / "sharded")
  index = read(folder / "model.safetensors.index.json")
  shards = sorted(p.name for p in folder.glob("*.safetensors"))
  assert shards == sorted(set(index["weight_map"].values())) and len(shards) > 2
  assert shards[0] == f"model-00001-of-{len(shards):05}.safetensors"
  tensors = {k: v for s in shards for k, v in safetensors.numpy.load_file(folder / s).items()}
  assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
  whole = safetensors.numpy.load_file(folders["full"] / "model.safetensors")
  assert tensors.keys() == whole.keys()
  for name, tensor in whole.items():
    np.testing.assert_array_equal(tensors[name], tensor, err_msg=name)
  theirs = load_st(folder).encode(TEXTS)
  np.testing.assert_allclose(theirs, factorised.vectors(TEXTS, Slice(), ""), atol=1e-4)


def test_prompts_name_task_types_and_then_files(folders: dict):
  prompts = read(folders["full"] / "config_sentence_transformers.json")["prompts"]
  wrap = "Instruct: {}\nQuery: ".format
  assert prompts == {
    "query": wrap("Answer the question."),
    "document": "",
    "STS": wrap("Retrieve semantically similar text."),
    "PairClassification": wrap("Retrieve semantically entailed text."),
    "Retrieval-query": wrap("Answer the question."),
    "titles": wrap("Find the text of the title."),
    "BitextMining": wrap("Retrieve translations."),
    "Clustering": wrap("Find the topic."),
    "Classification": wrap("Find the topic."),
  }


def test_a_copy_has_the_prompts_of_its_embedder_and_others_have_their_own(factorised: Trained):
  own = config_files.prompts(factorised.run.datasets)
  run = dataclasses.replace(factorised.run, prompts={"query": "find: ", "web": "web: "})
  assert config_files.prompts_of(run) == own | {"web": "web: "}
  losses = dataclasses.replace(run.config.losses, contrastive=0.0)
  copy = dataclasses.replace(run, config=dataclasses.replace(run.config, losses=losses))
  assert config_files.prompts_of(copy) == {"query": "find: ", "document": "", "web": "web: "}


def test_without_training_files_the_query_prompt_is_that_of_the_reference():
  assert config_files.prompts({})["query"].startswith(
    "Instruct: Given a question, retrieve passages"
  )
  topics = {
    "b": material.entry("clustering", 1, "B."),
    "a": material.entry("classification", 1, "A."),
  }
  assert config_files.prompts(topics)["Classification"] == "Instruct: A.\nQuery: "


@pytest.mark.parametrize(
  ("tokens", "expected"),
  [([], "PreTrainedTokenizerFast"), (["<|im_start|>"], "Qwen2Tokenizer")],
)
def test_the_tokenizer_class_follows_the_vocabulary(
  tokens: list[str],
  expected: str,
  factorised: Trained,
  tmp_path: pathlib.Path,
  monkeypatch: pytest.MonkeyPatch,
):
  monkeypatch.setattr(config_files, "QWEN_SIZE", 500)
  made = material.train_tokenizer(600)
  made.add_special_tokens(tokens)
  made.save(str(tmp_path / "tokenizer.json"))
  tokenizer = Tokenizer(tmp_path / "tokenizer.json", "<|im_end|>")
  folder = dataclasses.replace(factorised, tokenizer=tokenizer).export(tmp_path / "out")
  assert read(folder / "tokenizer_config.json")["tokenizer_class"] == expected


def test_variant_name():
  assert variants.variant_name("m", Slice()) == "m"
  assert variants.variant_name("m", Slice(rank=64, depth=8, dim=256)) == "m-d256-l8-r64"


@pytest.mark.parametrize(
  ("cut", "message"),
  [
    (Slice(depth=9), r"^depth 9 was not trained; trained: 1, 2, 3, 4 \(the model has no such"),
    (Slice(dim=24), r"^dim 24 was not trained; trained: 8, 16, 48 \(choose .*; --force allows"),
    (Slice(rank=12, dim=9), r"^dim 9 .*; rank 12 was not trained; trained: 8, 16, 24"),
    (Slice(dim=0), r"^dim 0 was not trained"),
  ],
)
def test_untrained_sizes_are_refused(
  cut: Slice, message: str, factorised: Trained, tmp_path: pathlib.Path
):
  with pytest.raises(ExportError, match=message):
    factorised.export(tmp_path / "out", cut)
  assert not list(tmp_path.iterdir())


def test_a_full_table_has_no_ranks_even_by_force(dense: Trained, tmp_path: pathlib.Path):
  with pytest.raises(ExportError, match=r"^rank 8 was not trained; trained: none"):
    dense.export(tmp_path / "out", Slice(rank=8), force=True)


def test_force_writes_an_untrained_size_and_the_card_says_so(
  factorised: Trained, tmp_path: pathlib.Path
):
  cut = Slice(dim=24, rank=12)
  folder = factorised.export(tmp_path / "out", cut, force=True)
  text = (folder / "README.md").read_text(encoding="utf-8")
  assert "**Warning.** dim 24 was not trained; trained: 8, 16, 48." in text
  assert "# tiny-d24-r12\n" in text
  theirs = load_st(folder).encode(TEXTS)
  np.testing.assert_allclose(theirs, factorised.vectors(TEXTS, cut, ""), atol=1e-4)


def test_a_folder_that_is_not_ours_is_left_alone(
  factorised: Trained, folders: dict, tmp_path: pathlib.Path
):
  (tmp_path / "out").mkdir()
  (tmp_path / "out/notes.txt").write_text("mine")
  with pytest.raises(ExportError, match="out exists and is not an export of ours"):
    factorised.export(tmp_path / "out")
  assert [p.name for p in tmp_path.rglob("*")] == ["out", "notes.txt"]


def test_a_previous_export_is_replaced_unless_something_was_added(
  factorised: Trained, tmp_path: pathlib.Path
):
  out = tmp_path / "out"
  out.mkdir()
  factorised.export(out, Slice(dim=8))
  factorised.export(out, Slice(depth=1))
  assert read(out / "config.json")["num_hidden_layers"] == 1
  assert not (out / "2_Dense").exists()
  own = read(out / "mlembed.json")
  (out / "mlembed.json").write_text(json.dumps({"files": own["files"]}))  # of another version
  factorised.export(out, Slice(dim=8))
  assert read(out / "mlembed.json").keys() == own.keys()
  (out / "LICENSE").write_text("mine")
  with pytest.raises(ExportError, match="LICENSE was added to it and would be lost"):
    factorised.export(out)
  assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_failing_export_leaves_the_old_folder_and_nothing_else(
  factorised: Trained, tmp_path: pathlib.Path
):
  out = factorised.export(tmp_path / "out", Slice(depth=1))
  before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
  down = np.array(factorised.params["layers"]["mlp"]["down"])
  down[2, 0, 0] = np.nan
  layers = {
    **factorised.params["layers"],
    "mlp": {**factorised.params["layers"]["mlp"], "down": down},
  }
  broken = dataclasses.replace(factorised, params={**factorised.params, "layers": layers})
  with pytest.raises(ExportError, match=r"layers.2.mlp.down_proj.weight: 1 values are NaN"):
    broken.export(out)
  assert [p.name for p in tmp_path.iterdir()] == ["out"]
  assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before


def test_a_tokenizer_that_does_not_fit_is_refused(factorised: Trained, tmp_path: pathlib.Path):
  made = material.train_tokenizer(600)
  made.add_tokens([f"word{i}" for i in range(700 - made.get_vocab_size())])
  made.save(str(tmp_path / "tokenizer.json"))
  big = Tokenizer(tmp_path / "tokenizer.json", "<|im_end|>")
  with pytest.raises(ExportError, match="needs 700 rows but the table has 640"):
    dataclasses.replace(factorised, tokenizer=big).export(tmp_path / "out")
  word = Tokenizer(factorised.tokenizer.path, "one")
  with pytest.raises(ExportError, match="has 'one' outside of added_tokens"):
    dataclasses.replace(factorised, tokenizer=word).export(tmp_path / "out")
  assert [p.name for p in tmp_path.iterdir()] == ["tokenizer.json"]


def scores() -> StepScores:
  listed = [
    SliceScore("bitext", "accuracy", r, n, d, "float32", r / 100 + n / 10 + d / 1000, {})
    for r in (8, 16, 24)
    for n in (1, 2, 4)
    for d in (8, 16, 48)
  ]
  return StepScores(20, {}, listed)


def test_the_card_has_its_front_matter_headings_and_scores(
  factorised: Trained, tmp_path: pathlib.Path
):
  folder = factorised.export(tmp_path / "out", Slice(depth=2), evaluation=scores())
  text = (folder / "README.md").read_text(encoding="utf-8")
  _, front, body = text.split("---\n", 2)
  front = yaml.safe_load(front)
  assert front["library_name"] == "sentence-transformers"
  assert front["language"] == ["he", "no", "zh"]
  assert front["tags"] == list(card.TAGS)
  found = [line.removeprefix("## ") for line in body.splitlines() if line.startswith("## ")]
  assert found == list(card.HEADINGS)
  assert r"| layers \ dimension | 8 | 16 | 48 |" in body
  assert "| 2 | 0.4480 | 0.4560 | 0.4880 |" in body
  assert "| 4 |" not in body.split("## Results")[1], "a score of layers that are not in the folder"
  assert "| score | 0.3280 | 0.4080 | 0.4880 |" in body
  assert "language: Python 2,000, nor-Latn 1,200, heb-Hebr 1,100, zho-Hans 900, " in body
  assert "fewer than 1,000 rows: zho-Hans, zho-Hant, deu-Latn." in body
  assert "Warning" not in body


def test_every_block_of_a_card_has_a_program_that_runs_it_before_a_release(
  factorised: Trained, tmp_path: pathlib.Path
):
  forms = Forms(factors=True, onnx="int8", gguf=("f32",))
  folder = factorised.export(tmp_path / "out", Slice(dim=16), forms=forms)
  found = {name: (language, blocks) for language, name, _, blocks in groups(folder / "README.md")}
  programs = {"newest", "vllm", "optimum", "onnxruntime", "transformers-js", "llama-cpp"}
  assert set(found) == programs
  for language, blocks in found.values():
    if language == "python":
      compile("\n".join(blocks), "card", "exec")
  command, request = found["vllm"][1]
  assert "--trust-remote-code" in command
  body = json.loads(shlex.split(request)[-1])
  config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
  assert body["dimensions"] in config["matryoshka_dimensions"], "vLLM refuses others"
  prompts = json.loads((folder / "config_sentence_transformers.json").read_text(encoding="utf-8"))
  assert body["input"].startswith(prompts["prompts"]["query"])


def test_a_card_without_scores_says_so(folders: dict):
  text = (folders["full"] / "README.md").read_text(encoding="utf-8")
  assert "## Results\n\nNot evaluated.\n" in text
