"""Configuration of a Qwen3 body whose token table is the product of two factors."""

from transformers.models.qwen3.configuration_qwen3 import Qwen3Config


class MLEmbedQwen3Config(Qwen3Config):
  """Qwen3 with `embedding_rank`, the inner size of the factors of the token table."""

  model_type = "mlembed_qwen3"
  # transformers 5 makes a dataclass of annotated fields, 4 reads __init__: both are needed.
  embedding_rank: int | None = None

  def __init__(self, embedding_rank: int | None = None, **kwargs):
    self.embedding_rank = embedding_rank
    super().__init__(**kwargs)
