"""Small real inputs that the tests write: multilingual text, a tokenizer, parquet files."""

import itertools
import json
import pathlib
import re
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tokenizers
from tokenizers import decoders, pre_tokenizers, trainers

from mlembed_jax.batch import Kind, Sheets
from mlembed_jax.config import load_module
from mlembed_jax.config_fields import ModelConfig
from mlembed_jax.data import catalog, loader, manifest, packing, plan, prepare, store
from mlembed_jax.data.manifest import TASK_TYPES
from mlembed_jax.data.tokenizer import Tokenizer
from mlembed_jax.models import encoder
from mlembed_jax.models.encoder import Encoder

# Compiles an objective in 0.4 instead of 1.7 s, and a whole step twice as fast. jax 0.12 no longer
# knows the second option.
FAST_COMPILE: dict[str, Any] = {"xla_backend_optimization_level": 0}
if jax.__version_info__ < (0, 12):
  FAST_COMPILE |= {"xla_cpu_use_fusion_emitters": False}
CONFIGS = pathlib.Path(__file__).parent.parent / "configs"

WORDS = {
  "en": "one two three four five red green blue house river sun moon bread water night day",
  "de": "eins zwei drei vier fünf rot grün blau Haus Fluss Sonne Mond Brot Wasser Nacht Tag",
  "ru": "один два три четыре пять красный зелёный синий дом река солнце луна хлеб вода ночь день",
  "hi": "एक दो तीन चार पाँच लाल हरा नीला घर नदी सूरज चाँद रोटी पानी रात दिन",
  "zh": "一 二 三 四 五 红 绿 蓝 房子 河 太阳 月亮 面包 水 夜 日",
}
OTHERS = ("de", "ru", "hi", "zh")
CONVENTIONS = (  # tags of one language as three kinds of corpora write them
  *(("he", "iw", "heb_Hebr"), ("zh", "zh-CN", "cmn-Hans"), ("no", "nb", "nob-Latn")),
  *(("ka", "ka_GE", "kat-Geor"), ("ko", "ko-KR", "kor_Hang"), ("ps", "pus", "pbt_Arab")),
  *(("qu", "que", "quy_Latn"), ("ff", "ful", "fuv_Latn"), ("fa", "fas", "pes_Arab")),
  *(("ar", "ar-EG", "arb_Arab"), ("az", "aze", "azj_Latn"), ("sw", "swa", "swh_Latn")),
  *(("sr", "sr-RS", "srp_Cyrl"), ("uz", "uz-UZ", "uzn_Latn"), ("am", "am-ET", "amh_Ethi")),
  ("en", "en-US", "eng_Latn"),
)


def sentences(lang: str) -> list[str]:
  """Returns 560 phrases, the same meanings in the same order in every language."""
  return [" ".join(words) for words in itertools.combinations(WORDS[lang].split(), 3)]


def pairs(rows: int, negatives: int) -> dict[str, list[str]]:
  english = sentences("en")
  columns: dict[str, list[str]] = {name: [] for name in _columns(negatives)}
  for i in range(rows):
    lang = OTHERS[i % len(OTHERS)]
    columns["query"].append(sentences(lang)[i])
    columns["passage"].append(english[i])
    for k in range(negatives):
      columns[f"negative_{k + 1}"].append(english[(i + 7 * k + 1) % len(english)])
    columns["lang"].append(lang)
  return columns


def labels(rows: int) -> dict[str, list[str]]:
  columns = pairs(rows, 1)
  names = ("holds a colour", "holds no colour")
  colours = {"red", "green", "blue"}
  for i, text in enumerate(columns["passage"]):
    right = 0 if colours & set(text.split()) else 1
    columns["passage"][i], columns["negative_1"][i] = names[right], names[1 - right]
  return columns


def _columns(negatives: int) -> list[str]:
  return ["query", "passage", *(f"negative_{k + 1}" for k in range(negatives)), "lang"]


def write_parquet(path: pathlib.Path, columns: dict[str, Any]) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  pq.write_table(pa.table(columns), path)


def entry(task_type: str, negatives: int, instruction: str) -> dict[str, Any]:
  return {
    "task_type": task_type,
    "instruction": instruction,
    "query_has_instruction": False,
    "negatives": negatives,
  }


def write(folder: pathlib.Path) -> None:
  """Writes manifest.json, tokenizer.json, train/*.parquet and heldout/*.parquet."""
  translate, topic = "Retrieve translations of the text.", "Say whether a colour is named."
  write_parquet(folder / "train/bitext.parquet", pairs(160, 4))
  write_parquet(folder / "train/topics.parquet", pairs(96, 9))
  write_parquet(folder / "train/colours.parquet", labels(64))
  held = pairs(400, 0)
  held = {name: values[300:] for name, values in held.items()}
  bitext = {"lang": held["lang"], "text": held["query"], "en": held["passage"]}
  write_parquet(folder / "heldout/bitext.parquet", bitext)
  write_parquet(folder / "heldout/colours.parquet", _heldout_labels())
  entries = {
    "train/bitext.parquet": entry("bitext", 4, translate),
    "train/topics.parquet": entry("clustering", 9, "Find similar texts."),
    "train/colours.parquet": entry("classification", 1, topic),
    "heldout/bitext.parquet": entry("bitext", 0, translate),
    "heldout/colours.parquet": entry("classification", 0, topic),
  }
  (folder / "manifest.json").write_text(json.dumps(entries), encoding="utf-8")
  train_tokenizer(600).save(str(folder / "tokenizer.json"))
  prepare_dataset(folder)


def prepare_dataset(
  folder: pathlib.Path,
  pattern: str = "train/*",
  tokenizer: pathlib.Path | None = None,
  *,
  out: str = "dataset",
  max_tokens: int = 2047,
  processes: int = 1,
  max_dropped_share: float = 0.1,
  quick: bool = False,
) -> pathlib.Path:
  """Prepares the files of FOLDER/manifest.json that match; returns FOLDER/OUT."""
  opened = Tokenizer(tokenizer or folder / "tokenizer.json", "<|endoftext|>")
  files = manifest.select(str(folder / "manifest.json"), [pattern], "--files")
  recipe = prepare.make_recipe(files, opened, max_tokens)
  job = prepare.Job(recipe, folder / out, opened.path, opened.pooled_token)
  prepare.prepare_dataset(
    job, processes=processes, max_dropped_share=max_dropped_share, quick=quick
  )
  return job.out


def write_files(
  folder: pathlib.Path, files: dict[str, tuple[dict[str, Any], dict[str, Any]]]
) -> None:
  """Writes files {name: (columns, manifest entry)} and manifest.json."""
  for name, (columns, _) in files.items():
    write_parquet(folder / name, columns)
  entries = {name: described for name, (_, described) in files.items()}
  (folder / "manifest.json").write_text(json.dumps(entries), encoding="utf-8")


def batches_of(
  dataset: pathlib.Path,
  files: Sequence[str] = (),
  *,
  process: int = 0,
  processes: int = 1,
  shards: int = 1,
  block_tokens: int = 4096,
  steps: int = 100_000,
  **options: Any,
) -> loader.Batches:
  """Returns batches of a prepared dataset by size; `options` change those below."""
  opened = catalog.load_catalog(dataset)
  split = store.open_split(opened, "train", list(files or opened.files))
  settings = {
    "negatives": {"retrieval": 7, "bitext": 7, "clustering": 9, "classification": 1},
    "inbatch": {name: name in ("retrieval", "bitext") for name in TASK_TYPES},
    "query_instructions": True,
    "document_instructions": 0.3,
    "teacher_vectors": False,
    "lengths": (32, 64),
    "packing": True,
    "batch_size": 16,
    "seed": 0,
  } | options
  chosen = loader.Options(**settings)
  per_epoch = np.array([unit.rows for unit in split.units])
  made = plan.Plan(split.files, split.units, per_epoch, chosen.batch_size, chosen.seed, "")
  placement = loader.Placement(block_tokens, shards, process, processes)
  tokenizer = Tokenizer(opened.tokenizer, "<|endoftext|>")
  return loader.Batches(split, made.order(), tokenizer, chosen, placement, steps)


def _heldout_labels() -> dict[str, list[str]]:
  columns = labels(400)
  rows = range(300, 400)
  english = sentences("en")
  return {
    "lang": ["en" for _ in rows] + [columns["lang"][i] for i in rows],
    "intent": [columns["passage"][i] for i in rows] * 2,
    "text": [english[i] for i in rows] + [columns["query"][i] for i in rows],
    "split": ["support"] * len(rows) + ["test"] * len(rows),
  }


def train_tokenizer(vocab: int) -> tokenizers.Tokenizer:
  """Returns a byte-level BPE that holds Qwen's two end tokens."""
  tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=vocab,
    special_tokens=["<|endoftext|>", "<|im_end|>"],
    initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    show_progress=False,
  )
  texts = [text for lang in WORDS for text in sentences(lang)]
  tokenizer.train_from_iterator(texts, trainer)
  return tokenizer


def config_dict(data: pathlib.Path | None = None, **overrides: Any) -> Any:
  """Returns the base configuration with a tiny model; `overrides` by dotted name."""
  config = load_module(CONFIGS / "base.py").get_config()
  config.model.update(vocab=640, width=48, layers=3, ffn=64, heads=4, kv_heads=2, head_dim=16)
  config.model.update(rank=24, rope_theta=5e3, dtype="float32", remat="none")
  config.matryoshka.update(dims=(8, 16, 48), exits=(1, 2, 3), ranks=(8, 16, 24))
  config.data.update(global_batch=16, micro_batch=2048, lengths=(32, 64), heldout=("heldout/*",))
  config.data.update(workers=0)
  config.optimizer.update(learning_rate=1e-3, warmup_steps=4)
  config.train.update(steps=20, epochs=0.0, log_every=1, checkpoint_every=10)
  config.eval.batch_size = 64
  config.export.update(name="tiny", dtype="float32", max_seq_length=128, max_positions=1024)
  folder = data or pathlib.Path("/nowhere")
  config.data.update(manifest=str(folder / "manifest.json"), dataset=str(folder / "dataset"))
  config.update_from_flattened_dict(overrides)
  return config


def random_params(model: ModelConfig, seed: int = 0) -> Any:
  """Returns parameters with random norm scales and adapters, so that a forgotten one shows."""
  params = jax.jit(lambda key: nn.unbox(encoder.init(model, key)))(jax.random.key(seed))

  def perturb(path: Any, leaf: jax.Array) -> jax.Array:
    name = jax.tree_util.keystr(path)
    key = jax.random.fold_in(jax.random.key(seed), len(name) + leaf.size)
    return (
      leaf + 0.3 * jax.random.normal(key, leaf.shape) if re.search("scale|_lora_b", name) else leaf
    )

  return jax.tree_util.tree_map_with_path(perturb, params)


def random_batch(vocab: int, rows: int, size: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
  """Returns tokens [rows, size] and mixed lengths [rows]; padding holds arbitrary ids."""
  generator = np.random.default_rng(seed)
  tokens = generator.integers(0, vocab, (rows, size)).astype(np.int32)
  lengths = generator.integers(1, size + 1, rows).astype(np.int32)
  lengths[0] = size
  return tokens, lengths


def padded(model: ModelConfig) -> Any:
  """Returns the encoder of rows of one text: (variables, tokens, lengths[, mask]) to [L, B, D]."""

  def apply(variables: Any, tokens: Any, lengths: Any, *mask: Any) -> Any:
    return Encoder(model).apply(variables, tokens, lengths[:, None] - 1, *mask)[:, :, 0]

  return apply


def kind_of(task_type: str, positives: int = 1) -> Kind:
  """Returns a kind for what reads the shapes from the arrays."""
  return Kind(task_type, positives, negatives=0, longest=0, vectors=None)


def packed(
  tokens: np.ndarray,
  lengths: np.ndarray,
  shards: int = 1,
  *,
  widths: Sequence[int] = (32, 64),
  block_tokens: int = 10**6,
  share: bool = True,
) -> tuple[Sheets, ...]:
  """Returns the sheets of the texts tokens [B, C, T], lengths [B, C]; all in one block as it is."""
  rows, texts, size = tokens.shape
  layout = packing.layout(
    rows=rows,
    texts_per_row=texts,
    longest=size,
    widths=widths,
    block_tokens=block_tokens,
    batch_shards=shards,
    packed=share,
  )
  flat = zip(tokens.reshape(-1, size), lengths.reshape(-1), strict=True)
  ids = [text[:length] for text, length in flat]
  local = [ids[i : i + layout.texts] for i in range(0, len(ids), layout.texts)]
  return packing.whole(packing.pack(local, layout), layout)


def with_positives(columns: dict[str, Any], positives: int) -> dict[str, Any]:
  """Returns columns of `pairs` and passage_2, ...: the passage in languages not of the query."""
  index = {text: i for i, text in enumerate(sentences("en"))}
  rows = [
    (index[text], OTHERS.index(lang))
    for text, lang in zip(columns["passage"], columns["lang"], strict=True)
  ]
  more = {
    f"passage_{k + 1}": [sentences(OTHERS[(lang + k) % len(OTHERS)])[i] for i, lang in rows]
    for k in range(1, positives)
  }
  return columns | more


def scored(rows: int) -> dict[str, Any]:
  """Returns columns of scored pairs: the score is the share of words in common."""
  english = sentences("en")
  columns = pairs(rows, 0)
  shifted = [(i + (1 + 7 * (i // 4)) * (i % 4)) % len(english) for i in range(rows)]
  columns["passage"] = [english[k] for k in shifted]
  common = (set(english[i].split()) & set(english[k].split()) for i, k in enumerate(shifted))
  return columns | {"score": [len(words) / 3 for words in common]}


def write_vectors(
  folder: pathlib.Path,
  name: str,
  shapes: dict[str, tuple[int, ...]],
  dtype: Any = np.float32,
  seed: int = 0,
) -> dict[str, str]:
  """Writes random vectors to NAME.KEY.npy; returns a manifest's `teacher_vectors`."""
  generator = np.random.default_rng(seed)
  for key, shape in shapes.items():
    np.save(folder / f"{name}.{key}.npy", generator.normal(size=shape).astype(dtype))
  return {key: f"{name}.{key}.npy" for key in shapes}
