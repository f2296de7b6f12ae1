"""Teachers: opened from what a run wrote, matched exit by exit, refused where they cannot teach."""

import dataclasses
import json
import pathlib
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mlembed_jax.config import from_mapping
from mlembed_jax.data import catalog, vocabulary
from mlembed_jax.data.store import open_split
from mlembed_jax.data.tokenizer import Tokenizer
from mlembed_jax.errors import ConfigError, LoadError
from mlembed_jax.files import copy_file
from mlembed_jax.hf.export import TrainedModel, export_folder
from mlembed_jax.hf.folder import read_model
from mlembed_jax.hf.load import load_params
from mlembed_jax.matryoshka import Slice
from mlembed_jax.models.batched import Batching, encode_batched
from mlembed_jax.parallel.sharding import make_mesh, put_batch
from mlembed_jax.training import inputs, optimizer, train_state
from mlembed_jax.training.checkpoint import Checkpoints, Retention
from mlembed_jax.training.teacher import check_stored, open_teacher
from mlembed_jax.training.train_state import Head
from mlembed_jax.training.train_step import BatchLoss
from mlembed_jax.workdir import Run
from tests.material import (
  config_dict,
  entry,
  kind_of,
  pairs,
  prepare_dataset,
  scored,
  sentences,
  train_tokenizer,
  write_files,
  write_vectors,
)
from tests.training.test_train_step import batch_of, on_mesh

WIDE = {"model.layers": 4, "model.width": 64, "matryoshka.dims": (64,)}
WIDE |= {"matryoshka.exits": (1, 2, 4), "kd.teacher": ""}


@pytest.fixture(scope="module")
def tokenizer(data):
  return Tokenizer(data / "tokenizer.json", "<|endoftext|>")


@pytest.fixture(scope="module")
def workdir(data, tokenizer, tmp_path_factory):
  """What a run of a deeper and wider encoder leaves."""
  folder = tmp_path_factory.mktemp("teacher")
  config = from_mapping(config_dict(data, **WIDE))
  mesh = make_mesh(config)
  with on_mesh(mesh):
    checkpoints = Checkpoints(Retention(folder, 1))
    checkpoints.save(7, train_state.create(config, optimizer.make(config.optimizer, 20), mesh))
    checkpoints.close()
  Run(config, {}, {"dataset": "fingerprint", "units": {}}).save(folder)
  copy_file(tokenizer.path, folder / "tokenizer.json")
  return folder


@pytest.fixture(scope="module")
def exported(workdir, tokenizer, tmp_path_factory):
  config = Run.load(workdir).config
  mesh = make_mesh(config)
  with on_mesh(mesh):
    teacher = open_teacher(student(workdir, **WIDE_STUDENT), tokenizer)
    params = jax.device_get(teacher.params(mesh))
  trained = TrainedModel(Run.load(workdir), 7, params, tokenizer)
  return export_folder(tmp_path_factory.mktemp("exported") / "folder", trained, Slice(depth=2))


WIDE_STUDENT = {name: value for name, value in WIDE.items() if name != "kd.teacher"}


def student(teacher, **fields):
  return from_mapping(config_dict(**{"kd.teacher": str(teacher), **fields}))


def test_exits_of_a_workdir_are_matched_by_depth(workdir, tokenizer):
  assert open_teacher(student(workdir), tokenizer).shape.exits == (1, 2, 4)
  by_position = student(workdir, **{"kd.match": "index", "matryoshka.exits": (1, 3)})
  assert open_teacher(by_position, tokenizer).shape.exits == (2, 4)
  chosen = student(workdir, **{"kd.exits": (4,)})
  assert open_teacher(chosen, tokenizer).shape.exits == (4, 4, 4)


def test_an_exported_cut_teaches_with_the_exits_it_still_has(exported, tokenizer):
  teacher = open_teacher(student(exported), tokenizer)
  assert teacher.shape.model.layers == 2 and teacher.shape.model.rank == 0
  assert teacher.shape.exits == (1, 1, 2)  # 1/3, 2/3, 3/3 of the depth; 2/3 is nearest to 1/2


def test_a_folder_of_others_teaches_with_its_last_layer(exported, tokenizer):
  (exported / "mlembed.json").rename(exported / "moved")
  try:
    assert open_teacher(student(exported), tokenizer).shape.exits == (2, 2, 2)
  finally:
    (exported / "moved").rename(exported / "mlembed.json")


DEFAULT = ("config_sentence_transformers.json", {"default_prompt_name": "query"})
MEAN = ("1_Pooling/config.json", {"pooling_mode": "mean", "pooling_mode_lasttoken": False})


@pytest.mark.parametrize(
  ("edit", "said", "starts"),
  [
    (MEAN, "its pooling is mean; training pools the last token", False),
    (DEFAULT, "it puts 'Instruct: .*before every text; the run does not", True),
    (("config.json", {"is_causal": False}), "is_causal is False", False),
  ],
)
def test_what_a_run_would_leave_out_of_a_folder_is_refused(
  exported, tokenizer, tmp_path, edit, said, starts
):
  folder, (file, values) = pathlib.Path(shutil.copytree(exported, tmp_path / "copy")), edit
  (folder / "mlembed.json").unlink()
  (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | values))
  with pytest.raises(LoadError, match=said):
    open_teacher(student(folder), tokenizer)
  config = from_mapping(config_dict(**WIDE | {"model.layers": 2, "matryoshka.exits": (1, 2)}))
  if starts:
    inputs.check_start(folder, config, tokenizer)
  else:
    with pytest.raises(LoadError, match=said):
      inputs.check_start(folder, config, tokenizer)


@pytest.fixture(scope="module")
def small(data, exported, tokenizer, tmp_path_factory):
  """A tokenizer with the tokens of the training rows in one language, made by the command."""
  out = tmp_path_factory.mktemp("small") / "small.json"
  flags = (
    f"--tokenizer={exported}",
    f"--dataset={data / 'dataset'}",
    "--languages=de",
    f"--out={out}",
  )
  words = [sys.executable, "-m", "mlembed_jax.vocabulary", *flags]
  done = subprocess.run(words, capture_output=True, text=True, check=True)
  made = Tokenizer(out, "<|endoftext|>")
  assert f"{out}: {made.size} of {tokenizer.size} tokens; 0.00% of a sample" in done.stdout
  assert done.stdout.endswith("train with --config.model.vocab=384\n") and made.size <= 384
  return made


FEW = {"model.vocab": 384, **WIDE_STUDENT, "model.layers": 2, "matryoshka.exits": (1, 2)}


def test_training_starts_from_the_rows_of_its_tokens(exported, small, tokenizer):
  config = from_mapping(config_dict(**FEW | {"model.rank": 0, "matryoshka.ranks": ()}))
  ids = inputs.check_start(exported, config, small)
  assert sorted(ids) == ids.tolist() and len(ids) == small.size
  params = load_params(exported, config.model, ids=ids)
  whole = load_params(exported, read_model(exported))
  np.testing.assert_array_equal(params["table"][: len(ids)], whole["table"][ids])
  assert params["table"].shape[0] == 384 and not params["table"][len(ids) :].any()
  texts = sentences("de")[:30]
  batching = Batching(lengths=[64], rows=lambda _: 30)
  vectors = encode_batched(config.model, params, small.encode(texts, 64), [2], batching)[0]
  before = encode_batched(read_model(exported), whole, tokenizer.encode(texts, 64), [2], batching)
  np.testing.assert_allclose(vectors, before[0], atol=1e-4)
  assert inputs.check_start(exported, from_mapping(config_dict(**FEW | ALL)), tokenizer) is None


ALL = {"model.vocab": 640}


@pytest.mark.parametrize("rank", [16, 24])
def test_trained_factors_are_taken_by_row(exported, small, rank):
  config = from_mapping(config_dict(**FEW | {"model.rank": rank, "matryoshka.ranks": (rank,)}))
  ids = inputs.check_start(exported, config, small)
  params = load_params(exported, config.model, ids=ids)
  whole = load_params(exported, dataclasses.replace(config.model, vocab=640))
  np.testing.assert_array_equal(params["table"][: len(ids)], whole["table"][ids])
  np.testing.assert_array_equal(params["up"], whole["up"])


@pytest.mark.parametrize("kind", ["workdir", "exported"])
def test_a_teacher_of_more_tokens_reads_those_of_the_student(kind, request, small):
  folder = request.getfixturevalue(kind)
  teacher, mesh = (
    open_teacher(student(folder, **{"model.vocab": 384}), small),
    make_mesh(student(folder)),
  )
  with on_mesh(mesh):
    table = np.asarray(teacher.params(mesh)["table"])
  assert teacher.shape.model.vocab == len(table) == 384
  whole = open_teacher(student(folder), Tokenizer(folder / "tokenizer.json", "<|endoftext|>"))
  with on_mesh(mesh):
    rows = np.asarray(whole.params(mesh)["table"])[teacher.ids]
  np.testing.assert_array_equal(table[: len(rows)], rows)


def test_the_first_rows_are_enough_for_the_first_tokens(exported, tokenizer, tmp_path):
  """A vocabulary that is cut to its first ids gathers them, and only them."""
  spec = vocabulary.trimmed(tokenizer.spec, np.arange(258))
  (tmp_path / "first.json").write_text(json.dumps(spec))
  first = Tokenizer(tmp_path / "first.json", "<|endoftext|>")
  few = from_mapping(config_dict(**FEW | {"model.rank": 0, "matryoshka.ranks": ()}))
  ids = inputs.check_start(exported, few, first)
  assert ids.tolist() == list(range(258))
  assert load_params(exported, few.model, ids=ids)["table"].shape[0] == 384
  teacher = open_teacher(student(exported, **{"model.vocab": 384}), first)
  assert teacher.ids.tolist() == list(range(258))


def test_a_table_with_fewer_rows_than_tokens_is_refused(exported, small, tmp_path):
  folder = pathlib.Path(shutil.copytree(exported, tmp_path / "copy"))
  tensors = load_file(folder / "model.safetensors")
  name = next(name for name in tensors if name.endswith("embed_tokens.weight"))
  tensors[name] = tensors[name][:300]
  save_file(tensors, folder / "model.safetensors", {"format": "pt"})
  config = json.loads((folder / "config.json").read_text()) | {"vocab_size": 300}
  (folder / "config.json").write_text(json.dumps(config))
  with pytest.raises(LoadError, match=r"E106 tokenizer: id \d+ of .* but the table has 300 rows"):
    inputs.check_start(folder, from_mapping(config_dict(**FEW)), small)


def test_rows_that_no_token_has_and_tokens_of_others_are_refused(exported, small, tmp_path):
  config = from_mapping(config_dict(**FEW | ALL))
  with pytest.raises(ConfigError, match=r"model.vocab: 640 rows, and .* tokens of .*; set it to"):
    inputs.check_start(exported, config, small)
  spec = json.loads(small.path.read_text())
  first = next(token for token, number in spec["model"]["vocab"].items() if number == 300)
  vocab = {"unheard" if token == first else token: n for token, n in spec["model"]["vocab"].items()}
  merges = [m for m in spec["model"]["merges"] if first not in (*m, m[0] + m[1])]
  spec["model"] |= {"vocab": vocab, "merges": merges}
  (tmp_path / "other.json").write_text(json.dumps(spec))
  other = Tokenizer(tmp_path / "other.json", "<|endoftext|>")
  with pytest.raises(LoadError, match=r"E106 tokenizer: .*has other tokens than .*'unheard'"):
    inputs.check_start(exported, from_mapping(config_dict(**FEW)), other)
  with pytest.raises(ConfigError, match=r"kd.teacher: .* is another vocabulary than .*other.json"):
    open_teacher(student(exported, **{"model.vocab": 384}), other)


def distillation_of(config, teacher, params, mesh):
  def run(params, batch, teacher_params):
    loss = BatchLoss(config, kind_of("retrieval"), teacher.shape)
    rank = np.int32(24)
    result, _ = loss.value_and_grad(params, Head({}), batch, rank, 0.0, teacher_params)
    return result.terms["distillation"]

  with on_mesh(mesh):
    return jax.jit(run)(params, put_batch(batch_of(), mesh), teacher.params(mesh))


@pytest.mark.parametrize("cut", [False, True])
def test_an_encoder_has_nothing_to_learn_from_itself(workdir, exported, tokenizer, cut):
  fields = WIDE_STUDENT | ({"model.layers": 2, "matryoshka.exits": (1, 2)} if cut else {})
  config = student(exported if cut else workdir, **fields)
  teacher = open_teacher(config, tokenizer)
  mesh = make_mesh(config)
  with on_mesh(mesh):
    own = open_teacher(student(workdir, **WIDE_STUDENT), tokenizer).params(mesh)
  own["layers"] = jax.tree.map(lambda x: x[: config.model.layers], own["layers"])
  assert np.all(distillation_of(config, teacher, own, mesh) < 1e-10)
  other = jax.tree.map(lambda x: x * 1.1, own)
  assert np.all(distillation_of(config, teacher, other, mesh) > 1e-6)


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"kd.teacher": "/absent"}, "kd.teacher: /absent is no folder"),
    ({"model.width": 96, "matryoshka.dims": (96,)}, "gives 64 dims, fewer than model.width = 96"),
    ({"kd.projection": 48}, "kd.projection: 48, but .* gives 64 dims; set it to 64"),
    ({"kd.exits": (2, 5)}, "kd.exits: 5 is beyond the teacher's 4 layers"),
    ({"kd.exits": (4,), "kd.match": "index"}, "has 1 exits for the student's 3"),
  ],
)
def test_teachers_that_cannot_teach_are_refused(workdir, tokenizer, fields, message):
  with pytest.raises(ConfigError, match=message):
    open_teacher(student(workdir, **fields), tokenizer)


def test_leading_coordinates_are_learnt_of_teachers_that_were_trained_so(
  exported, tokenizer, tmp_path
):
  folder, prefix = pathlib.Path(shutil.copytree(exported, tmp_path / "copy")), {"kd.prefix": 1.0}

  def state(file, **values):
    stated = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(stated | values))

  with pytest.raises(ConfigError, match=r"kd.prefix: nothing says that leading coordinates of"):
    open_teacher(student(folder, **prefix), tokenizer)
  open_teacher(student(folder, **prefix, **{"kd.mrl": True}), tokenizer)
  state("mlembed.json", dims={"trained": [16, 64], "exported": 64})
  open_teacher(student(folder, **prefix), tokenizer)
  (folder / "mlembed.json").unlink()
  with pytest.raises(ConfigError, match=r"kd.prefix: nothing says"):
    open_teacher(student(folder, **prefix), tokenizer)
  state("config.json", matryoshka_dimensions=[16, 64])
  open_teacher(student(folder, **prefix), tokenizer)


def test_a_teacher_of_another_vocabulary_is_refused(workdir, tmp_path):
  other = train_tokenizer(600)
  other.add_tokens(["unheard"])
  other.save(str(tmp_path / "tokenizer.json"))
  with pytest.raises(ConfigError, match="is another vocabulary than"):
    open_teacher(student(workdir), Tokenizer(tmp_path / "tokenizer.json", "<|endoftext|>"))


def test_a_folder_that_is_no_encoder_is_refused(tmp_path, tokenizer):
  for stated, message in (
    ({"hidden_size": 64}, r"config.json: model_type is None; only 'qwen3'"),
    ({"hidden_size": 64, "model_type": "qwen3"}, r"config.json has no vocab_size"),
  ):
    (tmp_path / "config.json").write_text(json.dumps(stated))
    with pytest.raises(ValueError, match=message):
      open_teacher(student(tmp_path), tokenizer)


@pytest.fixture
def prepared(tokenizer, tmp_path):
  """Returns what prepares files {name: (columns, entry)} and opens their training rows."""

  def prepare(files, out="dataset"):
    write_files(tmp_path, files)
    dataset = prepare_dataset(tmp_path, "*", tokenizer.path, out=out)
    return open_split(catalog.load_catalog(dataset), "train", list(files))

  return prepare


def stored(folder, width, unit=False):
  """Returns a file of 16 scored pairs with vectors."""
  shapes = {"query": (16, width), "passage": (16, width)}
  names = write_vectors(folder, f"{width}", shapes)
  if unit:
    vectors = np.load(folder / names["query"])
    np.save(folder / names["query"], vectors / np.linalg.norm(vectors, axis=-1, keepdims=True))
  return {"pairs.parquet": (scored(16), entry("scored_pairs", 0, "") | {"teacher_vectors": names})}


def test_stored_vectors_must_be_there_and_wide_enough(tmp_path, prepared):
  config, found = student("stored"), prepared(stored(tmp_path, 48))
  check_stored(config, found)
  with pytest.raises(
    ConfigError, match=r"pairs\.parquet gives 40 dims, fewer than model.width = 48"
  ):
    check_stored(config, prepared(stored(tmp_path, 40), "narrow"))
  prefix = {"kd.prefix": 1.0, "kd.space": "unit"}
  with pytest.raises(ConfigError, match=r"of the teacher's vectors of pairs.parquet are"):
    check_stored(student("stored", **prefix), found)
  check_stored(student("stored", **prefix, **{"kd.mrl": True}), found)
  with pytest.raises(ConfigError, match="no training file has its vectors"):
    check_stored(config, prepared({"a.parquet": (scored(16), entry("scored_pairs", 0, ""))}, "no"))


def test_a_file_that_nothing_teaches_is_refused(tmp_path, prepared):
  files = stored(tmp_path, 48) | {"a.parquet": (scored(16), entry("scored_pairs", 0, ""))}
  found = prepared(files)
  check_stored(student("stored"), found)
  with pytest.raises(ConfigError, match=r"a.parquet has no vectors of it, and nothing else to"):
    check_stored(student("stored", **{"losses.contrastive": 0.0}), found)
  texts = {"b.parquet": ({"text": sentences("de")[:20]}, entry("text", 0, ""))}
  with pytest.raises(ConfigError, match=r"b.parquet has no vectors of it, and nothing else to"):
    check_stored(student("stored"), prepared(stored(tmp_path, 48) | texts, "texts"))


def test_unit_vectors_are_no_states(tmp_path, prepared):
  found = prepared(stored(tmp_path, 48, unit=True))
  with pytest.raises(ConfigError, match=r"kd.space: the teacher's vectors of pairs.parquet are u"):
    check_stored(student("stored"), found)
  check_stored(student("stored", **{"kd.space": "unit"}), found)


JUDGE = {"losses.false_negative_score": "teacher", "losses.false_negative_margin": 0.1}


@pytest.mark.parametrize(
  ("keys", "fields", "lacking"),
  [
    (("query", "passage"), {}, None),
    ((), {}, "its texts"),
    (("query", "passage"), {"losses.inbatch_negatives": True}, "negatives"),
    (("query", "passage", "negatives"), {"losses.inbatch_negatives": True}, None),
  ],
)
def test_a_teacher_that_judges_must_know_the_texts(
  tmp_path, prepared, capsys, keys, fields, lacking
):
  shapes = {"query": (16, 48), "passage": (16, 48), "negatives": (16, 2, 48)}
  names = write_vectors(tmp_path, "a", shapes)
  described = entry("retrieval", 2, "")
  all_of_it = described | {"teacher_vectors": names}
  some = described | ({"teacher_vectors": {key: names[key] for key in keys}} if keys else {})
  judge, bystander = student("stored", **JUDGE, **fields), student("stored", **fields)
  found = prepared({"b.parquet": (pairs(16, 2), all_of_it), "a.parquet": (pairs(16, 2), some)})
  if lacking:
    with pytest.raises(ConfigError, match=f"of a.parquet, and has no vectors of {lacking};"):
      check_stored(judge, found)
  else:
    check_stored(judge, found)
  check_stored(bystander, found)
  assert ("a.parquet: no vectors of the teacher" in capsys.readouterr().out) == (not keys)


def test_a_teacher_must_be_pooled_at_the_same_token(workdir, exported, tokenizer):
  other = Tokenizer(tokenizer.path, "<|im_end|>")
  for folder in (workdir, exported):
    with pytest.raises(ConfigError, match=r"pooled token <\|endoftext\|>, the student has"):
      open_teacher(student(folder), other)


def test_a_teacher_without_a_tokenizer_or_a_checkpoint_is_refused(workdir, tmp_path, tokenizer):
  for name, message in (
    ("tokenizer.json", "has no tokenizer.json"),
    ("checkpoints", "no finished"),
  ):
    folder = tmp_path / name
    shutil.copytree(workdir, folder, ignore=shutil.ignore_patterns(name))
    with pytest.raises(ConfigError, match=message):
      open_teacher(student(folder), tokenizer)


def test_a_folder_of_something_else_is_no_teacher(workdir, tokenizer):
  with pytest.raises(ConfigError, match=r"checkpoints is neither a workdir \(no run.json\) nor an"):
    open_teacher(student(workdir / "checkpoints"), tokenizer)


def test_a_folder_that_cannot_be_imported_is_refused_at_once(exported, tmp_path, tokenizer):
  folder = tmp_path / "cut"
  shutil.copytree(exported, folder)
  weights = folder / "model.safetensors"
  weights.write_bytes(weights.read_bytes()[:-100])
  with pytest.raises(LoadError, match=r"model.safetensors"):
    open_teacher(student(folder), tokenizer)


def test_a_teacher_that_the_mesh_cannot_split_is_refused(workdir, tokenizer):
  teacher = open_teacher(student(workdir), tokenizer)
  odd = dataclasses.replace(teacher.shape.model, width=66)
  teacher = dataclasses.replace(teacher, shape=dataclasses.replace(teacher.shape, model=odd))
  with pytest.raises(ConfigError, match=r"kd.teacher: .*66 is not a multiple of mesh axes"):
    teacher.abstract(make_mesh(student(workdir)))
