"""The command that embeds prepared texts with a teacher, and training on what it writes."""

import json
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import StaticEmbedding

from mlembed_jax.data import catalog, to_teach
from mlembed_jax.data.store import open_split
from mlembed_jax.data.taught import Taught, open_taught
from mlembed_jax.data.to_teach import Prompts
from mlembed_jax.data.tokenizer import with_instruction
from mlembed_jax.errors import DataError
from mlembed_jax.inference import Encoder
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
  kept = {path: path.stat().st_mtime_ns for path in parts.glob("*.npy")}
  assert kept and not (tmp_path / "vectors").exists()
  done = teach(*arguments)
  assert done.returncode == 0, done.stderr
  assert Taught.load(tmp_path / "vectors") == Taught.load(taught)  # with the digests of all files
  assert not parts.exists()
  assert "is complete" in teach(*arguments).stdout
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
  right = 0
  for place in range(len(texts.rows)):
    text, row = texts.row(place)
    both = texts.read([text, texts.document(int(row.positives[0]))])
    english = next(t for t in both if t.isascii() and t.split()[0] in sources_of_english())
    assert planned.queries[place] == planned.documents[row.positives[0]]
    right += sources[planned.queries[place]] == english
  assert right >= 0.9 * len(texts.rows)
  assert planned.known == {"train/a.parquet": 2}


def sources_of_english():
  return set(" ".join(pairs(160, 0)["passage"]).split())


def test_vectors_of_other_data_are_refused(taught, mixed):
  with pytest.raises(DataError, match="holds vectors of another prepared dataset than"):
    open_taught(taught, mixed)


def test_damaged_vectors_are_noticed(taught, data, tmp_path):
  folder = shutil.copytree(taught, tmp_path / "copy")
  _, split = opened(data, folder)
  place, row, _ = next(rows_of(data, FILES[0]))
  (path,) = folder.glob("*train*-00000-of-*.vectors.npy")
  content = bytearray(path.read_bytes())
  content[-1 - 96 * (len(content) // 96 - 2)] ^= 1
  path.write_bytes(content)
  with pytest.raises(DataError, match=r"row \d+ is damaged|header is damaged"):
    for place, row, _ in rows_of(data, FILES[0]):
      split.vectors_of(place, row, np.arange(1))
  content = json.loads((folder / "taught.json").read_text())
  (folder / "taught.json").write_text(json.dumps(content | {"width": 0}))
  with pytest.raises(DataError, match=r"taught.json"):
    opened(data, folder)
