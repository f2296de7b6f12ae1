#!/usr/bin/env bash
# mlx-embeddings gives other vectors, in silence, for a Qwen3 folder that transformers 5 has saved.
#
# Guess: `mlx_embeddings.load` of a folder that `save_pretrained` wrote gives the states of
# transformers, since both read its config.json; at most a field that is missing is an error.
#
# Seen (mlx-embeddings 0.1.0, mlx 0.32.4, transformers 5.24.0): transformers 5 writes the base of the
# rotary embedding into `rope_parameters` and no `rope_theta`. mlx-embeddings reads `rope_theta`
# alone, and takes 1,000,000 where there is none. A small model whose base is 10,000 has a vector of
# cosine 0.83 to its own; with `rope_theta` written beside it by hand it is the same vector.
# A text that is padded on the left, as embedders with last-token pooling are, is NaN.
#
# Why it matters: the vectors look like vectors, and a base of 1,000,000 happens to be right for the
# models that most people try first.
#
# What to do: write `rope_theta` into config.json, too, compare one vector with another program, and
# pad on the right.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet mlx-embeddings==0.1.0 "mlx[cpu]==0.32.4" \
  transformers==5.24.0 torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" - "$folder/model" <<'PYTHON'
import json
import pathlib
import sys
from importlib.metadata import version

import mlx.core as mx
import numpy as np
import torch
from mlx_embeddings.utils import load
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3Model

path = pathlib.Path(sys.argv[1])
torch.manual_seed(0)
sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "head_dim": 32}
heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 100}
rope = {"rope_type": "default", "rope_theta": 10_000.0}
config = Qwen3Config(**sizes, **heads, rope_parameters=rope, initializer_range=0.2)
model = Qwen3Model(config).eval()
model.save_pretrained(path)
words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(100)}, unk_token="w0"))
words.pre_tokenizer = pre_tokenizers.Whitespace()
PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0").save_pretrained(path)
written = json.loads((path / "config.json").read_text())

mx.set_default_device(mx.cpu)
row = list(range(1, 33))
with torch.no_grad():
  expected = model(torch.tensor([row])).last_hidden_state[0, -1].numpy()


def states(ids, mask):
  loaded, _ = load(str(path))
  out = loaded(mx.array(ids), attention_mask=mx.array(mask))
  return np.array(out.last_hidden_state)


def cosine(vector):
  return float(vector @ expected / np.linalg.norm(vector) / np.linalg.norm(expected))


as_saved = cosine(states([row], [[1] * 32])[0, -1])
padded = states([[0, 0, 0, *row[:29]], row], [[0, 0, 0] + [1] * 29, [1] * 32])
(path / "config.json").write_text(json.dumps(written | {"rope_theta": 10_000.0}))
by_hand = cosine(states([row], [[1] * 32])[0, -1])

print(*(f"{name} {version(name)}" for name in ("mlx-embeddings", "mlx", "transformers")))
print("guess: the states of transformers")
print("written:", {key: written.get(key) for key in ("rope_theta", "rope_parameters")})
print(f"cosine as saved {as_saved:.3f}, with rope_theta by hand {by_hand:.6f}")
print("padded on the left:", "NaN" if np.isnan(padded[0]).any() else "numbers")
seen = ("rope_theta" not in written, as_saved < 0.95, by_hand > 0.9999, np.isnan(padded[0]).any())
if not all(seen):
  sys.exit("Before, transformers wrote no rope_theta, the cosine was below 0.95, and padding gave NaN.")
PYTHON
