"""The command that embeds prepared texts with a teacher, and training on what it writes."""

import dataclasses
import json
import os
import resource
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import StaticEmbedding

from mlembed_jax import teaching, vector_parts
from mlembed_jax.data import catalog, to_teach
from mlembed_jax.data import taught as taught_module
from mlembed_jax.data.store import open_split
from mlembed_jax.data.taught import Taught, open_taught
from mlembed_jax.data.to_teach import Prompts
from mlembed_jax.data.tokenizer import with_instruction
from mlembed_jax.errors import DataError
from mlembed_jax.inference import Encoder
from mlembed_jax.training import inputs
from tests.material import entry, pairs, prepare_dataset, train_tokenizer, write_files
from tests.runs import ENVIRONMENT, ROOT, SMALL, assert_same_state, lines, run

FILES = ["train/bitext.parquet", "train/topics.parquet", "train/colours.parquet"]


def command(teacher, data, out, *more):
  flags = f"--teacher={teacher}", f"--dataset={data / 'dataset'}", f"--out={out}"
  return [sys.executable, "-m", "mlembed_jax.teach", *flags, *more]


def teach(*args):
  return subprocess.run(command(*args), cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)


@pytest.fixture(scope="module")
def taught(exported, data, tmp_path_factory):
  """What one of our own encoders says of the texts, with the instructions of their files."""
  out = tmp_path_factory.mktemp("taught") / "vectors"
  done = teach(exported["full"], data, out, "--prompts=files", "--part=100")
  assert done.returncode == 0, done.stderr
  (out.parent / "stdout").write_text(done.stdout)
  return out


def opened(data, folder):
  found = catalog.load_catalog(data / "dataset")
  return found, open_split(found, "train", FILES, taught=open_taught(folder, found))


def rows_of(data, name):
  found = catalog.load_catalog(data / "dataset")
  texts = to_teach.Texts(found)
  for place in range(len(texts.rows)):
    text, row = texts.row(place)
    if row.dataset == name:
      documents = [*row.positives, *row.negatives]
      yield place, row, texts.read([text, *(texts.document(int(d)) for d in documents)])


@pytest.mark.parametrize("name", FILES)
def test_every_text_of_a_row_has_the_vector_of_the_teacher(taught, data, exported, name):
  found, split = opened(data, taught)
  encoder, read = Encoder.load(exported["full"]), list(rows_of(data, name))[:12]
  for place, row, (query, *documents) in read:
    asked = with_instruction(found.files[name].entry["instruction"], query)
    expected = encoder.encode([asked, *documents])
    vectors = split.vectors_of(place, row, np.arange(1 + len(documents)))
    assert vectors.dtype == np.float16
    np.testing.assert_allclose(vectors, expected, atol=1e-3)
  assert split.vectors_shape(found.files[name]) == (1 + len(documents), 48)


def test_each_text_is_embedded_once(taught, data):
  found = catalog.load_catalog(data / "dataset")
  distinct = set()
  for name in FILES:
    instruction = found.files[name].entry["instruction"]
    for _, _, (query, *documents) in rows_of(data, name):
      distinct |= {with_instruction(instruction, query), *documents}
  printed = (taught.parent / "stdout").read_text()
  assert f"{len(distinct):,} distinct texts" in printed
  assert f"--config.kd.teacher={taught}" in printed


def test_a_killed_command_goes_on(taught, data, exported, tmp_path):
  arguments = exported["full"], data, tmp_path / "vectors", "--prompts=files", "--part=100"
  process = subprocess.Popen(
    command(*arguments), cwd=ROOT, env=ENVIRONMENT, stderr=subprocess.DEVNULL
  )
  parts, end = tmp_path / "vectors.parts", time.monotonic() + 120
  while not any(parts.glob("*.npy")):
    assert time.monotonic() < end and process.poll() is None
    time.sleep(0.01)
  process.kill()
  process.wait()
  kept = {path.name: path.read_bytes() for path in parts.glob("*.npy")}
  assert kept and not (tmp_path / "vectors").exists()
  found = catalog.load_catalog(data / "dataset")
  files = [found.files[name] for name in FILES]
  instructions = {f.name: with_instruction(f.entry["instruction"], "") for f in files}
  planned = to_teach.plan(found, files, Prompts("", instructions), "")
  model, asked = teaching.load_model(str(exported["full"])), []
  counting = dataclasses.replace(
    model, encode=lambda texts, prompt: asked.extend(texts) or model.encode(texts, prompt)
  )
  shutil.copytree(parts, tmp_path / "copy.parts")
  held = vector_parts.Parts(tmp_path / "copy")
  with held.held():
    made = teaching.encode_all(counting, to_teach.Texts(found), planned, held, 100)
  assert len(asked) == len(planned.sources) - 100 * len(kept)
  assert {path.name for path in made} >= kept.keys()
  done = teach(*arguments)
  assert done.returncode == 0, done.stderr
  assert Taught.load(tmp_path / "vectors") == Taught.load(taught)  # with the digests of all files
  assert not parts.exists()
  (tmp_path / "vectors.parts").mkdir()  # as a kill at the very end leaves it
  assert "is complete" in teach(*arguments).stdout and not parts.exists()
  other = teach(*arguments, "--align=passage")
  assert (
    other.returncode == 1 and "--out: " in other.stderr and "holds other vectors" in other.stderr
  )


def test_vectors_on_disk_teach_as_the_encoder_itself_does(taught, data, exported, tmp_path):
  fields = SMALL | {
    "train.steps": 3,
    "optimizer.warmup_steps": 1,
    "kd.match": "last",
    "kd.space": "unit",
  }
  fields |= {"kd.similarity": 0.5, "data.document_instructions": 0.0, "losses.contrastive": 0.0}
  fields |= {"data.lengths": "(128,)"}  # a run that cuts texts shows an online teacher less
  found = []
  for teacher, workdir in ((taught, tmp_path / "stored"), (exported["full"], tmp_path / "online")):
    done = run(data, workdir, **fields, **{"kd.teacher": teacher})
    assert done.returncode == 0, done.stderr
    found.append(lines(workdir))
  for stored, online in zip(*found, strict=True):
    for name in ("loss", "distillation_loss", "similarity_loss"):
      assert stored[name] == pytest.approx(online[name], rel=2e-3)


@pytest.fixture(scope="module")
def stranger(tmp_path_factory):
  """An embedder that only sentence-transformers reads, of another tokenizer and width."""
  tokenizer = train_tokenizer(300)
  weights = np.random.default_rng(0).normal(size=(tokenizer.get_vocab_size(), 32))
  folder = tmp_path_factory.mktemp("stranger")
  embedding = StaticEmbedding(tokenizer, embedding_weights=weights.astype(np.float32))
  SentenceTransformer(modules=[embedding], device="cpu").save(str(folder))
  return folder


def test_a_stranger_teaches_through_a_map_that_a_stopped_run_keeps(stranger, data, tmp_path):
  out, whole, again = (tmp_path / name for name in ("vectors", "whole", "again"))
  done = teach(stranger, data, out, "--align=passage", "--files=train/bitext.parquet")
  assert done.returncode == 0, done.stderr
  assert "is encoded by sentence-transformers, as this package does not" in done.stdout
  found, split = opened(data, out)
  model = SentenceTransformer(str(stranger), device="cpu")
  for place, row, (_, passage, *_) in list(rows_of(data, FILES[0]))[:5]:
    vectors = split.vectors_of(place, row, np.arange(2))
    np.testing.assert_allclose(vectors, 2 * [model.encode(passage)], rtol=1e-3, atol=1e-3)
  shapes = [split.vectors_shape(found.files[name]) for name in FILES]
  assert shapes == [(2, 32), None, None]
  fields = SMALL | {"kd.teacher": out, "kd.space": "unit", "kd.projection": 32}
  fields |= {"train.steps": 10, "train.checkpoint_every": 5}
  done = run(data, whole, **fields)
  assert done.returncode == 0, done.stderr
  shutil.copytree(whole, again)
  shutil.rmtree(again / "checkpoints/10")
  done = run(data, again, **fields)
  assert done.returncode == 0, done.stderr
  assert_same_state(whole, again, 10)
  losses = [line["distillation_loss"] for line in lines(whole)]
  assert losses[-1] < losses[0]
  wrong = run(data, tmp_path / "wrong", **fields | {"kd.projection": 48})
  assert "kd.projection: 48, but train/bitext.parquet gives 32 dims" in wrong.stderr


@pytest.fixture
def mixed(tmp_path):
  """Translations of which every second one has its English text first."""
  columns = pairs(80, 2)
  for i in range(0, 80, 2):
    columns["query"][i], columns["passage"][i] = columns["passage"][i], columns["query"][i]
  write_files(tmp_path, {"train/a.parquet": (columns, entry("bitext", 2, ""))})
  train_tokenizer(600).save(str(tmp_path / "tokenizer.json"))
  return catalog.load_catalog(prepare_dataset(tmp_path))


def test_the_english_side_of_a_translation_is_found(mixed):
  file = mixed.files["train/a.parquet"]
  planned = to_teach.plan(mixed, [file], Prompts("", {file.name: ""}), to_teach.ENGLISH)
  texts = to_teach.Texts(mixed)
  sources = texts.read([texts.source(int(place)) for place in planned.sources])
  assert (np.diff(planned.sources) >= 0).all() and (planned.documents == to_teach.NONE).all()
  right = 0
  for place in range(len(texts.rows)):
    text, row = texts.row(place)
    both = texts.read([text, texts.document(int(row.positives[0]))])
    english = next(t for t in both if t.isascii() and t.split()[0] in sources_of_english())
    right += sources[planned.queries[place]] == english
  assert right >= 0.9 * len(texts.rows)


def test_a_row_of_translations_shares_one_vector_whatever_other_rows_have(stranger, tmp_path):
  """Two foreign texts have one English passage, which another file has, too."""
  columns = pairs(40, 2)
  columns["passage"][1] = columns["passage"][0]
  search = pairs(40, 2)
  files = {
    "train/a.parquet": (columns, entry("bitext", 2, "")),
    "train/b.parquet": (search, entry("retrieval", 2, "")),
  }
  write_files(tmp_path, files)
  train_tokenizer(600).save(str(tmp_path / "tokenizer.json"))
  found = catalog.load_catalog(prepare_dataset(tmp_path))
  done = teach(stranger, tmp_path, tmp_path / "out", "--align=query")
  assert done.returncode == 0, done.stderr
  split = open_split(found, "train", [*files], taught=open_taught(tmp_path / "out", found))
  model, texts = SentenceTransformer(str(stranger), device="cpu"), to_teach.Texts(found)
  for place in range(len(texts.rows)):
    text, row = texts.row(place)
    query, passage = texts.read([text, texts.document(int(row.positives[0]))])
    expected = [query, query if row.dataset == "train/a.parquet" else passage]
    vectors = split.vectors_of(place, row, np.arange(2))
    np.testing.assert_allclose(vectors, model.encode(expected), rtol=1e-3, atol=1e-3)
  shapes = [split.vectors_shape(found.files[name]) for name in files]
  assert shapes == [(2, 32), (4, 32)]


def sources_of_english():
  return set(" ".join(pairs(160, 0)["passage"]).split())


def test_vectors_of_other_data_are_refused(taught, mixed):
  with pytest.raises(DataError, match="holds vectors of another prepared dataset than"):
    open_taught(taught, mixed)


def test_damaged_vectors_are_noticed(taught, data, tmp_path):
  folder = shutil.copytree(taught, tmp_path / "copy")
  _, split = opened(data, folder)
  (path,) = folder.glob("*train*-00000-of-*.vectors.npy")
  content = bytearray(path.read_bytes())
  content[-1] ^= 1
  path.write_bytes(content)
  with pytest.raises(DataError, match=r"row \d+ is damaged; restore it, or remove the folder and"):
    for place, row, _ in [each for name in FILES for each in rows_of(data, name)]:
      split.vectors_of(place, row, np.arange(1))
  wanted = dataclasses.replace(Taught.load(folder), files={})
  with pytest.raises(DataError, match=r"--out: .*vectors.npy is damaged: its bytes are not those"):
    teaching.is_complete(folder, wanted)
  path.unlink()
  with pytest.raises(DataError, match=r"00000-of-\d+.vectors.npy is missing; restore it, or remov"):
    opened(data, folder)
  content = json.loads((folder / "taught.json").read_text())
  (folder / "taught.json").write_text(json.dumps(content | {"width": 0}))
  with pytest.raises(DataError, match=r"taught.json"):
    opened(data, folder)


def test_parts_may_be_more_than_files_that_a_process_may_open(tmp_path):
  vectors = np.arange(600, dtype=np.float16).reshape(300, 2) + 1
  parts = [tmp_path / f"{i}.npy" for i in range(300)]
  for part, vector in zip(parts, vectors, strict=True):
    np.save(part, vector[None])
  soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
  most = len(os.listdir("/proc/self/fd")) + 50
  resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
  try:
    path, _ = taught_module._write_shard(tmp_path / "out.npy", parts, np.arange(300)[::-1])
  finally:
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
  np.testing.assert_array_equal(np.load(path), vectors[::-1])


def test_vectors_that_cannot_be_kept_are_named(tmp_path):
  for value in (0.0, np.nan, 1e6):
    vectors = np.array([[1.0, 2.0], [value, value]], np.float32)
    with pytest.raises(DataError, match=r"1 of 2 texts zeros, NaN or .*; the first is 'b'"):
      taught_module.numbers(vectors, ["a", "b"])


def test_another_teacher_in_the_same_place_is_another_one(stranger, tmp_path):
  folder = shutil.copytree(stranger, tmp_path / "copy")
  assert teaching._version(folder) == teaching._version(stranger)
  (path,) = folder.glob("**/model.safetensors")
  content = bytearray(path.read_bytes())
  content[-1] ^= 1
  path.write_bytes(content)
  assert teaching._version(folder) != teaching._version(stranger)


def test_only_a_named_folder_teaches(taught, data, tiny, monkeypatch):
  monkeypatch.chdir(taught)
  assert inputs.load(tiny, data / "none").split.taught is None


def test_prompts_that_are_empty_are_none():
  model = teaching.Model("m", "", {"document": "", "passage": "p: "}, lambda *_: np.zeros(0))
  assert model.prompt(*teaching.DOCUMENT_PROMPTS) == "p: "
  assert model.prompt("query") == ""


@pytest.mark.parametrize(
  ("out", "flags", "message"),
  [
    ("out", ["--align=english", "--files=train/topics*"], "--align: none of the files is of task_"),
    ("dataset/taught", [], "lies in the prepared dataset; choose another folder"),
  ],
)
def test_what_cannot_be_meant_is_refused_before_a_model_is_read(data, out, flags, message):
  done = teach("/absent", data, data / out, *flags)
  assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr
