"""The online teacher: any encoder of this project, frozen, its parameters on the same mesh."""

import dataclasses
import pathlib
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int

from mlembed_jax.config_fields import STORED, Config, ModelConfig
from mlembed_jax.data.manifest import TEXT, File
from mlembed_jax.data.store import Split
from mlembed_jax.data.tokenizer import Tokenizer, Vocabulary
from mlembed_jax.data.vocabulary import table_rows
from mlembed_jax.errors import ConfigError, LoadError
from mlembed_jax.hf import own_file, recipe
from mlembed_jax.hf.folder import HUB, check_folder, ids_of_tokens, read_model, resolve
from mlembed_jax.hf.load import load_params
from mlembed_jax.hf.recipe import Recipe
from mlembed_jax.matryoshka import axes_of
from mlembed_jax.models.encoder import abstract_params, parameter_shapes
from mlembed_jax.objective.distillation import match_exits
from mlembed_jax.parallel import processes
from mlembed_jax.parallel.sharding import shardings
from mlembed_jax.training import frozen, saved
from mlembed_jax.training.train_step import TeacherShape
from mlembed_jax.workdir import RUN, Run

TEACHER = "teacher"  # what its checkpoint is held for


@dataclasses.dataclass(frozen=True)
class Teacher:
  """An opened teacher; its weights are not read yet."""

  path: pathlib.Path
  shape: TeacherShape
  step: int | None  # of the checkpoint; None: a folder in Hugging Face layout
  version: str  # of the weights: another one is another run
  rows: int  # of its token table
  ids: Int[np.ndarray, "K"] | None  # of its tokens that the student has; None: all

  def abstract(self, mesh: Mesh) -> Any:
    """Returns the weights as shapes with shardings.

    They are held in the compute dtype, for they are never updated, and split like any others.

    Raises:
      ConfigError: the mesh cannot split them.
    """
    model = self.shape.model
    try:
      layout = shardings(abstract_params(model), mesh)
    except ValueError as error:  # a size that the mesh cannot split
      raise ConfigError(f"kd.teacher: {self.path}: {error}") from error
    return jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, model.dtype, sharding=s),
      parameter_shapes(model),
      layout,
    )

  def params(self, mesh: Mesh) -> Any:
    """Returns the weights, read from the folder."""
    model = self.shape.model
    abstract = self.abstract(mesh)
    if self.step is None:
      return load_params(self.path, model, abstract, self.ids)
    run = Run.load(self.path)
    params = frozen.merged(run.config.model, saved.load_params(self.path, self.step))
    saved.release(self.path, self.step, TEACHER)
    if self.ids is not None:
      params["table"] = table_rows(params["table"], self.ids, model.vocab)
    cast = jax.tree.map(lambda x, like: np.asarray(x, like.dtype), params, abstract)
    return processes.place(cast, jax.tree.map(lambda x: x.sharding, abstract))


def open_teacher(config: Config, tokenizer: Tokenizer) -> Teacher | None:
  """Returns the online teacher of `kd.teacher`, None where there is none.

  Raises:
    ConfigError: it is no encoder, narrower than the student, of another vocabulary or pooled token,
      or its exits do not fit.
    LoadError: a folder that cannot be imported, or whose texts become vectors in another way than
      those of the run.
  """
  if config.kd.teacher in ("", STORED):
    return None
  path = pathlib.Path(config.kd.teacher)
  if config.kd.teacher.startswith(HUB):
    path = resolve(config.kd.teacher)
  if not path.is_dir():
    raise ConfigError(
      f"kd.teacher: {path} is no folder; give a workdir, an exported folder, one that python -m "
      f"mlembed_jax.teach wrote, {HUB}ORG/NAME, or {STORED!r}"
    )
  is_workdir = (path / RUN).is_file()
  if not is_workdir and not (path / "config.json").is_file():
    raise ConfigError(
      f"kd.teacher: {path} is neither a workdir (no run.json) nor an exported folder (no "
      "config.json), nor one that python -m mlembed_jax.teach wrote (no taught.json). If "
      f"sentence-transformers loads it, write its vectors first: python -m mlembed_jax.teach "
      f"--teacher {path} --dataset {config.data.dataset} --out TAUGHT"
    )
  found = _from_workdir(path) if is_workdir else _from_folder(path)
  model = dataclasses.replace(found.model, dtype=config.model.dtype, attention="auto", remat="none")
  _check_width(config, model.width, config.kd.teacher)
  _check_mrl(config, found.mrl, str(path))
  ids = _token_ids(path, found, tokenizer)
  if not is_workdir:
    check_folder(path, model, tokenizer)
  if ids is not None:
    model = dataclasses.replace(model, vocab=config.model.vocab)
  shape = TeacherShape(model, _matched(config, model, found.exits))
  return Teacher(path, shape, found.step, found.version, found.model.vocab, ids)


def check_stored(config: Config, split: Split) -> None:
  """Raises ConfigError where vectors of texts on disk cannot be the teacher of this run."""
  if config.kd.exits:
    raise ConfigError(f"kd.exits: {config.kd.exits}, but vectors on disk are those of no exit")
  shapes = {file.name: split.vectors_shape(file) for file in split.files}
  if not any(shapes.values()):
    raise ConfigError(f"kd.teacher: {config.kd.teacher!r}, but no training file has its vectors")
  for file in split.files:
    shape = shapes[file.name]
    _check_judged(config, file, shape[0] if shape else 0)
    if not shape:
      _check_untaught(config, file)
      print(f"{file.name}: no vectors of the teacher; it is trained without one", flush=True)
      continue
    _check_width(config, shape[1], file.name)
    _check_mrl(config, False, f"the teacher's vectors of {file.name}")
    if config.kd.weight and not (config.kd.projection or config.kd.mrl):
      _say_cut(config, shape[1], file.name)
    _check_norms(config, split, file)


def _say_cut(config: Config, width: int, name: str) -> None:
  if width > config.model.width:
    print(
      f"note: {name}: the first {config.model.width} of the teacher's {width} coordinates are "
      "learnt, which says something of teachers that were trained so alone (kd.mrl); "
      "kd.projection learns a map to all of them",
      flush=True,
    )


def _check_untaught(config: Config, file: File) -> None:
  if file.entry["task_type"] == TEXT or not config.losses.contrastive:
    raise ConfigError(
      f"kd.teacher: {file.name} has no vectors of it, and nothing else to learn from; write them "
      "(python -m mlembed_jax.teach), or leave the file out of data.train"
    )


def _check_judged(config: Config, file: File, known: int) -> None:
  """Raises ConfigError where the teacher judges texts of which it has no vector.

  It has those of the first `known` texts of a row.
  """
  task, needed = config.losses.task(file.entry["task_type"]), 1 + file.positives
  if config.losses.false_negative_score != "teacher" or not task or not task.inbatch:
    return
  if config.losses.inbatch_negatives and min(file.negatives, task.negatives):
    needed += file.negatives
  if known < needed:
    lacking = "negatives" if known else "its texts"
    raise ConfigError(
      f"losses.false_negative_score: the teacher judges the texts of {file.name}, and has no "
      f"vectors of {lacking}; store them, or set it to 'own'"
    )


def _check_norms(config: Config, split: Split, file: File) -> None:
  """Raises ConfigError where vectors of unit length are to be learned as final-norm states.

  States have coordinates of about 1; unit vectors would shrink those of the student.
  """
  queries = split.first_queries(file, 100).astype(np.float32)
  norms = np.linalg.norm(queries, axis=-1)
  if config.kd.space == "raw" and config.kd.weight and np.all(np.abs(norms - 1) < 0.01):
    raise ConfigError(
      f"kd.space: the teacher's vectors of {file.name} are unit vectors, not states; use 'unit'"
    )


@dataclasses.dataclass(frozen=True)
class _Found:
  """The shape, exits and version of a teacher, as its folder states them."""

  model: ModelConfig
  exits: tuple[int, ...]
  pooled_token: str | None  # None: no embedding model
  version: str
  mrl: bool  # leading coordinates are embeddings by themselves
  step: int | None = None


def _from_workdir(path: pathlib.Path) -> _Found:
  config = Run.load(path).config
  saved.check_frozen(path, config)
  # It is held until its weights are read, minutes later, and at no time in between is it not.
  step, _ = saved.read_newest(path, lambda found: saved.hold(path, found, TEACHER))
  axes = axes_of(config.model, config.matryoshka)
  mrl, token = len(axes.dims) > 1, config.data.pooled_token
  return _Found(frozen.base_model(config.model), axes.exits, token, f"step {step}", mrl, step)


def _from_folder(path: pathlib.Path) -> _Found:
  model, version = read_model(path), _weights_version(path)
  own, end = own_file.read(path), None
  if recipe.is_embedder(path):
    end = _checked(path, recipe.read(path)).tokenizer.end
  mrl = recipe.is_mrl(path)
  if not own:
    return _Found(model, (model.layers,), end, version, mrl)
  trained = tuple(e for e in own.exits.trained if e <= model.layers)
  return _Found(model, trained or (model.layers,), own.pooling.token, version, mrl)


def _checked(path: pathlib.Path, found: Recipe) -> Recipe:
  """Returns the recipe of a teacher; raises LoadError where the run would not follow it."""
  problems = recipe.training_problems(found)
  if found.default_prompt:
    problems.append(f"it puts {found.default_prompt!r} before every text; the run does not")
  if problems:
    raise LoadError(
      f"kd.teacher: {path}: {'; '.join(problems)}. Encode the data with it, and set kd.teacher to "
      f"{STORED!r}"
    )
  return found


def _weights_version(path: pathlib.Path) -> str:
  """Returns names and sizes of the weights: hashing gigabytes at each start would take minutes."""
  files = sorted(path.glob("*.safetensors"))
  return ", ".join(f"{file.name} {file.stat().st_size}" for file in files)


def _check_width(config: Config, width: int, name: str) -> None:
  kd = config.kd
  if kd.projection and width != kd.projection:
    raise ConfigError(
      f"kd.projection: {kd.projection}, but {name} gives {width} dims; set it to {width}"
    )
  if (kd.prefix or (kd.weight and not kd.projection)) and width < config.model.width:
    raise ConfigError(
      f"kd.teacher: {name} gives {width} dims, fewer than model.width = {config.model.width}; take "
      f"a teacher that is at least as wide, let a map be learnt (kd.projection = {width}, with "
      "kd.prefix 0), or learn its similarities alone (kd.similarity, with kd.weight and kd.prefix "
      "0)"
    )


def _check_mrl(config: Config, stated: bool, name: str) -> None:
  if config.kd.prefix and not (stated or config.kd.mrl):
    raise ConfigError(
      f"kd.prefix: nothing says that leading coordinates of {name} are embeddings by themselves; "
      "learn its similarities at every dimension (kd.similarity, with kd.prefix 0), or set kd.mrl "
      "if you know that it was trained so"
    )


def _token_ids(
  path: pathlib.Path, found: _Found, tokenizer: Tokenizer
) -> Int[np.ndarray, "K"] | None:
  """Returns the teacher's ids of the student's tokens, None where they are the same.

  It is pooled at the student's pooled token.

  Raises:
    ConfigError: the teacher cannot read the student's tokens.
  """
  other = path / "tokenizer.json"
  if not other.is_file():
    raise ConfigError(f"kd.teacher: {path} has no tokenizer.json to compare with the student's")
  if found.pooled_token not in (None, tokenizer.pooled_token):
    raise ConfigError(
      f"kd.teacher: {path} was trained with the pooled token {found.pooled_token}, the student has "
      f"data.pooled_token = {tokenizer.pooled_token}; the two must be the same"
    )
  if Tokenizer(other, tokenizer.pooled_token).vocabulary != tokenizer.vocabulary:
    return _ids_by_name(path, tokenizer)
  if found.model.vocab < tokenizer.size:
    raise ConfigError(
      f"kd.teacher: {path} has {found.model.vocab} token rows, fewer than the {tokenizer.size} "
      f"tokens of {tokenizer.path}"
    )
  return None


def _ids_by_name(path: pathlib.Path, tokenizer: Tokenizer) -> Int[np.ndarray, "K"]:
  """Returns the teacher's ids of a vocabulary that is a part of its own; raises ConfigError."""
  known = Vocabulary(path / "tokenizer.json").vocabulary
  if added := [token for token in tokenizer.vocabulary if token not in known]:
    raise ConfigError(
      f"kd.teacher: {path / 'tokenizer.json'} is another vocabulary than {tokenizer.path}, as it "
      f"lacks {added[0]!r}; encode the data with it, and set kd.teacher to {STORED!r}"
    )
  ids = ids_of_tokens(path, tokenizer)
  return np.arange(tokenizer.size) if ids is None else ids


def _matched(config: Config, model: ModelConfig, trained: tuple[int, ...]) -> tuple[int, ...]:
  exits = config.kd.exits or trained
  if exits[-1] > model.layers:
    raise ConfigError(f"kd.exits: {exits[-1]} is beyond the teacher's {model.layers} layers")
  student = axes_of(config.model, config.matryoshka).exits
  try:
    return match_exits(student, config.model.layers, exits, model.layers, config.kd.match)
  except ValueError as error:
    raise ConfigError(str(error)) from error
