"""A trained encoder for use: texts to vectors at any trained depth, rank and dimension.

from mlembed_jax.inference import Encoder

encoder = Encoder.load("exported/folder")
vectors = encoder.encode(["How are you?", "¿Cómo estás?"], prompt_name="query", depth=8, dim=256)
"""

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import warnings
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Float

from mlembed_jax import programs, progress
from mlembed_jax.config_fields import ModelConfig
from mlembed_jax.data.text_files import check_text
from mlembed_jax.devices.start import start_devices
from mlembed_jax.errors import LoadError
from mlembed_jax.hf import factors, own_file, stored_ranges
from mlembed_jax.hf import recipe as recipes
from mlembed_jax.hf.file_names import PROMPTS, TOKENIZER
from mlembed_jax.hf.folder import check_folder, read_model, resolve
from mlembed_jax.hf.load import load_params
from mlembed_jax.hf.recipe import LAST, Recipe
from mlembed_jax.matryoshka import Slice, slice_config, slice_params
from mlembed_jax.models.batched import Batching, encode_batched
from mlembed_jax.models.encoder import parameter_shapes
from mlembed_jax.quantize import LEVELED, Ranges, check_precision, quantize, unit

# Widths of batches: a text is padded by a third at most. Rows follow from the tokens of a batch, so
# there are as many programs.
WIDTHS = tuple(sorted({n * 2**i for n in (8, 12) for i in range(12)}))
# Larger batches are not faster once the device is busy, and cost padding and memory.
BATCH_TOKENS = {"cpu": 2048, "gpu": 65_536, "tpu": 65_536}
DTYPES = {"cpu": "float32", "gpu": "bfloat16", "tpu": "bfloat16"}


@dataclasses.dataclass(frozen=True)
class Sizes:
  """What was trained along each axis, ascending; () where nothing is known of it."""

  depths: tuple[int, ...]
  ranks: tuple[int, ...]
  dims: tuple[int, ...]


class Encoder:
  """A model on all devices of this process."""

  def __init__(self, folder: pathlib.Path, model: ModelConfig, recipe: Recipe, sizes: Sizes):
    """Takes what `load` reads from a folder."""
    self.folder, self.recipe, self.sizes = folder, recipe, sizes
    self.dim, self.prompts = recipe.dim, dict(recipe.prompts)
    self.max_seq_length = min(recipe.max_seq_length or WIDTHS[-1], WIDTHS[-1])
    self.truncated = 0  # texts that were cut to max_seq_length, so far
    self._model = model
    self._mesh = Mesh(np.array(jax.local_devices()), ("data",))
    self._cut = functools.lru_cache(maxsize=2)(self._read_cut)
    self._ranges = functools.cache(lambda: stored_ranges.read(folder))

  @classmethod
  def load(
    cls, path: str | os.PathLike[str], *, dtype: str | None = None, pooled_token: str | None = None
  ) -> "Encoder":
    """Returns the encoder of a folder in Hugging Face layout, or of hf:ORG/NAME.

    Args:
      path: folder, or hf:ORG/NAME.
      dtype: of the computation; None: float32 on CPU, else bfloat16.
      pooled_token: ends every text; needed where the folder does not say which token does.

    Raises:
      LoadError: the folder cannot be imported, does not say what ends a text, says what cannot be
        done here, or has more tokens than rows of the token table.
      DataError: its tokenizer cannot be read.
    """
    folder = resolve(os.fspath(path))
    platform = start_devices()[0].platform
    model = dataclasses.replace(read_model(folder), dtype=dtype or DTYPES[platform])
    recipe = recipes.read(folder, pooled_token)
    if recipe.pooling == LAST and not recipe.tokenizer.after:
      raise LoadError(
        f"{folder}: {TOKENIZER} puts no token after a text; say with pooled_token which one ends it"
      )
    check_folder(folder, model, recipe.tokenizer)  # what is wrong with it is said now
    _keep_programs()
    return cls(folder, model, recipe, _sizes(folder, model, recipe))

  def encode(
    self,
    texts: str | Sequence[str],
    prompt_name: str | None = None,
    prompt: str | None = None,
    depth: int | None = None,
    rank: int | None = None,
    dim: int | None = None,
    normalize: bool | None = None,
    precision: str = "float32",
    untrained: bool = False,
    show_progress_bar: bool = False,
    ranges: Ranges | None = None,
  ) -> np.ndarray:
    """Returns a vector [D] of a text, or [N, D] of a list of them, in their order.

    `prompt`, else the prompt of the folder that `prompt_name` names, else its default prompt if it
    has one, stands before every text.
    `depth` layers, `rank` columns of the token table and `dim` coordinates are used; None: all.
    `normalize`: to unit length; None: where the folder does so, as every export does and a folder
    without modules.json. `precision`: see `quantize`; int8 and uint8 round by `ranges` [2, D], else
    by those of the folder, else by those of at least 100 texts. Texts longer than `max_seq_length`
    are cut, with a warning that counts them.

    Raises:
      DataError: one of the texts is no string, or has half a surrogate pair.
      ValueError: an unknown prompt or precision; a size that the model lacks, or that was not
        trained (allowed with `untrained`); no ranges; a vector that is not finite.
    """
    self.check(depth, rank, dim, untrained)
    listed = [texts] if isinstance(texts, str) else texts
    normalize = self.recipe.normalized if normalize is None else normalize
    if precision not in LEVELED and ranges is not None:
      raise ValueError(f"ranges: vectors in {precision} have none; leave them out")
    if precision in LEVELED and ranges is None and normalize:
      ranges = self.ranges(depth, dim)
    check_precision(precision, len(listed), dim or self.dim, ranges)
    for i, text in enumerate(listed):
      check_text(text, f"texts[{i}] is no text")
    ids = self.ids(listed, self.prompt(prompt_name) if prompt is None else prompt)
    size = depth or self._model.layers
    states = self.states(ids, (size,), depth, rank, show_progress_bar)
    vectors = states[0, :, : dim or self.dim].copy()  # some indexes read a view wrongly
    if normalize:
      vectors = unit(vectors)
    vectors = quantize(vectors, precision, ranges)
    return vectors[0].copy() if isinstance(texts, str) else vectors

  def ranges(self, depth: int | None = None, dim: int | None = None) -> Ranges | None:
    """Returns the ranges [2, D] by which int8 and uint8 vectors of a slice are rounded.

    The export measured them on unit vectors of training texts, at the full rank of the token table;
    they serve every rank. None where it did not, or not of these sizes.

    Raises:
      LoadError: the file of the ranges is damaged.
    """
    return self._ranges().get((depth or self._model.layers, dim or self.dim))

  @property
  def name(self) -> str:
    """The name that the export was given, else that of its folder."""
    own = own_file.read(self.folder)
    return (own and own.name) or self.folder.resolve().name

  @property
  def fingerprint(self) -> str:
    """A hash of the names, sizes and times of the files of the folder."""
    files = sorted(path for path in self.folder.rglob("*") if path.is_file())
    stats = [(str(path.relative_to(self.folder)), path.stat()) for path in files]
    found = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()

  def encode_query(self, texts: str | Sequence[str], **options: Any) -> np.ndarray:
    """Returns the vectors of queries: `encode` with the prompt `query`, or none where it is not."""
    return self.encode(texts, **self._prompted("query", options))

  def encode_document(self, texts: str | Sequence[str], **options: Any) -> np.ndarray:
    """Returns the vectors of documents: as `encode_query`, with the prompt `document`."""
    return self.encode(texts, **self._prompted("document", options))

  @staticmethod
  def similarity(
    first: Float[np.ndarray, "N D"], second: Float[np.ndarray, "M D"]
  ) -> Float[np.ndarray, "N M"]:
    """Returns the cosines of all pairs of float32 vectors, of any length.

    Raises:
      ValueError: the two have other numbers of dimensions.
    """
    first, second = np.atleast_2d(first), np.atleast_2d(second)
    if first.shape[1] != second.shape[1]:
      raise ValueError(
        f"similarity: vectors of {first.shape[1]} and of {second.shape[1]} dimensions; encode both "
        "with the same dim"
      )
    return unit(first) @ unit(second).T

  def _prompted(self, name: str, options: dict[str, Any]) -> dict[str, Any]:
    """Returns options of `encode`; a prompt that they name is kept."""
    if options.get("prompt_name") is None and options.get("prompt") is None:
      return options | {"prompt": self.prompts.get(name, "")}
    return options

  def check(
    self, depth: int | None, rank: int | None, dim: int | None, untrained: bool = False
  ) -> None:
    """Raises ValueError for a size that the model lacks or, unless `untrained`, was not trained."""
    full = {"depth": self._model.layers, "rank": self._most_rank, "dim": self.dim}
    trained = dict(zip(full, (self.sizes.depths, self.sizes.ranks, self.sizes.dims), strict=True))
    for name, size in {"depth": depth, "rank": rank, "dim": dim}.items():
      if size is None or (size == full[name] and type(size) is not bool):
        continue
      if not isinstance(size, int | np.integer) or isinstance(size, bool):
        raise ValueError(f"{name}: {size!r} is no whole number")
      if not 1 <= size <= full[name]:
        most = f"has 1 to {full[name]}" if full[name] else "has a full token table"
        raise ValueError(f"{name}: {size}, but the model {most}")
      if size not in trained[name] and not untrained:
        nearest = sorted(sorted(trained[name], key=lambda t, s=size: abs(t - s))[:3])
        near = f"the nearest are {', '.join(map(str, nearest))}" if nearest else "none was"
        allow = "untrained=True (--untrained) allows it"
        raise ValueError(f"{name}: {size} was not trained; {near}; {allow}")

  def check_similarity(self) -> None:
    """Raises LoadError where the folder compares vectors by another measure than their cosine."""
    if not self.recipe.compares_by_cosine:
      raise LoadError(
        f"{self.folder / PROMPTS}: similarity_fn_name is {self.recipe.similarity!r}; scores are "
        "those of cosines. Evaluate it with sentence-transformers"
      )

  def config(self, depth: int | None = None, rank: int | None = None) -> ModelConfig:
    """Returns the shape of a slice; None keeps the stored size."""
    return slice_config(self._whole_model(bool(rank)), Slice(depth=depth, rank=rank))

  def ids(self, texts: Sequence[str], prompt: str) -> list[list[int]]:
    """Returns the token ids of texts after a prompt; counts those that it cuts, with a warning."""
    tokenizer = self.recipe.tokenizer
    ids = tokenizer.encode([prompt + text for text in texts], self.max_seq_length + 1)
    if empty := [i for i, row in enumerate(ids) if not row]:
      raise ValueError(f"texts[{empty[0]}] has no tokens, and the folder puts none around it")
    cut = [row for row in ids if len(row) > self.max_seq_length]
    if cut:
      self.truncated += len(cut)
      warnings.warn(
        f"{len(cut)} of {len(texts)} texts are cut to {self.max_seq_length} tokens",
        stacklevel=3,
      )
    for row in cut:
      del row[-1 - len(tokenizer.after)]
    return ids

  def states(
    self,
    ids: Sequence[Sequence[int]],
    exits: tuple[int, ...],
    depth: int | None = None,
    rank: int | None = None,
    show_progress_bar: bool = False,
  ) -> Float[np.ndarray, "E N D"]:
    """Returns the pooled states of token ids at each of `exits`, float32, not normalised.

    Modules of the folder after pooling, such as Dense, are applied. One pass gives all exits of a
    folder that pools the last token. Raises ValueError where a state is not finite.
    """
    if self.recipe.pooling != LAST and tuple(exits) != (depth or self._model.layers,):
      passes = [self.states(ids, (e,), e, rank, show_progress_bar) for e in exits]
      return np.concatenate(passes)
    # A cut at full depth would hold all layers a second time.
    model, params = self._cut(None if depth == self._model.layers else depth, rank)
    batching = Batching(
      lengths=WIDTHS,
      rows=lambda width: self._rows(width, len(ids)),
      sharding=NamedSharding(self._mesh, PartitionSpec("data")),
    )
    shown = {"leave": False, "shown": show_progress_bar}
    with progress.count("encoding", len(ids), " texts", **shown) as bar:
      out = encode_batched(model, params, ids, exits, batching, bar.update, self.recipe.pooling)
    programs.note_new()
    if self.recipe.modules:
      out = np.stack([self.recipe.finish(states_ND) for states_ND in out])
    if bad := np.flatnonzero(~np.isfinite(out).all(axis=(0, 2))).tolist():
      raise ValueError(f"texts[{bad[0]}] and {len(bad) - 1} more have vectors that are not finite")
    return out

  def _rows(self, width: int, texts: int) -> int:
    """Returns how many texts of a width make a batch over all devices, of a call with so many.

    A device gets 1, 4, 16 ... texts, so that one text does not cost what a full batch does, and
    there are few programs.
    """
    few, platform = 1, self._mesh.devices.flat[0].platform
    while few * self._mesh.size < texts:
      few *= 4
    return min(few, max(1, BATCH_TOKENS[platform] // width)) * self._mesh.size

  def prompt(self, name: str | None) -> str:
    """Returns the prompt of a name, the default prompt for None; ValueError where it is unknown."""
    if name is not None and name not in self.prompts:
      known = ", ".join(self.prompts) or "none"
      raise ValueError(f"prompt_name: {name!r} is no prompt of {self.folder}; there are: {known}")
    return self.prompts[name] if name is not None else self.recipe.default_prompt

  @property
  def _most_rank(self) -> int:
    return max(self.sizes.ranks, default=0)

  def _read_cut(self, depth: int | None, rank: int | None) -> tuple[ModelConfig, Any]:
    """Returns the model and its parameters, cut, on every device."""
    most = self._most_rank if rank else None
    if (depth, rank) == (None, most):
      model = self._whole_model(bool(rank))
      return model, self._read(model)
    whole = self._cut(None, most)[1]  # read once: ranks share their layers
    return self.config(depth, rank), slice_params(whole, Slice(depth=depth, rank=rank))

  def _whole_model(self, factorised: bool) -> ModelConfig:
    return dataclasses.replace(self._model, rank=self._most_rank) if factorised else self._model

  def _read(self, model: ModelConfig) -> Any:
    everywhere = NamedSharding(self._mesh, PartitionSpec())
    like = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, model.dtype, sharding=everywhere),
      parameter_shapes(model),
    )
    return load_params(self.folder, model, like)


def _keep_programs() -> None:
  """Keeps compiled programs on disk for the next process, unless the caller chose a folder."""
  if not jax.config.values["jax_compilation_cache_dir"]:
    folder = factors.cache_folder() / "compiled"
    if programs.remove_damaged(folder):
      programs.keep(folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def _sizes(folder: pathlib.Path, model: ModelConfig, recipe: Recipe) -> Sizes:
  """Returns what mlembed.json says; other folders were trained in full, at dims of config.json."""
  if not (own := own_file.read(folder)):
    # What Dense makes of states has other coordinates than those that config.json speaks of.
    dims = (recipe.dim,) if recipe.modules else recipes.dims_of_others(folder, recipe.dim)
    return Sizes((model.layers,), (), dims)
  most = own.table.rank_exported if own.table.uv_file or own.table.form == "uv" else None
  return Sizes(
    depths=tuple(depth for depth in own.exits.trained if depth <= model.layers),
    ranks=tuple(rank for rank in own.table.ranks if rank <= (most or 0)),
    dims=tuple(dim for dim in own.dims.trained if dim <= own.dims.exported),
  )
