"""Everything a run reads, opened and checked before any long work, and the plan of its batches."""

import dataclasses
import functools
import os
import pathlib
import shutil
from typing import Any

import numpy as np
from jaxtyping import Int

from mlembed_jax.batch import Kind
from mlembed_jax.config_fields import STORED, Config, DataConfig
from mlembed_jax.data import (
  catalog,
  languages,
  loader,
  manifest,
  mixture,
  plan_report,
  prepare,
  quickstart,
)
from mlembed_jax.data.catalog import Catalog
from mlembed_jax.data.manifest import TEXT
from mlembed_jax.data.names import MANIFEST, TOKENIZER
from mlembed_jax.data.plan import Plan
from mlembed_jax.data.records import TRAIN
from mlembed_jax.data.store import Split, open_split
from mlembed_jax.data.taught import open_taught
from mlembed_jax.data.tokenizer import Tokenizer
from mlembed_jax.data.vocabulary import padded_rows
from mlembed_jax.errors import ConfigError, DataError, LoadError
from mlembed_jax.eval import tasks
from mlembed_jax.files import write_json
from mlembed_jax.hf import recipe
from mlembed_jax.hf.file_names import MODULES
from mlembed_jax.hf.folder import check_folder, resolve
from mlembed_jax.parallel import processes
from mlembed_jax.training import frozen
from mlembed_jax.training.saved import steps_of
from mlembed_jax.training.teacher import Teacher, check_stored, open_teacher
from mlembed_jax.workdir import Run

PLAN = "plan.json"


@dataclasses.dataclass(frozen=True)
class Inputs:
  """Everything a run reads."""

  split: Split  # training rows
  plan: Plan
  options: loader.Options
  tokenizer: Tokenizer
  tasks: list[tasks.HeldoutTask]
  teacher: Teacher | None
  prompts: dict[str, str] | None  # of the embedder that training starts from; None: it does not

  @property
  def teacher_version(self) -> str:
    """What decides the teacher's states or vectors; "" where the dataset has them or nobody."""
    if self.teacher:
      return self.teacher.version
    return self.split.taught.version if self.split.taught else ""

  @functools.cached_property
  def _kinds(self) -> dict[str, Kind]:
    return loader.kinds(self.split, self.tokenizer, self.options)

  @property
  def kinds(self) -> list[Kind]:
    """The kinds of batches there are; one program is compiled for each."""
    return list(dict.fromkeys(self._kinds.values()))

  @property
  def used_negatives(self) -> dict[str, float]:
    """Share of the stored negatives that a step uses, by file."""
    return {f.name: self._kinds[f.name].negatives / max(1, f.negatives) for f in self.split.files}

  @property
  def tokens_per_step(self) -> float:
    """Tokens of a step, the mean over an epoch, without instructions and end tokens."""
    files = plan_report.lines(self.plan, lambda unit: unit.file, 1.0, self.used_negatives)
    return sum(line.tokens for line in files) / self.plan.order().steps_per_epoch


def load(config: Config, workdir: pathlib.Path) -> Inputs:
  """Returns the opened files, built first where `data.builder` says so.

  Raises:
    ConfigError, DataError, LoadError: a setting, a file, a tokenizer or a folder cannot be used.
  """
  frozen.trained_paths(config)  # what the patterns name is checked before any work
  data = _built(config, workdir) if config.data.builder else config.data
  opened = catalog.load_catalog(pathlib.Path(data.dataset))
  tokenizer = Tokenizer(opened.tokenizer, data.pooled_token)
  if tokenizer.size > config.model.vocab:
    raise ConfigError(
      f"model.vocab: {config.model.vocab} rows are fewer than the {tokenizer.size} tokens of "
      f"{tokenizer.path}"
    )
  if not tokenizer.pooled_is_added:
    raise ConfigError(
      f"data.pooled_token: {tokenizer.path} has {data.pooled_token!r} outside of added_tokens, so "
      "readers of an export would split texts in another way; prepare the data with a tokenizer "
      "that has it there, or with another pooled token"
    )
  prompts = None
  if config.train.init_from and not steps_of(workdir):  # else weights come from a checkpoint
    start = resolve(config.train.init_from)
    check_start(start, config, tokenizer)
    prompts = recipe.stated_prompts(start)
  named = config.kd.teacher not in ("", STORED)
  taught = open_taught(pathlib.Path(config.kd.teacher), opened) if named else None
  teacher = None if taught else open_teacher(config, tokenizer)
  opened = _instructed(opened, data.instructions)
  chosen = manifest.matching(opened.files, data.train, "data.train", opened.folder)
  names = [name for name in opened.files if name in chosen]
  split = open_split(opened, TRAIN, names, data.language_key, taught)
  _check_lengths(data.lengths, opened, split)
  _check_taught(config, split)
  if taught or config.kd.teacher == STORED:
    check_stored(config, split)
  heldout = (
    manifest.select_heldout(data.manifest, data.heldout, "data.heldout") if data.heldout else []
  )
  return Inputs(
    split=split,
    plan=make_plan(config, split, opened.fingerprint),
    options=_options(config, taught is not None or config.kd.teacher == STORED),
    tokenizer=tokenizer,
    tasks=[tasks.load_task(file, data.language_key) for file in heldout],
    teacher=teacher,
    prompts=prompts,
  )


def _check_taught(config: Config, split: Split) -> None:
  """Raises ConfigError where the run learns nothing from a file."""
  alone = [file.name for file in split.files if file.entry["task_type"] == TEXT]
  if alone and not (config.kd.teacher and config.kd.learns):
    raise ConfigError(
      f"data.train: {alone[0]} has texts alone, of which only a teacher says something; name one "
      "in kd.teacher, or leave the file out"
    )


def check_start(
  folder: pathlib.Path, config: Config, tokenizer: Tokenizer
) -> Int[np.ndarray, "K"] | None:
  """Returns the rows of a folder's token table that training starts from, None for all.

  Raises:
    ConfigError: these are fewer than `model.vocab` says.
    LoadError: training cannot start from the folder, or would do otherwise than it.
  """
  if recipe.is_embedder(folder) and (problems := recipe.training_problems(recipe.read(folder))):
    raise LoadError(
      f"train.init_from: {folder}: {'; '.join(problems)}. To start from its weights all the same, "
      f"take a copy of the folder without {MODULES}"
    )
  ids = check_folder(folder, config.model, tokenizer)
  if ids is not None and config.model.vocab > (rows := padded_rows(len(ids))):
    raise ConfigError(
      f"model.vocab: {config.model.vocab} rows, and {tokenizer.path} keeps {len(ids)} tokens of "
      f"{folder}; set it to {rows}"
    )
  return ids


def _built(config: Config, workdir: pathlib.Path) -> DataConfig:
  """Returns where the data lies that the builder wrote."""
  folder = workdir / "data"
  text = folder / "text" / MANIFEST
  processes.on_first(lambda: _build(config, workdir, folder))
  return dataclasses.replace(config.data, dataset=str(folder / "dataset"), manifest=str(text))


def _build(config: Config, workdir: pathlib.Path, folder: pathlib.Path) -> None:
  """Writes text and dataset; a run under way keeps those that it began with."""
  vocab, seed = config.model.vocab, config.train.seed
  if not quickstart.is_built(folder / "text", vocab_size=vocab, seed=seed):
    if steps_of(workdir):
      print(f"{folder}: packages have changed; the run goes on with its own text", flush=True)
      return
    shutil.rmtree(folder / "dataset", ignore_errors=True)  # of other text
  print(f"collecting the text of installed packages in {folder}", flush=True)
  quickstart.build(folder / "text", vocab_size=vocab, seed=seed)
  text = folder / "text" / MANIFEST
  files = manifest.select(str(text), ("train/*",), "data.train")
  tokenizer = Tokenizer(folder / "text" / TOKENIZER, config.data.pooled_token)
  job = prepare.Job(
    prepare.make_recipe(files, tokenizer, max_tokens=config.data.lengths[-1]),
    folder / "dataset",
    tokenizer.path,
    config.data.pooled_token,
  )
  prepare.prepare_dataset(job, processes=os.cpu_count() or 1, max_dropped_share=0.0)


def _instructed(opened: Catalog, path: str) -> Catalog:
  """Returns the catalog with the instructions of a JSON file, if there is one."""
  if not path:
    return opened
  given, files = manifest.read_manifest(path), dict(opened.files)
  for name, instruction in given.items():
    if name not in files or not isinstance(instruction, str):
      problem = "is no file of the dataset" if name not in files else "is given no text"
      raise DataError(f"data.instructions: {path}: {name!r} {problem}")
    entry = files[name].entry | {"instruction": instruction}
    files[name] = dataclasses.replace(files[name], entry=entry)
  return dataclasses.replace(opened, files=files)


def _check_lengths(lengths: tuple[int, ...], opened: Catalog, split: Split) -> None:
  longest = max(split.longest(file) for file in split.files)
  if lengths[-1] - 1 > opened.max_tokens <= longest:
    raise ConfigError(
      f"data.lengths: {lengths[-1]} asks for more than the {opened.max_tokens} tokens that "
      f"{opened.folder} holds of its longest texts; prepare it with --max_tokens {lengths[-1] - 1}"
    )


def make_plan(config: Config, split: Split, fingerprint: str) -> Plan:
  """Returns how often the rows of each file and language come.

  Raises:
    DataError: a file has fewer rows than one batch, and batches are not completed.
  """
  data = config.data
  per_epoch = mixture.per_epoch(
    split.units,
    max_rows=data.max_rows,
    size_exponent=data.size_exponent,
    language_temperature=data.language_temperature,
    max_repeats=data.max_repeats,
  )
  made = Plan(
    split.files,
    split.units,
    per_epoch,
    data.global_batch,
    config.train.seed,
    fingerprint,
    data.complete_batches,
  )
  if small := made.small_files():
    raise DataError(
      f"{small[0]}: an epoch has fewer of its rows than data.global_batch = {data.global_batch}; "
      "lower it, set data.complete_batches, or leave the file out of data.train"
    )
  return made


def _options(config: Config, teacher_vectors: bool) -> loader.Options:
  data, contrastive = config.data, config.losses.contrastive_tasks()
  return loader.Options(
    negatives={name: settings.negatives for name, settings in contrastive.items()},
    inbatch={name: settings.inbatch for name, settings in contrastive.items()},
    query_instructions=data.query_instructions,
    document_instructions=data.document_instructions,
    teacher_vectors=teacher_vectors,
    lengths=data.lengths,
    packing=data.packing,
    batch_size=data.global_batch,
    seed=config.train.seed,
  )


def steps(config: Config, inputs: Inputs) -> int:
  """Returns the updates of the run.

  Raises:
    ConfigError: the warm-up is longer than the run.
  """
  per_epoch = inputs.plan.order().steps_per_epoch
  found = config.train.steps or max(1, round(config.train.epochs * per_epoch))
  if config.optimizer.warmup_steps > found:
    raise ConfigError(
      f"optimizer.warmup_steps: {config.optimizer.warmup_steps} is longer than the run, "
      f"{found} steps; lower it, or raise train.steps or train.epochs"
    )
  return found


def describe(config: Config, inputs: Inputs) -> Run:
  """Returns what the workdir records of this run."""
  entries = {file.name: file.entry for file in inputs.split.files}
  plan = inputs.plan.as_json() | {"teacher": inputs.teacher_version}
  return Run(config, entries, plan, tokenizer=inputs.tokenizer.fingerprint, prompts=inputs.prompts)


def report(inputs: Inputs, total_steps: int, workdir: pathlib.Path) -> None:
  """Prints what the run will read, and writes it to WORKDIR/plan.json and plan.png."""
  epochs = total_steps / inputs.plan.order().steps_per_epoch
  used = inputs.used_negatives
  files = plan_report.lines(inputs.plan, lambda unit: unit.file, epochs, used)
  by_language = plan_report.lines(inputs.plan, lambda unit: unit.language, epochs, used)
  print(f"\n{total_steps:,} steps, {epochs:.2f} epochs\n")
  tables = plan_report.plan_table("file", files), plan_report.plan_table("language", by_language)
  print(tables[0], "\n", tables[1], "\n", sep="\n")
  if merged := inputs.split.merged:
    print(languages.merges_text(merged), "\n")
  lines: dict[str, Any] = {
    title: [dataclasses.asdict(line) for line in table]
    for title, table in (("files", files), ("languages", by_language))
  }
  write_json(workdir / PLAN, {"steps": total_steps, "epochs": epochs} | lines | {"merged": merged})
  plan_report.picture(workdir / "plan.png", files, by_language)
