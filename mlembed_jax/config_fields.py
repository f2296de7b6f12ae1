"""Names and types of a run's configuration; values and their meaning stand in configs/base.py.

This module knows no other module of the package.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """Shape and numerics of one encoder."""

  vocab: int
  width: int
  layers: int
  ffn: int
  heads: int
  kv_heads: int
  head_dim: int
  rank: int
  rope_theta: float
  norm_eps: float
  qk_norm: bool
  qkv_bias: bool
  dtype: str
  attention: str
  remat: str


@dataclasses.dataclass(frozen=True)
class MatryoshkaConfig:
  """What is trained along each of the three axes; an empty tuple asks for the default set."""

  dims: tuple[int, ...]
  exits: tuple[int, ...]
  ranks: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class TaskConfig:
  """What the contrastive terms do with one task type."""

  temperature: float
  final_temperature: float
  negatives: int
  inbatch: bool
  symmetric: bool


@dataclasses.dataclass(frozen=True)
class ScoredConfig:
  """What the ranking term does with scored pairs."""

  temperature: float
  final_temperature: float


@dataclasses.dataclass(frozen=True)
class LossesConfig:
  """The objective."""

  retrieval: TaskConfig
  bitext: TaskConfig
  clustering: TaskConfig
  classification: TaskConfig
  scored_pairs: ScoredConfig
  learn_temperature: bool
  softmax: str
  inbatch_negatives: bool
  inbatch_passage_grad: bool
  mask_duplicates: bool
  false_negative_margin: float
  false_negative_score: str
  self_distillation: float
  spread_out: float
  int8: float
  binary: float

  def task(self, kind: str) -> TaskConfig | None:
    """Returns the settings of a contrastive task type, None for scored pairs."""
    settings = getattr(self, kind)
    return settings if isinstance(settings, TaskConfig) else None

  def contrastive_tasks(self) -> dict[str, TaskConfig]:
    """Returns {task type: settings} without scored pairs."""
    values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
    return {name: value for name, value in values.items() if isinstance(value, TaskConfig)}


@dataclasses.dataclass(frozen=True)
class KdConfig:
  """Learning from a teacher's states."""

  teacher: str
  exits: tuple[int, ...]
  match: str
  space: str
  weight: float


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """Where text comes from and how it becomes batches."""

  builder: str
  dataset: str
  train: tuple[str, ...]
  manifest: str
  heldout: tuple[str, ...]
  pooled_token: str
  max_rows: int
  size_exponent: float
  language_temperature: float
  max_repeats: float
  instructions: str
  query_instructions: bool
  document_instructions: float
  global_batch: int
  micro_batch: int
  kept_tokens: int
  lengths: tuple[int, ...]
  packing: bool
  workers: int


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """AdamW and its schedule."""

  learning_rate: float
  min_learning_rate: float
  schedule: str
  warmup_steps: int
  beta1: float
  beta2: float
  eps: float
  weight_decay: float
  clip_norm: float
  moments: str


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """Devices along each mesh axis; -1 takes what the others leave."""

  data: int
  fsdp: int
  tensor: int


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  """Length of the run, seeds, logging and checkpoints."""

  init_from: str
  steps: int
  epochs: float
  seed: int
  log_every: int
  checkpoint_every: int
  keep_checkpoints: int


@dataclasses.dataclass(frozen=True)
class EvalConfig:
  """Held-out evaluation before, during and after training."""

  every: int
  batch_size: int


@dataclasses.dataclass(frozen=True)
class ExportConfig:
  """The Hugging Face folder written from a checkpoint."""

  name: str
  at_end: bool
  dtype: str
  max_seq_length: int
  max_positions: int


@dataclasses.dataclass(frozen=True)
class Config:
  """Everything one run depends on."""

  model: ModelConfig
  matryoshka: MatryoshkaConfig
  losses: LossesConfig
  kd: KdConfig
  data: DataConfig
  optimizer: OptimizerConfig
  mesh: MeshConfig
  train: TrainConfig
  eval: EvalConfig
  export: ExportConfig


NO_LIMIT = 2.0  # losses.false_negative_margin: no two cosines are further apart
STORED = "stored"  # kd.teacher: vectors beside the data, read with each batch
LOWEST_TEMPERATURE = 0.01  # of learned ones, as in CLIP: below it training becomes unstable

# Fields that joined the configuration later, each with its value in runs that were started before:
# what the code did then. Without a line here, a new field makes every earlier workdir unreadable.
OLDER = {
  "model.qk_norm": True,
  "model.qkv_bias": False,
  "model.attention": "auto",
  "data.instructions": "",
  "data.kept_tokens": 0,
  "optimizer.moments": "float32",
  "eval.every": 0,
}

# Switches of the objective with the values of the published recipe (ML-Embed, F2LLM-v2). In the
# first five our default departs from it: on several devices its code passes no gradient to in-batch
# passages, and it knows nothing of repeated texts.
REFERENCE = {
  "losses.bitext.symmetric": False,
  "losses.inbatch_passage_grad": False,
  "losses.mask_duplicates": False,
  "kd.match": "index",
  "data.pooled_token": "<|im_end|>",
  "data.max_rows": 80_000,
  "data.size_exponent": 1.0,
  "data.language_temperature": 1.0,
  "data.document_instructions": 0.3,
  "kd.space": "raw",
  "losses.softmax": "separate",
  "losses.inbatch_negatives": False,
  "losses.learn_temperature": False,
  "losses.false_negative_margin": NO_LIMIT,
  "losses.self_distillation": 0.0,
  "losses.spread_out": 0.0,
  "losses.int8": 0.0,
  "losses.binary": 0.0,
}
