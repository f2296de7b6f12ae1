"""The model families that can be trained, imported and exported, and all that differs between them.

A new family is a row of the table, and the code of the layers that set it apart.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Family:
  """A decoder with RMSNorm before attention and MLP, rotary embedding and SwiGLU."""

  name: str  # model_type of config.json, and the module in transformers
  architecture: str  # class of transformers that config.json names
  gguf: str  # name of the architecture in gguf.MODEL_ARCH, for llama.cpp
  paper: str
  qk_norm: bool = False  # RMSNorm on every query and key head
  qkv_bias: bool = False  # a bias on queries, keys and values
  # What a config.json without these keys means, as transformers has it; the base is that of all.
  max_position_embeddings: int = 32768
  num_key_value_heads: int | None = None  # None: as many as there are heads
  head_dim: int | None = None  # None: the width over the heads
  rope_theta: float = 10_000.0
  rms_norm_eps: float = 1e-6
  # Keys that every config.json of the family states, of those that others may leave out.
  stated_keys: tuple[str, ...] = ()

  @property
  def title(self) -> str:
    """Returns the name as prose writes it; its classes in transformers begin with it."""
    return self.architecture.removesuffix("ForCausalLM")


FAMILIES = {
  family.name: family
  for family in (
    Family(
      name="qwen3",
      architecture="Qwen3ForCausalLM",
      gguf="QWEN3",
      paper="arXiv:2505.09388",
      qk_norm=True,
      num_key_value_heads=32,
      head_dim=128,
      stated_keys=("head_dim", "attention_bias"),
    ),
    Family(
      name="qwen2",
      architecture="Qwen2ForCausalLM",
      gguf="QWEN2",
      paper="arXiv:2407.10671",
      qkv_bias=True,
      num_key_value_heads=32,
    ),
    Family(
      name="llama",
      architecture="LlamaForCausalLM",
      gguf="LLAMA",
      paper="arXiv:2302.13971",
      max_position_embeddings=2048,
    ),
  )
}
