"""The programs that read an exported folder, one row each, and what each depends on.

A check names the fact that is broken; this table alone says whom that concerns. To add a program:

1. Write a row of CONSUMERS. `needs` are the files without which the program fails; `reads` are the
   other files, and the members of `Fact`, that it depends on. Its source has the answers.
2. Where the program can be loaded from Python, write a function beside those of `installed.py` and
   name it in the row as `load`. The doctor then compares its vectors with parity.json.

What the doctor prints and what an export refuses follow from the row. Where the program depends on
something that no check looks at, add a member of `Fact`, or of `File`, and a check that names it.
"""

import dataclasses
import enum

from mlembed_jax.hf.checks import installed, vectors
from mlembed_jax.hf.checks.finding import CheckFunction, File
from mlembed_jax.hf.onnx_graph import FILE as ONNX_FILE
from mlembed_jax.hf.parity import FILE as PARITY


class Fact(enum.StrEnum):
  """What programs depend on, beside whole files."""

  MODEL = "sizes, weights and vocabulary"  # on which all programs depend
  # Keys of JSON files, by their names.
  ACTIVATION_FUNCTION = "activation_function"
  AUTO_MAP = "auto_map"
  DO_LOWER_CASE = "do_lower_case"
  EMBEDDING_DIMENSION = "embedding_dimension"
  EOS_TOKEN_ID = "eos_token_id"
  LAYER_TYPES = "layer_types"
  MATRYOSHKA_DIMENSIONS = "matryoshka_dimensions"
  MAX_SEQ_LENGTH = "max_seq_length"
  MODEL_TYPE = "model_type"
  ROPE_PARAMETERS = "rope_parameters"
  ROPE_THETA = "rope_theta"
  TOKENIZER_CLASS = "tokenizer_class"
  TRANSFORMERS_VERSION = "transformers_version"
  WORD_EMBEDDING_DIMENSION = "word_embedding_dimension"
  # What a program does with the folder.
  LAST_TOKEN = "the state of the last token becomes the embedding"
  FIRST_COORDINATES = "the embedding is cut to its first coordinates"
  DENSE_MODULE = "the Dense module, which does the cut, is applied"
  WHOLE_WIDTH = "the Dense module is not applied"
  TEXT_LENGTH = "texts are cut to the length that is allowed"
  TWO_FACTORS = "a token table that is stored as two factors is read"
  POOLING_FLAGS = "each flag of 1_Pooling/config.json is looked up"
  MODULE_TYPES = "types in modules.json have the names that sentence-transformers 5.1 gives them"
  EVERY_KEY = "each key of a JSON file must be there, with its type"
  TEXT_PROMPTS = "a prompt must be a string"
  NO_CLASSIFIER = "a key of a classifier makes the model a classifier"
  WEIGHTS_METADATA = "the metadata of the weights must name their format"
  EVERY_SAFETENSORS = "each safetensors file of the folder is taken for weights"
  GGUF = "the converter of llama.cpp makes GGUF of the folder"


@dataclasses.dataclass(frozen=True)
class Consumer:
  """A program that reads exported folders."""

  name: str
  needs: tuple[File, ...]  # files without which it fails
  reads: tuple[str, ...]  # facts that it depends on, and files that it can do without
  load: CheckFunction | None = None  # compares its vectors with parity.json, where it is installed
  own_file: str = ""  # the one file that it reads instead of the others

  def depends_on(self, fact: str) -> bool:
    """Returns whether it concerns the program when the fact is broken."""
    return fact in (self.name, *self.needs, *self.reads) or (
      fact == Fact.MODEL and not self.own_file
    )


TEI = "TEI"

# What AutoModel and AutoTokenizer read, also for sentence-transformers.
AUTO_CLASSES = (
  *(Fact.AUTO_MAP, Fact.LAYER_TYPES, Fact.ROPE_PARAMETERS, Fact.ROPE_THETA, Fact.TOKENIZER_CLASS),
  *(Fact.TRANSFORMERS_VERSION, Fact.TWO_FACTORS, Fact.WEIGHTS_METADATA),
)
CONSUMERS = (
  Consumer(
    vectors.OURS,
    needs=(File.CONFIG, File.TOKENIZER, File.PROMPTS),
    reads=(
      *(File.OWN, PARITY, File.MODULES, File.POOLING, File.BERT, Fact.DENSE_MODULE),
      *(Fact.FIRST_COORDINATES, Fact.LAST_TOKEN, Fact.MODEL_TYPE, Fact.TEXT_LENGTH),
      Fact.TWO_FACTORS,
    ),
  ),
  Consumer(
    installed.ST,
    needs=(
      *(File.CONFIG, File.TOKENIZER, File.TOKENIZER_CONFIG, File.MODULES, File.PROMPTS),
      File.BERT,
    ),
    reads=(
      *(File.CARD, *AUTO_CLASSES, Fact.DENSE_MODULE, Fact.EMBEDDING_DIMENSION),
      *(Fact.FIRST_COORDINATES, Fact.LAST_TOKEN, Fact.MODULE_TYPES),
      *(Fact.TEXT_LENGTH, Fact.WORD_EMBEDDING_DIMENSION, File.POOLING),
    ),
    load=installed.sentence_transformers,
  ),
  Consumer(
    installed.TRANSFORMERS,
    needs=(File.CONFIG, File.TOKENIZER, File.TOKENIZER_CONFIG),
    reads=AUTO_CLASSES,
    load=installed.transformers,
  ),
  Consumer(
    TEI,
    needs=(File.CONFIG, File.TOKENIZER, File.MODULES, File.BERT),
    reads=(
      *(Fact.ACTIVATION_FUNCTION, Fact.DENSE_MODULE, Fact.EOS_TOKEN_ID, Fact.EVERY_KEY),
      *(Fact.FIRST_COORDINATES, Fact.LAST_TOKEN, Fact.MAX_SEQ_LENGTH, Fact.MODULE_TYPES),
      *(Fact.NO_CLASSIFIER, Fact.POOLING_FLAGS, Fact.ROPE_THETA, Fact.TEXT_LENGTH),
      *(Fact.TEXT_PROMPTS, Fact.WORD_EMBEDDING_DIMENSION, File.POOLING),
    ),
  ),
  Consumer(
    "vLLM",
    needs=(File.CONFIG, File.TOKENIZER, File.TOKENIZER_CONFIG, File.MODULES, File.BERT),
    reads=(
      *(Fact.ACTIVATION_FUNCTION, Fact.DENSE_MODULE, Fact.DO_LOWER_CASE, Fact.EVERY_KEY),
      *(Fact.EVERY_SAFETENSORS, Fact.FIRST_COORDINATES, Fact.LAST_TOKEN, Fact.LAYER_TYPES),
      *(Fact.MATRYOSHKA_DIMENSIONS, Fact.MODULE_TYPES, Fact.ROPE_THETA, Fact.TEXT_LENGTH),
      *(Fact.TOKENIZER_CLASS, Fact.TWO_FACTORS, File.POOLING),
    ),
  ),
  Consumer(
    installed.LLAMA,
    needs=(File.CONFIG, File.TOKENIZER, File.TOKENIZER_CONFIG, File.MODULES),
    reads=(
      *(Fact.GGUF, Fact.LAST_TOKEN, Fact.POOLING_FLAGS, Fact.ROPE_THETA, Fact.WHOLE_WIDTH),
      File.POOLING,
    ),
    load=installed.llama_cpp,
  ),
  Consumer(installed.ONNX, needs=(), reads=(), load=installed.onnxruntime, own_file=ONNX_FILE),
)


def concerned(fact: str) -> tuple[str, ...]:
  """Returns the names of the programs that depend on a `Fact`, a file, or their own vectors."""
  return tuple(consumer.name for consumer in CONSUMERS if consumer.depends_on(fact))


def needed_files() -> list[File]:
  """Returns the files without which some program fails."""
  return [file for file in File if any(file in consumer.needs for consumer in CONSUMERS)]
