"""The names of files that more than one module writes or reads."""

from mlembed_jax.data.manifest import File

MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"
CATALOG = "catalog.json"
REPORT = "prepare_report.json"
METADATA = ("features.json", "dataset_info.json")  # named and read by TensorFlow Datasets

DATASET = "mlembed"
LENGTHS, VECTORS = ".lengths.npy", ".vectors.npy"  # files beside a shard of rows
CHECKSUMS = ".crc32.npy"  # follows the name of a file whose rows have checksums


def shard_name(split: str, shard: int, shards: int) -> str:
  """Returns the name of a shard's file."""
  return f"{DATASET}-{split}.array_record-{shard:05d}-of-{shards:05d}"


def suffixes(file: File) -> list[str]:
  """Returns what follows the name of a shard of rows in the names of its files."""
  return ["", LENGTHS, *([VECTORS, VECTORS + CHECKSUMS] if file.vectors else [])]


def names_of_rows(file: File, split: str, shard: int, shards: int) -> list[str]:
  """Returns the names of all files of a shard of rows."""
  return [shard_name(split, shard, shards) + suffix for suffix in suffixes(file)]
