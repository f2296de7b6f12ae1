"""A Qwen3 body whose token table is the product of two factors, for trust_remote_code=True."""

import torch
from transformers.models.qwen3.modeling_qwen3 import Qwen3Model

from .configuration_mlembed import MLEmbedQwen3Config


class FactorisedEmbedding(torch.nn.Module):
  """Rows of `u` [vocab, rank], then the map `v` [width, rank]."""

  def __init__(self, vocab: int, rank: int, width: int):
    super().__init__()
    self.u = torch.nn.Embedding(vocab, rank)
    self.v = torch.nn.Linear(rank, width, bias=False)

  @property
  def weight(self) -> torch.Tensor:
    """The first factor: transformers reads its dtype and its number of rows."""
    return self.u.weight

  def forward(self, ids: torch.Tensor) -> torch.Tensor:
    """Returns the vectors of token ids."""
    return self.v(self.u(ids))


class MLEmbedQwen3Model(Qwen3Model):
  """Qwen3 with a factorised token table."""

  config_class = MLEmbedQwen3Config

  def __init__(self, config: MLEmbedQwen3Config):
    super().__init__(config)
    rank = config.embedding_rank or 0
    self.embed_tokens = FactorisedEmbedding(config.vocab_size, rank, config.hidden_size)
