"""The part of the model card that says how each program uses the folder."""

import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

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
**vLLM.** A server of the OpenAI interface, in the precision of the vectors above:

```bash
vllm serve ./{name} --runner pooling --dtype float32{code}
```

This interface knows no prompts, so put them before a text; `/v2/embed`, that of Cohere, takes the
name of one as `input_type`. `dimensions` may be {dims} (`matryoshka_dimensions` of `config.json`);
without it vectors have {dim}:

```bash
curl http://localhost:8000/v1/embeddings -H "Content-Type: application/json" -d {request}
```

{tei}"""
TEI = "The layout is also that which text-embeddings-inference reads{on}. It was not run."
TEI_ON_CUDA = ", which serves this architecture on CUDA alone"
ON_FACTORS = """\
The token table is stored as two factors, which the code of this folder multiplies row by row.
text-embeddings-inference needs the folder with the merged table."""
ONNX = """\
**ONNX.** `{file}` holds the weights in {precision}, for ONNX Runtime and what is built on it. Its
output `sentence_embedding` has {dim} coordinates and unit length.

```python
from sentence_transformers import SentenceTransformer

# pip install "sentence-transformers[onnx]<6", as version 6 refuses what optimum-onnx 0.1.0 requires
model = SentenceTransformer("{name}", backend="onnx"{code})
queries = model.encode_query(["how do I boil an egg?"])
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
const query = {prompt} + "how do I boil an egg?"; // prompts are added by hand
const inputs = tokenizer([query], {{ padding: true }});
const {{ sentence_embedding }} = await model(inputs);
```"""
GGUF = """\
**llama.cpp.** {files} say how texts are split, which token ends them and which state is taken:

```bash
llama-server --embedding --model ./{name}/{file}
```

```bash
curl http://localhost:8080/v1/embeddings -H "Content-Type: application/json" -d {request}
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


def use(
  variant: Variant, prompts: Mapping[str, str], ranges_file: str | None, gguf: Sequence[str]
) -> str:
  """Returns the part; `ranges_file` is that of int8 vectors, `gguf` are the GGUF files."""
  code = remote_code(variant)
  parts = [
    START.format(name=variant.name, code=code),
    _servers(variant, prompts["query"]),
    _onnx(variant, prompts["query"], code) if variant.forms.onnx else "",
    _gguf(variant, prompts["query"], gguf) if gguf else NO_GGUF,
    _int8(variant, ranges_file),
  ]
  return "\n\n".join(part for part in parts if part)


def remote_code(variant: Variant) -> str:
  """Returns the argument that a folder of factors needs wherever it is loaded."""
  return ", trust_remote_code=True" if variant.forms.factors else ""


def _servers(variant: Variant, prompt: str) -> str:
  asked = {"model": f"./{variant.name}", "dimensions": variant.dims[-2:][0]}
  factors = variant.forms.factors
  on = "" if variant.body.family == "qwen3" else TEI_ON_CUDA
  return SERVERS.format(
    name=variant.name,
    code=" --trust-remote-code" if factors else "",
    dims=listed(variant.dims),
    dim=variant.dim,
    request=_request(prompt, asked),
    tei=ON_FACTORS if factors else TEI.format(on=on),
  )


def _request(prompt: str, fields: Mapping[str, Any]) -> str:
  """Returns the body of a request, quoted for a shell."""
  body = {"input": prompt + "how do I boil an egg?", **fields}
  return shlex.quote(json.dumps(body, ensure_ascii=False))


def listed(sizes: Iterable[int]) -> str:
  """Returns sizes with commas between them."""
  return ", ".join(map(str, sizes))


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


def _gguf(variant: Variant, prompt: str, files: Sequence[str]) -> str:
  width = variant.body.width
  zeros = f", of which those after the first {variant.dim} are 0" if variant.dim < width else ""
  return GGUF.format(
    files=", ".join(f"`{file}`" for file in files),
    file=files[0],
    name=variant.name,
    request=_request(prompt, {}),
    width=width,
    zeros=zeros,
  )


def _int8(variant: Variant, file: str | None) -> str:
  if file is None:
    return NO_INT8
  return INT8.format(file=file, name=variant.name, depth=variant.depth, dim=variant.dim)
