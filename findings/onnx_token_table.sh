#!/usr/bin/env bash
# ONNX Runtime quantises a whole token table with one scale, also with `per_channel=True`.
#
# Guess: `quantize_dynamic(..., per_channel=True, weight_type=QuantType.QInt8)` gives the table
# behind a `Gather` signed codes with a scale per row or per column, as it does for the kernel of a
# `MatMul`.
#
# Seen (onnxruntime 1.32.0): `Gather` is among the operators that are quantised unless others are
# named, and its table is treated as an activation: one scale, one zero point and unsigned codes for
# all rows, whatever `per_channel` and `weight_type` say. One row of 1000 that is 30 times as long
# as the others leaves these 14 different values and a mean cosine of 0.98 to the original; with 100
# times the length it is 5 values and 0.81. The kernel beside it has 64 scales and signed codes.
#
# Why it matters: the rows of a multilingual table differ in length, and one of 250,000 sets the
# precision of every language. A cut of the table can change the scale, and so all rows.
#
# What to do: leave the lookup out (`op_types_to_quantize=["MatMul"]`), or store the table as codes
# with a scale per row in the graph itself.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet onnxruntime==1.32.0 onnx==1.23.2 numpy==2.4.6
"$folder/venv/bin/python" - "$folder" <<'PYTHON'
import logging
import sys
from importlib.metadata import version

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import QuantType, quantize_dynamic

logging.disable(logging.WARNING)
FLOAT_FILE, INT8_FILE = f"{sys.argv[1]}/float.onnx", f"{sys.argv[1]}/int8.onnx"
KERNEL = np.random.default_rng(1).normal(size=(256, 64)).astype("f4")


def quantised(table):
  """Returns the looked-up rows after quantisation, and the arrays that the file holds."""
  lookup = helper.make_node("Gather", ["table", "ids"], ["rows"])
  product = helper.make_node("MatMul", ["rows", "kernel"], ["states"])
  ids = helper.make_tensor_value_info("ids", TensorProto.INT64, ["tokens"])
  rows = helper.make_tensor_value_info("rows", TensorProto.FLOAT, ["tokens", 256])
  states = helper.make_tensor_value_info("states", TensorProto.FLOAT, ["tokens", 64])
  arrays = [numpy_helper.from_array(table, "table"), numpy_helper.from_array(KERNEL, "kernel")]
  graph = helper.make_graph([lookup, product], "model", [ids], [rows, states], arrays)
  model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
  onnx.save(model, FLOAT_FILE)
  quantize_dynamic(FLOAT_FILE, INT8_FILE, per_channel=True, weight_type=QuantType.QInt8)
  held = {a.name: numpy_helper.to_array(a) for a in onnx.load(INT8_FILE).graph.initializer}
  session = onnxruntime.InferenceSession(INT8_FILE)
  return session.run(["rows"], {"ids": np.arange(len(table))})[0], held


print("onnxruntime", version("onnxruntime"), "- guess: a mean cosine over 0.999, many scales, int8")
for factor, before in ((1, 1.0), (30, 0.979), (100, 0.806)):
  table = np.random.default_rng(0).normal(size=(1000, 256)).astype("f4")
  table[0] *= factor
  rows, held = quantised(table)
  norms = np.linalg.norm(rows, axis=1) * np.linalg.norm(table, axis=1)
  cosine = float(np.mean((np.sum(rows * table, axis=1) / norms)[1:]))
  seen = [(held[f"{x}_scale"].size, str(held[f"{x}_quantized"].dtype)) for x in ("table", "kernel")]
  print(f"one row {factor} times as long: the others have a mean cosine of {cosine:.3f} and")
  print(f"  {len(np.unique(rows[1:]))} values; scales and type of table and kernel {seen}")
  if abs(cosine - before) > 0.005 or seen != [(1, "uint8"), (64, "int8")]:
    sys.exit("The way in which the table is quantised has changed.")
PYTHON
