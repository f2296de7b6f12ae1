"""The part of the model card that says how each program uses the folder."""

import json
from collections.abc import Mapping, Sequence

from mlembed_jax.hf import onnx_graph
from mlembed_jax.hf.config_files import Variant

START = """\
```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("{name}"{code})
queries = model.encode_query(["how do I boil an egg?"])
documents = model.encode_document(["Put the egg in boiling water for eight minutes."])
print(model.similarity(queries, documents))
```

sentence-transformers 6 computes in the stored dtype, 5 in float32; for float32 in both give
`model_kwargs={{"torch_dtype": torch.float32}}`. `parity.json` holds texts and their vectors, to
compare any program with."""
SERVERS = """\
A server of the OpenAI interface, in the precision of the vectors above, and with `"dimensions": N`
in a request for shorter ones:

```bash
vllm serve ./{name} --runner pooling --dtype float32
```

The layout is also that which text-embeddings-inference reads{tei}. The export runs neither."""
TEI_ON_CUDA = ", which serves this architecture on CUDA alone"
ONNX = """\
**ONNX.** `{file}` holds the weights in {precision}, for ONNX Runtime and what is built on it. Its
output `sentence_embedding` has {dim} coordinates and unit length.

```python
from sentence_transformers import SentenceTransformer

# pip install "sentence-transformers[onnx]"
model = SentenceTransformer("{name}", backend="onnx"{code})
```

```python
from fastembed import TextEmbedding
from fastembed.common.model_description import ModelSource, PoolingType

TextEmbedding.add_custom_model(
  model="{name}",
  dim={dim},
  pooling=PoolingType.DISABLED,
  normalization=False,
  sources=ModelSource(hf="{name}"),
  model_file="{file}",
  output_name="sentence_embedding",
)
model = TextEmbedding("{name}", specific_model_path="./{name}")
queries = list(model.embed([{prompt} + "how do I boil an egg?"]))  # prompts are added by hand
```

```js
import {{ AutoModel, AutoTokenizer, env }} from "@huggingface/transformers";

env.localModelPath = ".";
const tokenizer = await AutoTokenizer.from_pretrained("{name}");
// dtype chooses among the names of files, and this is the plain one.
const model = await AutoModel.from_pretrained("{name}", {{ dtype: "fp32" }});
// Shorten texts of more than {max_length} tokens before: it would cut the token that ends a text.
const inputs = tokenizer(["how do I boil an egg?"], {{ padding: true }});
const {{ sentence_embedding }} = await model(inputs);
```"""
GGUF = """\
**llama.cpp.** {files} say how texts are split, which token ends them and which state is taken:

```bash
llama-server --embedding --model ./{name}/{file}
```

Vectors have {width} coordinates{zeros}. llama.cpp does not know prompts, so put them before a text;
it does not compose letters (Unicode NFC), so give composed text; and it refuses texts longer than
`--ubatch-size` instead of cutting them."""
NO_GGUF = """\
llama.cpp reads GGUF files: `python -m mlembed_jax.export --gguf q8_0` writes one. The converter of
llama.cpp leaves out what the module Dense does, and stops at vocabularies that it does not know."""
INT8 = """\
**int8.** Round queries and documents by the same ranges: those of `{file}` were measured
on training texts, for each depth and dimension.

```python
from safetensors.numpy import load_file
from sentence_transformers.util.quantization import quantize_embeddings

low, high = ranges = load_file("{name}/{file}")["l{depth}-d{dim}"]
codes = quantize_embeddings(documents, "int8", ranges=ranges)
decoded = low + (codes.astype("float32") + 128.5) * (high - low) / 255
```

Decode codes before they are compared, or re-rank what they find: cosines and products of the codes
themselves order texts in another way."""
NO_INT8 = """\
**int8.** This folder has no ranges: its export had no training texts at hand. Take them from at
least 100 texts, and round queries and documents by the same ones."""
FACTORS_ONLY = """\
The token table is stored as two factors, which the code of this folder multiplies row by row.
vLLM reads it, too; text-embeddings-inference needs the folder with the merged table.

```bash
vllm serve ./{name} --runner pooling --dtype float32 --trust-remote-code
```"""


def use(
  variant: Variant, prompts: Mapping[str, str], ranges_file: str | None, gguf: Sequence[str]
) -> str:
  """Returns the part; `ranges_file` is that of int8 vectors, `gguf` are the GGUF files."""
  code = ", trust_remote_code=True" if variant.forms.factors else ""
  parts = [
    START.format(name=variant.name, code=code),
    _servers(variant),
    _onnx(variant, prompts["query"], code) if variant.forms.onnx else "",
    _gguf(variant, gguf) if gguf else NO_GGUF,
    _int8(variant, ranges_file),
  ]
  return "\n\n".join(part for part in parts if part)


def _servers(variant: Variant) -> str:
  if variant.forms.factors:
    return FACTORS_ONLY.format(name=variant.name)
  tei = "" if variant.body.family == "qwen3" else TEI_ON_CUDA
  return SERVERS.format(name=variant.name, tei=tei)


def _onnx(variant: Variant, prompt: str, code: str) -> str:
  return ONNX.format(
    file=onnx_graph.FILE,
    precision=variant.forms.onnx,
    name=variant.name,
    dim=variant.dim,
    code=code,
    prompt=json.dumps(prompt, ensure_ascii=False),
    max_length=variant.run.config.export.max_seq_length,
  )


def _gguf(variant: Variant, files: Sequence[str]) -> str:
  width = variant.body.width
  zeros = f", of which those after the first {variant.dim} are 0" if variant.dim < width else ""
  listed = ", ".join(f"`{file}`" for file in files)
  return GGUF.format(files=listed, file=files[0], name=variant.name, width=width, zeros=zeros)


def _int8(variant: Variant, file: str | None) -> str:
  if file is None:
    return NO_INT8
  return INT8.format(file=file, name=variant.name, depth=variant.depth, dim=variant.dim)
