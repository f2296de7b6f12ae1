"""A run whose weights are random, and its exports, for the tests of this folder."""

import dataclasses
import json
import pathlib
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer

from mlembed_jax.config import from_mapping
from mlembed_jax.config_fields import Config
from mlembed_jax.data.tokenizer import Tokenizer
from mlembed_jax.hf import parity
from mlembed_jax.hf.export import TrainedModel, export_folder
from mlembed_jax.matryoshka import Slice, slice_config, slice_params, truncate
from mlembed_jax.models.batched import Batching, encode_batched
from mlembed_jax.workdir import Run, StepScores
from tests import material

TEXTS = [
  "hello world",
  "x",
  "Die Sonne scheint über dem Fluss.",
  "Où est la gare, s'il vous plaît ?",
  "¿Cómo estás? Mañana llueve…",
  "солнце, луна и хлеб",
  "Ελληνικά: καλημέρα",
  "今天天气很好",
  "夜のパンと水",
  "물과 빵, 그리고 밤",
  "السلام عليكم ورحمة الله",
  "שלום עולם",
  "नमस्ते दुनिया",
  "পানি আর রুটি",
  "வணக்கம் உலகம்",
  "ನಮಸ್ಕಾರ ಪ್ರಪಂಚ",
  "สวัสดีชาวโลก",
  "გამარჯობა მსოფლიო",
  "Բարեւ աշխարհ",
  "ሰላም ልዑል",
  "សួស្តី ពិភពលោក",
  "မင်္ဂလာပါ",
  "👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽",
  "café cafe\u0301",
  "def f(x):\n\treturn x\n\n\nprint(f(1))",
  "3.14159, 2_000 & 1e-5 (50%)",
  "the literal <|im_end|> and <|endoftext|> inside",
  "a  b   c    d",
  "one two three " * 60 + "end",  # longer than max_seq_length
  "один дом " * 30 + "конец",
]
CUTS = {
  "full": Slice(),
  "depth": Slice(depth=2),
  "dim": Slice(dim=16),
  "rank": Slice(rank=16),
  "all": Slice(depth=3, dim=8, rank=8),
}


@dataclasses.dataclass
class Trained:
  """What an export takes, but the folder and the cut."""

  run: Run
  params: Any
  tokenizer: Tokenizer

  def export(
    self,
    out: pathlib.Path,
    cut: Slice = CUTS["full"],
    evaluation: StepScores | None = None,
    **options: Any,
  ) -> pathlib.Path:
    trained = TrainedModel(self.run, 20, self.params, self.tokenizer, evaluation)
    return export_folder(out, trained, cut, **options)

  def vectors(self, texts: list[str], cut: Slice, prompt: str) -> np.ndarray:
    """Returns our own vectors from the parameters as trained, not from the folder."""
    config = self.run.config
    model = slice_config(config.model, dataclasses.replace(cut, dim=None))
    ids = self.tokenizer.encode([prompt + t for t in texts], config.export.max_seq_length)
    params = slice_params(self.params, cut)
    batching = Batching(lengths=[128], rows=lambda _: len(texts))
    found = encode_batched(model, params, ids, [model.layers], batching)
    return np.asarray(truncate(found[0], cut.dim))


def trained(data: pathlib.Path, **overrides: Any) -> Trained:
  sizes = {"model.layers": 4, "matryoshka.exits": (1, 2, 3, 4)}
  config = from_mapping(material.config_dict(data, **sizes | overrides))
  tokenizer = Tokenizer(data / "tokenizer.json", config.data.pooled_token)
  return Trained(run_of(config), material.random_params(config.model), tokenizer)


def run_of(config: Config) -> Run:
  datasets = {
    "train/bitext.parquet": {
      **material.entry("bitext", 4, "Retrieve translations."),
      "rows": 3000,
      "n_languages": 3,
      "languages": {
        **{"no": 1200, "zh-hans": 900, "zh-hant": 500, "Python": 2000, "de": 400},
        **{"iw": 600, "heb_Hebr": 500},  # one language, of more than 1,000 rows
      },
      "licence": "MIT",
      "source": "phrases",
    },
    "train/questions.parquet": material.entry("retrieval", 7, "Answer the question."),
    "train/titles.parquet": material.entry("retrieval", 7, "Find the text of the title."),
    "train/topics.parquet": material.entry("clustering", 9, "Find the topic."),
  }
  return Run(config, datasets, "f" * 64)


def read(path: pathlib.Path) -> Any:
  return json.loads(path.read_text(encoding="utf-8"))


def load_st(folder: pathlib.Path, remote: bool = False) -> SentenceTransformer:
  return SentenceTransformer(
    str(folder),
    device="cpu",
    trust_remote_code=remote,
    model_kwargs={"torch_dtype": torch.float32},
  )


def parity_difference(folder: pathlib.Path) -> float:
  """Returns the largest difference between parity.json and sentence-transformers."""
  model, stated = load_st(folder), read(folder / "parity.json")
  largest = 0.0
  for item in stated["items"]:
    stored = parity.embedding(item)
    assert stored.shape == (stated["dim"],)
    model.max_seq_length = item.get("max_length", 128)
    theirs = model.encode(item["text"], prompt_name=item["prompt_name"] or "document")
    largest = max(largest, float(np.abs(stored - theirs).max()))
  return largest
