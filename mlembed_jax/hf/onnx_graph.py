"""The encoder as an ONNX graph, which sentence-transformers, fastembed and transformers.js run.

Inputs are `input_ids` and `attention_mask`, int64 [batch, tokens], padded on either side. There is
no `position_ids`, as none of these programs gives it. Outputs are `last_hidden_state`, float32
[batch, tokens, width], for programs that pool by themselves, and `sentence_embedding`, float32
[batch, dim]: the state of the last token, cut, and of unit length.

All operators are of the standard set, so that any runtime reads the file. With `int8` every kernel
holds codes with a scale for each output, and the token table with one for each row; what is
computed stays float32, unless a runtime chooses otherwise. ONNX Runtime from 1.25 on multiplies
codes and rounds the states of each token by themselves, so that no vector depends on its batch.
"""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mlembed_jax import __version__
from mlembed_jax.config_fields import ModelConfig
from mlembed_jax.files import storage_errors
from mlembed_jax.hf import param_mapping
from mlembed_jax.hf.config_files import INT8, Variant
from mlembed_jax.hf.extras import require

FILE = "onnx/model.onnx"
OPSET, IR_VERSION = 18, 9  # ONNX Runtime reads them from 1.14 on
# A protocol buffer holds less than 2 GiB; weights of more stand in a file of their own.
MOST_BYTES = 1_800_000_000
UNSEEN = -1e30  # finite, so that the padding before a text, which sees nothing, is not NaN
CODES = 127  # int8 codes are symmetric


class _Graph:
  """Nodes and arrays of a graph that is being built; values are known by their names."""

  def __init__(self, onnx: Any):
    self.onnx, self.nodes, self.arrays = onnx, [], []

  def add(self, op: str, *inputs: str, name: str = "", **attributes: Any) -> str:
    """Adds a node, and returns the name of its output."""
    name = name or f"{op}_{len(self.nodes)}"
    self.nodes.append(self.onnx.helper.make_node(op, inputs, [name], name=name, **attributes))
    return name

  def array(self, value: Any, dtype: str = "float32", name: str = "") -> str:
    """Adds an array, and returns its name."""
    name = name or f"constant_{len(self.arrays)}"
    array = np.ascontiguousarray(np.asarray(value, dtype)).reshape(np.shape(value))
    self.arrays.append(self.onnx.numpy_helper.from_array(array, name))
    return name

  def ints(self, *values: int) -> str:
    """Adds a vector of whole numbers, such as the axes or the shape that a node takes."""
    return self.array(values, "int64")


class _Encoder:
  """Adds the nodes of an encoder to a graph."""

  def __init__(self, graph: _Graph, model: ModelConfig, params: Mapping[str, Any], int8: bool):
    self.graph, self.model, self.int8 = graph, model, int8
    self.params = params
    self.tensors = {t.name: t for t in param_mapping.tensors(model)}

  def add_all(self, dim: int) -> None:
    """Adds everything between the inputs and the outputs."""
    g, c = self.graph, self.model
    states_BTD = self.embed()
    turns, unseen = self.turns(), self.unseen()
    for layer in range(c.layers):
      prefix = f"layers.{layer}."
      normed = self.norm(states_BTD, f"{prefix}input_layernorm.weight")
      states_BTD = g.add("Add", states_BTD, self.attention(normed, prefix, turns, unseen))
      normed = self.norm(states_BTD, f"{prefix}post_attention_layernorm.weight")
      states_BTD = g.add("Add", states_BTD, self.mlp(normed, prefix))
    states_BTD = self.norm(states_BTD, "norm.weight", name="last_hidden_state")
    self.pool(states_BTD, dim)

  def weight(self, name: str) -> np.ndarray:
    """Returns a tensor in the layout of the folder, float32."""
    return param_mapping.tensor_of(self.params, self.tensors[name])

  def embed(self) -> str:
    """Returns the rows of the token table, [B, T, D]."""
    if not self.model.rank:
      return self.rows(param_mapping.TABLE[1])
    (_, u, _), (_, v, _) = param_mapping.FACTORS
    return self.linear(self.rows(u), v.removesuffix(".weight"))

  def rows(self, name: str) -> str:
    """Returns the rows of a table that the tokens select."""
    g, table_VD = self.graph, self.weight(name)
    if not self.int8:
      return g.add("Gather", g.array(table_VD, name=name), "input_ids")
    codes_VD, scales_V1 = _codes(table_VD, axis=1)
    rows = g.add("Gather", g.array(codes_VD, "int8", name), "input_ids")
    scales = g.add("Gather", g.array(scales_V1, name=f"{name}.scale"), "input_ids")
    return g.add("Mul", g.add("Cast", rows, to=g.onnx.TensorProto.FLOAT), scales)

  def linear(self, x: str, name: str) -> str:
    """Returns the product with a weight, which is [out, in] in the folder."""
    g, kernel = self.graph, self.weight(f"{name}.weight").T
    if not self.int8:
      return g.add("MatMul", x, g.array(kernel, name=f"{name}.weight"))
    codes, scales = _codes(kernel, axis=0)
    stored = g.array(codes, "int8", f"{name}.weight")
    zeros = g.array(np.zeros(scales.size), "int8")
    scale = g.array(scales.reshape(-1), name=f"{name}.scale")
    return g.add("MatMul", x, g.add("DequantizeLinear", stored, scale, zeros, axis=1))

  def norm(self, x: str, weight: str, name: str = "") -> str:
    """Returns scale * x / rms(x), in the form that ONNX Runtime knows and makes one operation."""
    g = self.graph
    square = g.add("Pow", x, g.array(2.0))
    mean = g.add("ReduceMean", square, g.ints(-1), keepdims=1)
    root = g.add("Sqrt", g.add("Add", mean, g.array(self.model.norm_eps)))
    return g.add("Mul", g.add("Div", x, root), g.array(self.weight(weight), name=weight), name=name)

  def turns(self) -> tuple[str, str]:
    """Returns cosine and sine of the rotary angles, [B, 1, T, K]; positions count what is seen."""
    g, c = self.graph, self.model
    counted = g.add("CumSum", "attention_mask", g.array(1, "int64"))
    positions = g.add("Max", g.add("Sub", counted, g.array(1, "int64")), g.array(0, "int64"))
    positions = g.add("Cast", positions, to=g.onnx.TensorProto.FLOAT)
    half = np.arange(0, c.head_dim, 2, dtype=np.float32) / c.head_dim
    frequencies = g.array(np.concatenate([1.0 / np.float32(c.rope_theta) ** half] * 2))
    angles = g.add("Mul", g.add("Unsqueeze", positions, g.ints(1, 3)), frequencies)
    return g.add("Cos", angles), g.add("Sin", angles)

  def unseen(self) -> str:
    """Returns what is added to the scores: nothing where a key is seen; [B, 1, 1, T, T]."""
    g = self.graph
    size = g.add("Shape", "input_ids", start=1, end=2)
    tokens = g.add("Range", *(g.array(0, "int64"), g.add("Squeeze", size), g.array(1, "int64")))
    earlier = g.add("GreaterOrEqual", g.add("Unsqueeze", tokens, g.ints(1)), tokens)
    real = g.add("Cast", "attention_mask", to=g.onnx.TensorProto.BOOL)
    seen = g.add("And", g.add("Unsqueeze", real, g.ints(1, 2, 3)), earlier)
    return g.add("Where", seen, g.array(0.0), g.array(UNSEEN))

  def attention(self, x: str, prefix: str, turns: tuple[str, str], unseen: str) -> str:
    """Returns the output of grouped-query attention, [B, T, D]; G groups have H heads each."""
    g, c = self.graph, self.model
    shares = c.heads // c.kv_heads
    q_BNTK = self.rotated(self.heads(x, f"{prefix}self_attn.q", c.heads), turns)
    k_BGTK = self.rotated(self.heads(x, f"{prefix}self_attn.k", c.kv_heads), turns)
    v_BGTK = self.heads(x, f"{prefix}self_attn.v", c.kv_heads)
    q_BNTK = g.add("Mul", q_BNTK, g.array(c.head_dim**-0.5))
    q_BGHTK = g.add("Reshape", q_BNTK, g.ints(0, c.kv_heads, shares, -1, c.head_dim))
    k_BGKT = g.add("Transpose", k_BGTK, perm=[0, 1, 3, 2])
    scores = g.add("MatMul", q_BGHTK, g.add("Unsqueeze", k_BGKT, g.ints(2)))
    weights = g.add("Softmax", g.add("Add", scores, unseen), axis=-1)
    out_BGHTK = g.add("MatMul", weights, g.add("Unsqueeze", v_BGTK, g.ints(2)))
    out_BNTK = g.add("Reshape", out_BGHTK, g.ints(0, c.heads, -1, c.head_dim))
    out_BTNK = g.add("Transpose", out_BNTK, perm=[0, 2, 1, 3])
    out = g.add("Reshape", out_BTNK, g.ints(0, 0, c.heads * c.head_dim))
    return self.linear(out, f"{prefix}self_attn.o_proj")

  def heads(self, x: str, name: str, heads: int) -> str:
    """Returns queries, keys or values, [B, heads, T, K], with their bias and norm."""
    g, c = self.graph, self.model
    out = self.linear(x, f"{name}_proj")
    if (bias := f"{name}_proj.bias") in self.tensors:
      out = g.add("Add", out, g.array(self.weight(bias), name=bias))
    out = g.add("Reshape", out, g.ints(0, 0, heads, c.head_dim))
    if (scale := f"{name}_norm.weight") in self.tensors:
      out = self.norm(out, scale)
    return g.add("Transpose", out, perm=[0, 2, 1, 3])

  def rotated(self, x: str, turns: tuple[str, str]) -> str:
    """Returns heads turned by their positions; the halves of a head are the pairs."""
    g, half = self.graph, self.model.head_dim // 2
    first = g.add("Slice", x, g.ints(0), g.ints(half), g.ints(3))
    second = g.add("Slice", x, g.ints(half), g.ints(2 * half), g.ints(3))
    crossed = g.add("Concat", g.add("Neg", second), first, axis=3)
    cosine, sine = turns
    return g.add("Add", g.add("Mul", x, cosine), g.add("Mul", crossed, sine))

  def mlp(self, x: str, prefix: str) -> str:
    """Returns the output of SwiGLU, [B, T, D]."""
    g = self.graph
    gate = self.linear(x, f"{prefix}mlp.gate_proj")
    gated = g.add("Mul", gate, g.add("Sigmoid", gate))
    hidden = g.add("Mul", gated, self.linear(x, f"{prefix}mlp.up_proj"))
    return self.linear(hidden, f"{prefix}mlp.down_proj")

  def pool(self, states: str, dim: int) -> None:
    """Adds `sentence_embedding`: the state of the last token that is no padding, cut to `dim`."""
    g = self.graph
    last = g.add("ArgMax", "attention_mask", axis=1, keepdims=1, select_last_index=1)
    state = g.add("GatherND", states, last, batch_dims=1)
    cut = g.add("Slice", state, g.ints(0), g.ints(dim), g.ints(1))
    length = g.add("Max", g.add("ReduceL2", cut, g.ints(1), keepdims=1), g.array(1e-12))
    g.add("Div", cut, length, name="sentence_embedding")


def write(folder: pathlib.Path, variant: Variant, params: Mapping[str, Any]) -> str:
  """Writes onnx/model.onnx into a folder, and returns its path there.

  Args:
    folder: of the export.
    variant: what the folder holds; `forms.onnx` is the precision of the weights.
    params: its weights.

  Raises:
    ExportError: the package onnx is not installed.
  """
  onnx = require("onnx", "onnx")
  graph = _Graph(onnx)
  _Encoder(graph, variant.body, params, variant.forms.onnx == INT8).add_all(variant.dim)
  _save(onnx, _model(onnx, graph, variant.body, variant.dim), folder / FILE)
  return FILE


def _model(onnx: Any, graph: _Graph, model: ModelConfig, dim: int) -> Any:
  helper, kinds = onnx.helper, onnx.TensorProto
  texts: Sequence[Any] = ["batch", "tokens"]
  inputs = [
    helper.make_tensor_value_info(name, kinds.INT64, texts)
    for name in ("input_ids", "attention_mask")
  ]
  outputs = [
    helper.make_tensor_value_info("last_hidden_state", kinds.FLOAT, [*texts, model.width]),
    helper.make_tensor_value_info("sentence_embedding", kinds.FLOAT, ["batch", dim]),
  ]
  built = helper.make_graph(graph.nodes, "encoder", inputs, outputs, graph.arrays)
  return helper.make_model(
    built,
    opset_imports=[helper.make_opsetid("", OPSET)],
    ir_version=IR_VERSION,
    producer_name="mlembed_jax",
    producer_version=__version__,
  )


def _save(onnx: Any, model: Any, path: pathlib.Path) -> None:
  """Writes the file, and arrays of more than it can hold beside it; checks what was written."""
  size = sum(len(array.raw_data) for array in model.graph.initializer)
  options = {"save_as_external_data": True, "location": f"{path.name}_data"}
  with storage_errors(path):
    path.parent.mkdir(exist_ok=True)
    onnx.save_model(model, path, **(options if size > MOST_BYTES else {}))
  onnx.checker.check_model(path)


def _codes(kernel: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray]:
  """Returns int8 codes and float32 scales, one for each line along `axis`; code * scale is near."""
  most = np.abs(kernel).max(axis=axis, keepdims=True)
  scales = np.where(most > 0, most, 1.0).astype(np.float32) / np.float32(CODES)
  return np.rint(kernel / scales).astype(np.int8), scales
