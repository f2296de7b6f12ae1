"""One record of a prepared dataset: a text's token ids, and a row's references to other texts.

Records are `tf.train.Example` messages in ArrayRecord files, as TensorFlow Datasets writes and
reads them; TensorFlow itself is not needed. Writing and reading the messages directly is 7 and 20
times as fast as through the library's feature classes.
"""

import dataclasses
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from jaxtyping import Int32, Int64, UInt32
from tensorflow_datasets.proto import tf_example_pb2

from mlembed_jax.data.names import shard_name
from mlembed_jax.errors import DataError

# Its classes are made at import, where type checkers do not see them.
proto: Any = tf_example_pb2

TRAIN, VALIDATION, DOCUMENTS = "train", "validation", "documents"
# Records per compressed group. Rows: what TensorFlow Datasets and grain advise. A reader holds 8
# bytes per group: for 400 million documents, each alone, that would be 3 GB in every process.
GROUP = {TRAIN: 1, VALIDATION: 1, DOCUMENTS: 16}
# Nothing is read ahead: rows are read in random order. With a buffer of 4 kB instead of the default
# 1 MB that is 20 times as fast.
READER = "readahead_buffer_size:0,max_parallelism:0"
BUFFER = 4096
READ = 4096  # records that are read at a time where all are


@dataclasses.dataclass(frozen=True)
class Text:
  """Token ids of a bare text, and how they begin as a query."""

  tokens: Int32[np.ndarray, "T"]
  # `Query: ` merges with the first letters: as a query, `head` stands for the first `skip` tokens.
  # Empty for documents that are never queries.
  head: Int32[np.ndarray, "H"]
  skip: int
  hash: UInt32[np.ndarray, "2"]  # 64 bits of the bare text

  def after(self, prefix: Sequence[int] | np.ndarray) -> Int32[np.ndarray, "I"]:
    """Returns the ids of the text as a query, after those of an instruction."""
    return np.concatenate([np.asarray(prefix, np.int32), self.head, self.tokens[self.skip :]])

  @property
  def longest(self) -> int:
    """Tokens of the longer of the two forms."""
    return len(self.tokens) + max(0, len(self.head) - self.skip)


@dataclasses.dataclass(frozen=True)
class Row:
  """What the record of a query holds beside its text; records of documents hold none of it."""

  dataset: str  # file of the manifest
  language: str
  row: int  # of the file, counted from 0
  score: float  # of scored pairs
  positives: Int64[np.ndarray, "P"]  # places in the split `documents`
  negatives: Int64[np.ndarray, "K"]


_NOTHING = Row("", "", -1, 0.0, np.empty(0, np.int64), np.empty(0, np.int64))


def features() -> Any:
  """Returns the features of a record as TensorFlow Datasets describes them."""
  import tensorflow_datasets as tfds  # seconds; readers of records do not need it

  def ids(dtype: Any, size: int | None = None) -> Any:
    return tfds.features.Tensor(shape=(size,), dtype=dtype, encoding="bytes")

  return tfds.features.FeaturesDict(
    {
      "tokens": ids(np.int32),
      "head": ids(np.int32),
      "skip": tfds.features.Scalar(np.int32),
      "hash": ids(np.uint32, 2),
      "dataset": tfds.features.Text(),
      "language": tfds.features.Text(),
      "row": tfds.features.Scalar(np.int64),
      "score": tfds.features.Scalar(np.float32),
      "positives": ids(np.int64),
      "negatives": ids(np.int64),
    }
  )


def encode_record(text: Text, row: Row = _NOTHING) -> bytes:
  """Returns the message of a document, or of a query with its row."""
  message = proto.Example()
  feature = message.features.feature
  for name, array in (
    ("tokens", text.tokens),
    ("head", text.head),
    ("hash", text.hash),
    ("positives", row.positives),
    ("negatives", row.negatives),
  ):
    feature[name].bytes_list.value.append(array.tobytes())
  feature["skip"].int64_list.value.append(text.skip)
  feature["row"].int64_list.value.append(row.row)
  feature["score"].float_list.value.append(row.score)
  feature["dataset"].bytes_list.value.append(row.dataset.encode())
  feature["language"].bytes_list.value.append(row.language.encode())
  return message.SerializeToString(deterministic=True)


def _array(feature: Any, name: str, dtype: Any) -> np.ndarray:
  return np.frombuffer(feature[name].bytes_list.value[0], dtype)


def decode_text(message: bytes) -> Text:
  """Returns the text of a message."""
  return _text(proto.Example.FromString(message).features.feature)


def decode_record(message: bytes) -> tuple[Text, Row]:
  """Returns the text and the row of a query's message."""
  feature = proto.Example.FromString(message).features.feature
  row = Row(
    feature["dataset"].bytes_list.value[0].decode(),
    feature["language"].bytes_list.value[0].decode(),
    feature["row"].int64_list.value[0],
    feature["score"].float_list.value[0],
    _array(feature, "positives", np.int64),
    _array(feature, "negatives", np.int64),
  )
  return _text(feature), row


def _text(feature: Any) -> Text:
  return Text(
    _array(feature, "tokens", np.int32),
    _array(feature, "head", np.int32),
    feature["skip"].int64_list.value[0],
    _array(feature, "hash", np.uint32),
  )


def write_shard(path: pathlib.Path, split: str, messages: Iterable[bytes]) -> int:
  """Writes a shard of a split; returns the bytes of its messages."""
  writer, size = ArrayRecordWriter(str(path), f"group_size:{GROUP[split]}"), 0
  for message in messages:
    writer.write(message)
    size += len(message)
  writer.close()
  return size


def read_shard(path: pathlib.Path) -> Iterator[bytes]:
  """Yields all messages of a shard; raises DataError where one is damaged."""
  reader = ArrayRecordReader(str(path))
  try:
    for start in range(0, reader.num_records(), READ):
      yield from reader.read(start, min(start + READ, reader.num_records()))
  except (ValueError, RuntimeError, IndexError) as error:
    raise DataError(f"{path}: damaged: {error}; delete it and run the command again") from error


class Records:
  """Random access to the records of one split; its files are opened when first read."""

  def __init__(self, folder: pathlib.Path, split: str, shards: list[int]):
    """Opens nothing yet; `shards` are the numbers of records of each shard."""
    self._paths = [folder / shard_name(split, i, len(shards)) for i in range(len(shards))]
    self._sizes = shards
    self._starts = np.concatenate([[0], np.cumsum(shards, dtype=np.int64)])
    self._readers: dict[int, Any] = {}

  def __len__(self) -> int:
    return int(self._starts[-1])

  def __getstate__(self) -> dict[str, Any]:
    return self.__dict__ | {"_readers": {}}  # another process opens its own

  @property
  def shards(self) -> list[int]:
    """How many records each shard has."""
    return list(self._sizes)

  def place(self, index: int) -> tuple[int, int]:
    """Returns shard and place in it of a record of the split."""
    shard = int(np.searchsorted(self._starts, index, side="right")) - 1
    return shard, index - int(self._starts[shard])

  def __getitem__(self, index: int) -> bytes:
    """Returns a message; raises DataError where the file cannot be read."""
    shard, place = self.place(index)
    try:
      if shard not in self._readers:
        self._readers[shard] = self._opened(shard)
      return self._readers[shard].read(place, place + 1)[0]
    except (ValueError, RuntimeError, IndexError, OSError) as error:
      self._readers.pop(shard, None)
      raise DataError(
        f"{self._paths[shard]}: record {place} cannot be read: {error}; restore the file, or run "
        "the command that prepared the dataset again: it writes what is missing or damaged"
      ) from error

  def _opened(self, shard: int) -> Any:
    path = self._paths[shard]
    if not path.is_file():  # the library would find a file of no records
      raise OSError("the file is missing")
    reader = ArrayRecordReader(str(path), READER, file_reader_buffer_size=BUFFER)
    if (found := reader.num_records()) != self._sizes[shard]:
      raise OSError(f"the file has {found} records, {self._sizes[shard]} were written")
    return reader
