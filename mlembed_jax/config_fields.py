"""Every setting of a run, described once: name, type, default, meaning, and the rules about it.

`python -m mlembed_jax.train --config FILE --print_config` prints all of this beside the values of a
file. Rules between settings stand in config.py.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from mlembed_jax.families import FAMILIES

ABSENT: Any = object()  # stands where a setting has no such value


@dataclasses.dataclass(frozen=True)
class Setting:
  """What is known of one field beside its name and type."""

  default: Any  # the value of configs/base.py
  meaning: str
  choices: tuple[str, ...] = ()  # all values that there are
  zero: bool = False  # numbers are positive; True: this one may be zero
  below: float = float("inf")  # numbers are smaller
  own_rule: bool = False  # config.py or sharding.py says which numbers are allowed
  free: bool = False  # may change between stop and resume: no update depends on it but by rounding
  older: Any = ABSENT  # the value in runs that were started before the field was there
  published: Any = ABSENT  # the value of the published recipe (ML-Embed, F2LLM-v2)


def setting(default: Any, meaning: str, **rules: Any) -> Any:
  """Returns the dataclass field of a setting; `rules` are fields of `Setting`.

  Args:
    default: the value of configs/base.py. A configuration always states its value, so the dataclass
      itself has no default.
    meaning: whole sentences that a user can read alone.
    **rules: what differs from the defaults of `Setting`. A new field needs `older`, or every
      earlier workdir becomes unreadable.
  """
  return dataclasses.field(metadata={"setting": Setting(default, meaning, **rules)})


def group(**changes: Mapping[str, Any]) -> Any:
  """Returns a field that holds settings itself; `changes` of a setting are those of this use."""
  return dataclasses.field(metadata={"changes": changes})


NO_LIMIT = 2.0  # losses.false_negative_margin: no two cosines are further apart
STORED = "stored"  # kd.teacher: vectors beside the data, read with each batch
LOWEST_TEMPERATURE = 0.01  # of learned ones, as in CLIP: below it training becomes unstable


ALPHA = 16.0  # is the default of model.lora.alpha
# A layer has these, by their names in transformers.
PRODUCTS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclasses.dataclass(frozen=True)
class LoraConfig:
  """An adapter: two factors beside the weight of each product of a layer (arXiv 2106.09685)."""

  rank: int = setting(
    0,
    "Rank of the adapter. 0: there is none, and the weights themselves are trained.",
    zero=True,
    older=0,
  )
  alpha: float = setting(
    ALPHA, "The product of two factors is multiplied by alpha / rank.", older=ALPHA
  )
  targets: tuple[str, ...] = setting(
    (),
    "Products that have factors, by their names in transformers. (): all of a layer's.",
    choices=PRODUCTS,
    older=(),
  )

  @property
  def scale(self) -> float:
    """What the product of two factors is multiplied by."""
    return self.alpha / self.rank

  def adapts(self, product: str) -> bool:
    """Returns whether a product, by its name in transformers, has factors."""
    return bool(self.rank) and product in (self.targets or PRODUCTS)


NO_LORA = LoraConfig(0, ALPHA, ())


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """The encoder: a dense decoder without a language-model head."""

  family: str = setting(
    "qwen3",
    "Architecture, by its name in transformers. It decides which norms and biases a layer has.",
    choices=tuple(FAMILIES),
    older="qwen3",
  )
  vocab: int = setting(
    151_936, "Rows of the token table. Qwen's tokenizer uses 151,669 of the default."
  )
  width: int = setting(1024, "Width of the residual stream, and of the embedding.")
  layers: int = setting(28, "Decoder layers.")
  ffn: int = setting(3072, "Inner width of the SwiGLU MLP.")
  heads: int = setting(16, "Query heads of attention, a multiple of model.kv_heads.")
  kv_heads: int = setting(
    8, "Key and value heads of attention, each shared by heads / kv_heads queries."
  )
  head_dim: int = setting(
    128, "Width of an attention head, a number of its own: heads x head_dim need not be the width."
  )
  rank: int = setting(
    512, "Rank of the token table U [vocab, rank] @ V [rank, width]. 0: a full table.", zero=True
  )
  rope_theta: float = setting(1e6, "Base of the wavelengths of the rotary embedding.")
  norm_eps: float = setting(1e-6, "Added to the mean square in every RMSNorm.")
  dtype: str = setting(
    "bfloat16",
    "Number format of the computation. Parameters are float32.",
    choices=("float32", "bfloat16"),
  )
  attention: str = setting(
    "auto",
    "Kernel of attention: splash on TPU, cudnn on GPU, einsum on all. auto: that of the platform.",
    choices=("auto", "splash", "cudnn", "einsum"),
    free=True,  # another machine may have another kernel
    older="auto",
  )
  remat: str = setting(
    "full",
    "What the backward pass computes again, in growing need of memory: offload and full (whole "
    "layers), context (all but attention), products, dots, none.",
    choices=("none", "full", "context", "products", "dots", "offload"),
    free=True,
  )
  lora: LoraConfig = group()

  @property
  def qk_norm(self) -> bool:
    """Returns whether every query and key head is normed."""
    return FAMILIES[self.family].qk_norm

  @property
  def qkv_bias(self) -> bool:
    """Returns whether queries, keys and values have a bias."""
    return FAMILIES[self.family].qkv_bias

  def products(self) -> dict[str, tuple[int, int]]:
    """Returns the inputs and outputs of a layer's products, by their names in transformers."""
    width, ffn = self.width, self.ffn
    queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
    attention = ((width, queries), (width, keys), (width, keys), (queries, width))
    mlp = ((width, ffn), (width, ffn), (ffn, width))
    return dict(zip(PRODUCTS, attention + mlp, strict=True))


@dataclasses.dataclass(frozen=True)
class MatryoshkaConfig:
  """What is trained along each axis. () is the default set; (full,) alone switches an axis off."""

  dims: tuple[int, ...] = setting(
    (), "Output dimensions that are trained. (): 8, 16, 32, ... below the width, and the width."
  )
  exits: tuple[int, ...] = setting(
    (),
    "Layer counts after which an encoder is trained. (): 1, 2, 4, 8, 16, 24, 32, ... below "
    "model.layers, and all layers.",
  )
  ranks: tuple[int, ...] = setting(
    (),
    "Ranks of the token table that are trained: each step draws one, with a chance in proportion "
    "to the rank. (): 64, 128, 256, ... below model.rank, and model.rank.",
  )


@dataclasses.dataclass(frozen=True)
class TaskConfig:
  """What the contrastive terms do with one task type."""

  temperature: float = setting(
    0.05, "Temperature of the task type at the first step: cosines are divided by it."
  )
  final_temperature: float = setting(
    0.05,
    "Temperature of the task type at the last step, reached linearly from the one at the first. "
    "The same number: a fixed temperature.",
  )
  negatives: int = setting(
    0,
    "Hard negatives used per row and step, drawn from those stored; fewer where fewer are stored.",
    zero=True,
  )
  inbatch: bool = setting(
    False, "Whether positives of the other rows of the global batch are negatives too."
  )
  symmetric: bool = setting(
    False,
    "Whether the in-batch term is the mean of both directions, query to passage and passage to "
    "query. False: query to passage alone.",
  )


@dataclasses.dataclass(frozen=True)
class ScoredConfig:
  """What is done with pairs that have a score in [0, 1]: higher scores, higher cosines (CoSENT)."""

  temperature: float = setting(
    0.05, "Temperature of the task type at the first step: cosines are divided by it."
  )
  final_temperature: float = setting(
    0.05,
    "Temperature of the task type at the last step, reached linearly from the one at the first. "
    "The same number: a fixed temperature.",
  )


@dataclasses.dataclass(frozen=True)
class LossesConfig:
  """Cross-entropies over cosines: the positive against hard negatives and, inbatch, other rows."""

  retrieval: TaskConfig = group(negatives={"default": 7}, inbatch={"default": True})
  bitext: TaskConfig = group(
    negatives={"default": 7},
    inbatch={"default": True},
    symmetric={"default": True, "published": False},
  )
  clustering: TaskConfig = group(negatives={"default": 9})
  classification: TaskConfig = group(negatives={"default": 1})
  scored_pairs: ScoredConfig = group()
  contrastive: float = setting(
    1.0,
    "Weight of what the rows themselves teach, the cross-entropies and the order of scored pairs. "
    "0: a teacher alone teaches.",
    zero=True,
    older=1.0,
  )
  learn_temperature: bool = setting(
    False,
    "Whether one temperature per task type is learned, from its temperature at the first step on.",
    published=False,
  )
  softmax: str = setting(
    "separate",
    "Whether hard and in-batch negatives stand in two cross-entropies (separate) or in "
    "one (joint).",
    choices=("separate", "joint"),
    published="separate",
  )
  inbatch_negatives: bool = setting(
    False, "Whether hard negatives of other rows are in-batch negatives, too.", published=False
  )
  # The published code passes no gradient to in-batch passages on several devices.
  inbatch_passage_grad: bool = setting(
    True,
    "Whether passages of other rows have a gradient. False: they are constants.",
    published=False,
  )
  mask_duplicates: bool = setting(
    True, "Whether identical texts are never each other's negatives.", published=False
  )
  false_negative_margin: float = setting(
    NO_LIMIT,
    "A candidate of another row is no negative if its cosine with the query is this much above the "
    "positive's. 2: no limit.",
    own_rule=True,
    published=NO_LIMIT,
  )
  false_negative_score: str = setting(
    "own",
    "Whose cosines losses.false_negative_margin bounds: own (the deepest exit's, at the rank of "
    "the step, or at full rank where losses.self_distillation is on), or teacher (the teacher's, "
    "of its whole vectors).",
    choices=("own", "teacher"),
  )
  self_distillation: float = setting(
    0.0,
    "Weight of the KL divergence of every slice to the full model's choice among the candidates; "
    "not for scored pairs. 0: off.",
    zero=True,
    published=0.0,
  )
  spread_out: float = setting(
    0.0,
    "Weight of the term that makes texts as orthogonal as on an even sphere (GOR). 0: off.",
    zero=True,
    published=0.0,
  )
  int8: float = setting(
    0.0,
    "Weight of the contrastive terms over vectors rounded to int8. 0: off.",
    zero=True,
    published=0.0,
  )
  binary: float = setting(
    0.0,
    "Weight of the contrastive terms over vectors rounded to one bit per coordinate. 0: off.",
    zero=True,
    published=0.0,
  )

  def task(self, task_type: str) -> TaskConfig | None:
    """Returns the settings of a contrastive task type, None for scored pairs and texts alone."""
    settings = getattr(self, task_type, None)
    return settings if isinstance(settings, TaskConfig) else None

  def contrastive_tasks(self) -> dict[str, TaskConfig]:
    """Returns {task type: settings} without scored pairs."""
    values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
    return {name: value for name, value in values.items() if isinstance(value, TaskConfig)}


@dataclasses.dataclass(frozen=True)
class KdConfig:
  """Every exit learns from the teacher's exit at its depth, d coordinates from its first d."""

  teacher: str = setting(
    "",
    "The teacher: workdir, exported folder or hf:ORG/NAME of an encoder with the same tokenizer; a "
    "folder that python -m mlembed_jax.teach wrote, of a teacher of any tokenizer; stored: vectors "
    "beside the data, named by the manifest; empty: none.",
  )
  exits: tuple[int, ...] = setting(
    (), "Layer counts at which the teacher is an encoder. (): as its folder says."
  )
  match: str = setting(
    "depth_fraction",
    "Which exit of the teacher an exit learns from: depth_fraction (the nearest fraction of "
    "depth), index (by position from the deepest exit), or last (the deepest, so that texts at any "
    "depth find those that the whole model encoded).",
    choices=("depth_fraction", "index", "last"),
    published="index",
  )
  space: str = setting(
    "raw",
    "Distance to the teacher: mean squared error of final-norm states (raw), or squared distance "
    "of unit vectors (unit).",
    choices=("raw", "unit"),
    published="raw",
  )
  weight: float = setting(
    1.0,
    "Weight of the distance to the teacher, at the full width. 0: off.",
    zero=True,
  )
  projection: int = setting(
    0,
    "Width of the teacher, to which a linear map takes the states of the full width before their "
    "distance is taken, so that the two may differ. It is learnt beside the encoder, kept in "
    "checkpoints and no part of exports. 0: none.",
    zero=True,
    older=0,
  )
  prefix: float = setting(
    0.0,
    "Weight of the squared distance of unit vectors at every trained dim to as many leading "
    "coordinates of the teacher, which must have been trained so (MRL). 0: off.",
    zero=True,
    older=0.0,
  )
  mrl: bool = setting(
    False,
    "Whether leading coordinates of the teacher are embeddings by themselves, although nothing "
    "beside it says so. A folder says so in mlembed.json, or in config.json (is_matryoshka).",
    older=False,
  )
  similarity: float = setting(
    0.0,
    "Weight of the KL divergence, at every trained dim, of the query's choice among the texts of "
    "other rows to the teacher's by its whole vectors. 0: off.",
    zero=True,
    older=0.0,
  )
  temperature: float = setting(
    0.05, "Temperature of both choices of kd.similarity: cosines are divided by it.", older=0.05
  )

  @property
  def learns(self) -> bool:
    """Returns whether a term learns from the teacher, which else only judges candidates."""
    return bool(self.weight or self.prefix or self.similarity)


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """Where text comes from and how it becomes batches.

  File d counts as min(rows, max_rows) ** size_exponent, a language as its rows in all files **
  (1 / language_temperature). With 1 and 1 rows are drawn by size.
  """

  builder: str = setting(
    "",
    "What makes the data first. quickstart: text, tokenizer and dataset in WORKDIR/data; empty: "
    "nothing, the data are there.",
    choices=("", "quickstart"),
    free=True,
  )
  dataset: str = setting(
    "", "Folder that python -m mlembed_jax.prepare wrote; its tokenizer is used.", free=True
  )
  train: tuple[str, ...] = setting(
    ("*",), "Patterns of the files of the dataset that are trained on."
  )
  manifest: str = setting(
    "",
    "JSON file that describes held-out files: file -> task_type, instruction, ...; empty where "
    "data.heldout is ().",
    free=True,
  )
  heldout: tuple[str, ...] = setting(
    (), "Patterns of held-out files, evaluated before and after training. (): none.", free=True
  )
  pooled_token: str = setting(
    "<|endoftext|>",
    "Token that ends every text; its state is the embedding.",
    published="<|im_end|>",
  )
  max_rows: int = setting(
    80_000,
    "Rows that count per file and epoch, other ones each epoch. 0: all.",
    zero=True,
    published=80_000,
  )
  size_exponent: float = setting(
    1.0,
    "Exponent of the rows of a file in its share of an epoch. 1: in proportion to the rows; below "
    "1: small files come more often.",
    published=1.0,
  )
  language_temperature: float = setting(
    1.0,
    "Temperature of the shares of languages in an epoch, whose exponent is 1 / temperature. Above "
    "1: small languages come more often.",
    published=1.0,
  )
  max_repeats: float = setting(4.0, "No row comes more often than this per epoch (UniMax).")
  language_key: str = setting(
    "language-script",
    "What counts as one language, in shares of an epoch and in held-out scores. language-script: "
    "tags of one language and script, as he, iw and heb_Hebr; regions are not told apart. "
    "as-written: equal tags alone.",
    choices=("language-script", "as-written"),
    older="as-written",
  )
  instructions: str = setting(
    "",
    "JSON file of instructions, file -> instruction, in place of the manifest's. Empty: those of "
    "the manifest.",
    free=True,  # what it says stands in the plan
    older="",
  )
  query_instructions: bool = setting(
    True,
    "Whether queries have their instruction. False: none, as in the first stage of the published "
    "recipe's two.",
  )
  document_instructions: float = setting(
    0.3,
    "Share of the documents of symmetric tasks that have the instruction too.",
    zero=True,
    published=0.3,
  )
  global_batch: int = setting(512, "Rows per step over all devices, all from one file.")
  complete_batches: bool = setting(
    False,
    "Whether what is left of a file after its last whole batch is completed with rows from the "
    "beginning of the file's epoch, as the official code does on several processes; then a file "
    "may have fewer rows than data.global_batch, and rows come more often than data.max_repeats "
    "says. False: it is left out, and such files are refused.",
    older=False,
  )
  micro_batch: int = setting(
    0,
    "Tokens encoded at a time over all devices (GradCache): memory against padding of the last "
    "block. 0: chosen by the compiler's account of memory.",
    zero=True,
    free=True,
  )
  kept_tokens: int = setting(
    0,
    "Tokens of each sheet width, over all devices, that keep their activations for the backward "
    "pass, in whole blocks; all others are encoded twice.",
    zero=True,
    free=True,
    older=0,
  )
  lengths: tuple[int, ...] = setting(
    (256, 1024),
    "Widths of token sheets: a text goes to the shortest that holds it, the last one truncates.",
  )
  packing: bool = setting(
    True, "Whether texts share a sheet as far as they fit. False: one text per sheet.", free=True
  )
  workers: int = setting(
    2, "Processes that read ahead. 0: the training process reads.", zero=True, free=True
  )


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """AdamW with decoupled weight decay on every parameter, gradients clipped by global norm."""

  learning_rate: float = setting(1e-5, "Learning rate after warm-up.")
  min_learning_rate: float = setting(
    1e-7,
    "Lowest learning rate, in warm-up and decay too. The first update alone has rate 0.",
    zero=True,
  )
  schedule: str = setting(
    "cosine",
    "How the learning rate goes on after warm-up: cosine (to zero over the run), or constant.",
    choices=("cosine", "constant"),
  )
  warmup_steps: int = setting(
    100, "Updates of a linear warm-up. The first update has rate 0 in any case.", zero=True
  )
  beta1: float = setting(0.9, "Decay of the first moment of gradients (AdamW).", zero=True, below=1)
  beta2: float = setting(
    0.98, "Decay of the second moment of gradients (AdamW).", zero=True, below=1
  )
  eps: float = setting(
    1e-8, "Added to the root of the second moment, which divides an update (AdamW)."
  )
  weight_decay: float = setting(
    0.01,
    "Share of a parameter that an update takes away, times the learning rate (AdamW).",
    zero=True,
  )
  clip_norm: float = setting(1.0, "Largest global norm of a gradient; longer ones are scaled.")
  moments: str = setting(
    "float32",
    "How the moments of a parameter are kept between updates: float32 (8 bytes), bfloat16 (4), or "
    "factored (2: the second moment by rows and columns).",
    choices=("float32", "bfloat16", "factored"),
    older="float32",
  )


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """Devices along each mesh axis."""

  data: int = setting(
    1,
    "Devices along the mesh axis of copies of the parameters. -1: what the other axes leave.",
    own_rule=True,
    free=True,
  )
  fsdp: int = setting(
    -1,
    "Devices along the mesh axis that splits parameters. -1: what the other axes leave.",
    own_rule=True,
    free=True,
  )
  tensor: int = setting(
    1,
    "Devices along the mesh axis that splits heads and MLP. -1: what the other axes leave.",
    own_rule=True,
    free=True,
  )


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  """Length of the run, seeds, logging and checkpoints."""

  init_from: str = setting(
    "",
    "Weights to start from: a folder in Hugging Face layout, or hf:ORG/NAME. Empty: "
    "random weights.",
  )
  trainable: tuple[str, ...] = setting(
    (),
    "Patterns of the parameters that are trained, such as layers/*. Together with train.frozen "
    "they must name every parameter once. () for both: all, or with model.lora the adapter alone.",
    older=(),
  )
  frozen: tuple[str, ...] = setting(
    (),
    "Patterns of the parameters that stay as train.init_from has them, rounded to model.dtype. "
    "They have no gradient and no moments.",
    older=(),
  )
  steps: int = setting(0, "Length of the run in updates. 0 where train.epochs is given.", zero=True)
  epochs: float = setting(
    2.0,
    "Length of the run in passes over the training files. 0 where train.steps is given.",
    zero=True,
  )
  seed: int = setting(0, "Seed of weights, data order, drawn negatives and drawn ranks.", zero=True)
  max_nonfinite_steps: int = setting(
    5,
    "So many steps in a row whose loss, gradient or update is not finite end the run. None of them "
    "changes the state.",
    free=True,
    older=1,
  )
  spike_factor: float = setting(
    0.0,
    "A loss above this many times the median of the last 64 steps of its file sends the run back "
    "to its newest checkpoint, and the steps since are passed over. 0: off.",
    zero=True,
    free=True,
    older=0.0,
  )
  log_every: int = setting(10, "Steps per line of metrics.jsonl.", free=True)
  trackers: tuple[str, ...] = setting(
    ("tensorboard",),
    "Programs that also get the lines of metrics.jsonl and the held-out scores. (): none. wandb "
    "and mlflow are extras of the package.",
    choices=("tensorboard", "wandb", "mlflow"),
    free=True,
    older=("tensorboard",),
  )
  profile_steps: tuple[int, ...] = setting(
    (),
    "The first and the last step that jax.profiler traces, into WORKDIR/profile, for TensorBoard's "
    "profiler. (): none.",
    free=True,
    older=(),
  )
  checkpoint_every: int = setting(500, "Steps between checkpoints.", free=True)
  keep_checkpoints: int = setting(3, "How many of the newest checkpoints are kept.", free=True)
  keep_every: int = setting(
    0,
    "Checkpoints of steps that this divides are kept, too. 0: none.",
    zero=True,
    free=True,
    older=0,
  )
  keep_best: int = setting(
    0,
    "How many checkpoints with the best mean of the whole model's held-out scores are kept, too.",
    zero=True,
    free=True,
    older=0,
  )


@dataclasses.dataclass(frozen=True)
class EvalConfig:
  """Held-out evaluation before, during and after training."""

  every: int = setting(
    0,
    "Steps between evaluations of all slices, which also save a checkpoint. 0: before and after "
    "training alone.",
    zero=True,
    free=True,
    older=0,
  )
  patience: int = setting(
    0,
    "Evaluations in a row without a better mean of the whole model's held-out scores that end the "
    "run. 0: it is as long as train says.",
    zero=True,
    free=True,
    older=0,
  )
  batch_size: int = setting(
    512, "Texts that an evaluation encodes at a time, over all devices.", free=True
  )


@dataclasses.dataclass(frozen=True)
class ExportConfig:
  """The Hugging Face folder written from a checkpoint."""

  name: str = setting("mlembed-0.6b", "Name of the model. Cuts add -d, -l and -r to it.", free=True)
  at_end: bool = setting(
    False, "Whether the folder WORKDIR/export is written when training ends.", free=True
  )
  best: bool = setting(
    False,
    "Whether that folder has the checkpoint with the best mean of the whole model's held-out "
    "scores, of those that are kept. False: the last one.",
    free=True,
    older=False,
  )
  dtype: str = setting(
    "bfloat16",
    "Number format of the stored weights.",
    choices=("float32", "bfloat16"),
    free=True,
  )
  max_seq_length: int = setting(8192, "Tokens that a user of the folder may encode.", free=True)
  max_positions: int = setting(40_960, "The max_position_embeddings of the base model.", free=True)


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


def _settings(
  cls: type, path: str, changes: Mapping[str, Mapping[str, Any]]
) -> Iterator[tuple[str, Setting]]:
  for field in dataclasses.fields(cls):
    if isinstance(field.type, type) and dataclasses.is_dataclass(field.type):
      yield from _settings(field.type, f"{path}{field.name}.", field.metadata.get("changes", {}))
    else:
      found = field.metadata["setting"]
      yield path + field.name, dataclasses.replace(found, **changes.get(field.name, {}))


# All settings by dotted name, e.g. "losses.bitext.temperature", in the order of the classes.
SETTINGS = dict(_settings(Config, "", {}))
DEFAULTS = {name: found.default for name, found in SETTINGS.items()}
OLDER = {name: found.older for name, found in SETTINGS.items() if found.older is not ABSENT}
REFERENCE = {
  name: found.published for name, found in SETTINGS.items() if found.published is not ABSENT
}
