"""Any embedder as a teacher: what it puts before texts, and its vectors, part by part."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from mlembed_jax import files, progress
from mlembed_jax.data.taught import NAME, REMEDY, Taught, damage, numbers
from mlembed_jax.data.to_teach import Texts, ToTeach
from mlembed_jax.errors import ConfigError, DataError, LoadError
from mlembed_jax.vector_parts import Parts, digest_of_texts, parts_of

if TYPE_CHECKING:
  from mlembed_jax.inference import Encoder

AT_ONCE = 1024  # texts that the embedder is given in one call, after which the bar moves
DOCUMENT_PROMPTS = ("document", "passage", "corpus")  # names of the prompt of documents


@dataclasses.dataclass(frozen=True)
class Model:
  """An embedder, and what it puts before texts."""

  name: str
  version: str  # digest of its files; of a name of the Hub, its commit
  prompts: dict[str, str]
  encode: Callable[[list[str], str], np.ndarray]  # of texts after a prompt

  def prompt(self, *names: str) -> str:
    """Returns the first prompt of these names that is not empty, "" where there is none."""
    return next(filter(None, (self.prompts.get(name) for name in names)), "")


def load_model(name: str) -> Model:
  """Returns the embedder: read by this package, else by sentence-transformers.

  Raises:
    LoadError: neither reads it.
  """
  from mlembed_jax.inference import Encoder

  try:
    return _ours(name, Encoder.load(name))
  except LoadError as error:
    return _theirs(name, error)


def _ours(name: str, encoder: Encoder) -> Model:
  return Model(
    name,
    _version(encoder.folder),
    encoder.prompts,
    lambda texts, prompt: encoder.encode(texts, prompt=prompt),
  )


def _theirs(name: str, refused: LoadError) -> Model:
  why = str(refused).splitlines()[-1].rstrip(".") + "."
  try:
    from sentence_transformers import SentenceTransformer  # an extra of the package
  except ImportError as error:
    raise LoadError(
      f'--teacher: {why} sentence-transformers may read it: pip install "mlembed_jax[teach]"'
    ) from error
  path = pathlib.Path(name.removeprefix("hf:"))
  try:
    model = SentenceTransformer(str(path))
  except Exception as error:  # of transformers, torch, the Hub
    raise LoadError(f"--teacher: {why} Nor does sentence-transformers read it: {error}") from error
  print(f"{name} is encoded by sentence-transformers, as this package does not: {why}", flush=True)
  return Model(
    name,
    _version(path) if path.is_dir() else _commit(model),
    {key: prompt or "" for key, prompt in model.prompts.items()},
    lambda texts, prompt: np.asarray(model.encode(texts, prompt=prompt, show_progress_bar=False)),
  )


def _version(folder: pathlib.Path) -> str:
  """Returns a digest of the files of a folder but hidden ones: minutes beside days of embedding."""
  found = files.digests(folder)
  return digest_of_texts(*(f"{k} {v}" for k, v in found.items() if "/." not in f"/{k}"))


def _commit(model: Any) -> str:
  """Returns the commit of a model of the Hub, "" where its first module does not know it."""
  config = getattr(getattr(model[0], "auto_model", None), "config", None)
  return getattr(config, "_commit_hash", None) or ""


def encode_all(
  model: Model, texts: Texts, planned: ToTeach, parts: Parts, size: int
) -> list[pathlib.Path]:
  """Returns the files of the vectors of all texts, `size` each, of which some may be there."""
  made, origin = [], json.dumps([model.name, model.version])
  with progress.count("embedding", len(planned.sources), " texts") as bar:
    for start in range(0, len(planned.sources), size):
      chosen = slice(start, start + size)
      read = texts.read([texts.source(int(place)) for place in planned.sources[chosen]])
      before = [planned.before[number] for number in planned.prompts[chosen]]
      name = f"{len(made):08d}-{digest_of_texts(origin, *before, *read)}"
      if (file := parts.find(name)) is None:
        file = parts.save(name, numbers(_vectors(model, read, before, bar.update), read))
      else:
        bar.update(len(read))
      made.append(file)
  return made


def _vectors(
  model: Model, texts: list[str], before: list[str], update: Callable[[int], object]
) -> np.ndarray:
  """Returns the vectors of a part, the texts of each prompt together."""
  found: list[np.ndarray] = [np.zeros(0)] * len(texts)
  for prompt in dict.fromkeys(before):
    places = [i for i, each in enumerate(before) if each == prompt]
    for chosen in parts_of(places, AT_ONCE):
      vectors = model.encode([texts[i] for i in chosen], prompt)
      for i, vector in zip(chosen, vectors, strict=True):
        found[i] = vector
      update(len(chosen))
  return np.stack(found)


def is_complete(out: pathlib.Path, wanted: Taught) -> bool:
  """Returns whether the folder is complete already; raises ConfigError where it is of others."""
  if not out.exists():
    return False
  if not (out / NAME).is_file():
    raise ConfigError(f"--out: {out} exists, and {NAME} is not in it; name another folder")
  found = Taught.load(out)
  if dataclasses.replace(found, files={}) != wanted:
    raise ConfigError(f"--out: {out} holds other vectors; name another folder, or remove it")
  if wrong := damage(out, found, quick=False):
    raise DataError(f"--out: {out}: {wrong}; {REMEDY}")
  return True
