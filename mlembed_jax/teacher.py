"""The online teacher: any encoder of this project, frozen, its parameters on the same mesh."""

import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from mlembed_jax import checkpoint
from mlembed_jax.config import Config, ConfigError, ModelConfig
from mlembed_jax.data.sources import Dataset
from mlembed_jax.data.tokenizer import Tokenizer
from mlembed_jax.distillation import match_exits
from mlembed_jax.hf.load import load_params, read_model
from mlembed_jax.matryoshka import plan
from mlembed_jax.models.encoder import abstract_params, parameter_shapes
from mlembed_jax.sharding import shardings
from mlembed_jax.train_step import TeacherShape
from mlembed_jax.workdir import Run

STORED = "stored"  # kd.teacher: vectors beside the data, read with each batch


@dataclasses.dataclass(frozen=True)
class Teacher:
  """An opened teacher; its weights are not read yet."""

  path: pathlib.Path
  shape: TeacherShape
  is_workdir: bool

  def abstract(self, mesh: Mesh) -> Any:
    """Returns the weights as shapes with shardings.

    They are held in the compute dtype, for they are never updated, and split like any others.
    """
    model = self.shape.model
    return jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, model.dtype, sharding=s),
      parameter_shapes(model),
      shardings(abstract_params(model), mesh),
    )

  def params(self, mesh: Mesh) -> Any:
    """Returns the weights, read from the folder."""
    model = self.shape.model
    if self.is_workdir:
      _, params = checkpoint.load_params(self.path, model)
    else:
      params = load_params(self.path, model)
    return jax.tree.map(
      lambda x, like: jax.device_put(np.asarray(x, like.dtype), like.sharding),
      params,
      self.abstract(mesh),
    )


def open_teacher(config: Config, tokenizer: Tokenizer) -> Teacher | None:
  """Returns the online teacher of `kd.teacher`, None where there is none.

  Raises:
    ConfigError: it is no encoder, narrower than the student, of another vocabulary, or its exits
      do not fit.
  """
  if config.kd.teacher in ("", STORED):
    return None
  path = pathlib.Path(config.kd.teacher)
  if not path.is_dir():
    raise ConfigError(
      f"kd.teacher: {path} is no folder; give a workdir, an exported folder, or {STORED!r}"
    )
  is_workdir = (path / "run.json").is_file()
  model, exits = _from_workdir(path) if is_workdir else _from_folder(path)
  model = dataclasses.replace(model, dtype=config.model.dtype, remat="none")
  _check_width(config, model.width, config.kd.teacher)
  _check_tokenizer(path, model, tokenizer)
  return Teacher(path, TeacherShape(model, _matched(config, model, exits)), is_workdir)


def check_stored(config: Config, datasets: Sequence[Dataset]) -> None:
  """Raises ConfigError where the vectors beside the data cannot be the teacher of this run."""
  stored = {d.name: d.vectors for d in datasets if d.vectors}
  if not stored:
    raise ConfigError(f"kd.teacher: {STORED!r}, but no training file has teacher_vectors")
  for name, vectors in stored.items():
    _check_width(config, vectors["query"].width, name)
    judged = config.losses.false_negative_score == "teacher" and config.losses.inbatch_negatives
    if judged and "negatives" not in vectors:
      raise ConfigError(
        f"losses.inbatch_negatives: the teacher judges them, but teacher_vectors of {name} has no "
        "negatives; store them, or set losses.false_negative_score to 'own'"
      )


def _from_workdir(path: pathlib.Path) -> tuple[ModelConfig, tuple[int, ...]]:
  config = Run.load(path).config
  return config.model, plan(config.model, config.matryoshka).exits


def _from_folder(path: pathlib.Path) -> tuple[ModelConfig, tuple[int, ...]]:
  model = read_model(path)
  ours = path / "mlembed.json"
  trained = (
    json.loads(ours.read_text(encoding="utf-8"))["exits"]["trained"] if ours.is_file() else ()
  )
  return model, tuple(e for e in trained if e <= model.layers) or (model.layers,)


def _check_width(config: Config, width: int, name: str) -> None:
  if width < config.model.width:
    raise ConfigError(
      f"kd.teacher: {name} gives {width} dims, fewer than model.width = "
      f"{config.model.width}; take a teacher that is at least as wide"
    )


def _check_tokenizer(path: pathlib.Path, model: ModelConfig, tokenizer: Tokenizer) -> None:
  """Both must give every text the same ids: what a tokenizer.json says of a vocabulary decides."""
  other = path / "tokenizer.json"
  if (
    other.is_file() and Tokenizer(other, tokenizer.pooled_token).vocabulary != tokenizer.vocabulary
  ):
    raise ConfigError(
      f"kd.teacher: {other} is another vocabulary than {tokenizer.path}; an online teacher reads "
      f"the student's token ids. Encode the data with it and set kd.teacher to {STORED!r}"
    )
  if model.vocab < tokenizer.size:
    raise ConfigError(
      f"kd.teacher: {path} has {model.vocab} token rows, fewer than the {tokenizer.size} tokens of "
      f"{tokenizer.path}"
    )


def _matched(config: Config, model: ModelConfig, trained: tuple[int, ...]) -> tuple[int, ...]:
  exits = config.kd.exits or trained
  if exits[-1] > model.layers:
    raise ConfigError(f"kd.exits: {exits[-1]} is beyond the teacher's {model.layers} layers")
  student = plan(config.model, config.matryoshka).exits
  try:
    return match_exits(student, config.model.layers, exits, model.layers, config.kd.match)
  except ValueError as error:
    raise ConfigError(str(error)) from error
