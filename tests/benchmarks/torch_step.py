"""Our train step against the same one in PyTorch with transformers, on the CPU or a GPU.

    JAX_PLATFORMS=cpu python -m tests.benchmarks.torch_step
    python -m tests.benchmarks.torch_step --device cuda --config configs/0_6b.py

Both have the same weights, texts (each as long as its sheet), exits, dims, duplicates, dtype, and
rematerialisation of layers as the configuration has it (full or none): Qwen3Model with SDPA
attention, a factorised token table of which a drawn rank is used, the objective as a loop over
exits and dims in float32, clipping by norm and fused AdamW over parameters in float32; bfloat16 is
autocast. Loss and gradient norm of the first step must be the same before anything is timed.

Each side is a process of its own with as many threads as there are cores, and they take their steps
in turn; on a GPU both are in its memory. Peak memory is that of the allocator on a GPU, and on a
CPU what the kernel counts for the process, with its libraries and the copy of the weights.
"""

import argparse
import dataclasses
import math
import multiprocessing
import os
import pathlib
import resource
import sys
import tempfile
import time
from typing import Any

import flax.traverse_util
import jax
import numpy as np
import torch
import transformers

from mlembed_jax.config_fields import Config, ModelConfig
from mlembed_jax.devices import chips
from mlembed_jax.hf import param_mapping
from mlembed_jax.matryoshka import plan
from mlembed_jax.models import flops
from mlembed_jax.parallel.sharding import make_mesh
from tests.benchmarks import common
from tests.benchmarks.head import TEMPERATURE, masks
from tests.benchmarks.step import Stepper, random_batch, random_ids

AGREE = {"float32": 1e-4, "bfloat16": 2e-2}  # relative
HEADER = ("step", "seconds", "tokens/s", "MFU", "peak MiB")


def load(args: Any) -> Config:
  texts = 2 + args.negatives
  changes = {"model.dtype": args.dtype, "data.lengths": (args.tokens,)}
  changes |= {"data.global_batch": args.batch, "data.micro_batch": args.batch * texts * args.tokens}
  changes |= {f"losses.retrieval.{name}temperature": TEMPERATURE for name in ("", "final_")}
  config = common.load_config(args.config, **changes)
  if config.model.remat == "dots":
    raise SystemExit(f"--config: {args.config}: PyTorch has no counterpart of model.remat = dots")
  return config


def cores() -> int:
  """Returns how many this process may use, as XLA counts them."""
  return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def resident_bytes() -> int:
  unit = 1 if sys.platform == "darwin" else 1024
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class Ours:
  """Our step; writes its weights and masks for the other one."""

  def __init__(self, args: Any, folder: pathlib.Path):
    jax.config.update("jax_platforms", args.device)
    config, texts = load(args), 2 + args.negatives
    self._mesh = make_mesh(config, jax.devices()[:1])
    with common.on_mesh(self._mesh):
      self._step = Stepper(config, self._mesh, random_batch(config, texts, self._mesh))
      weights = flax.traverse_util.flatten_dict(self._step.state.params, sep="/")
      arrays = {name: np.asarray(array) for name, array in weights.items()}
      arrays["own"], arrays["inbatch"] = masks(common.random_hashes(args.batch, texts))
      _, metrics = self._step()  # of rate 0: the weights stay
    np.savez(folder / "arrays.npz", **arrays, rank=metrics["rank"])
    self.first = float(metrics["loss"]), float(metrics["gradient_norm"])

  def step(self) -> None:
    with common.on_mesh(self._mesh):
      jax.block_until_ready(self._step())

  def device(self) -> tuple[str, int]:
    """Returns its kind, and the most bytes that were in use."""
    device = jax.devices()[0]
    stats = device.memory_stats() or {}
    return device.device_kind, stats.get("peak_bytes_in_use", resident_bytes())


class Encoder(torch.nn.Module):
  """A Qwen3Model behind a token table as ours, with our weights."""

  def __init__(self, model: ModelConfig, exits: tuple[int, ...], weights: Any):
    super().__init__()
    sizes = {key: getattr(model, field) for field, key in param_mapping.CONFIG_KEYS.items()}
    sizes |= {"vocab_size": 1, "pad_token_id": None, "use_cache": False}  # its own table is unused
    theta = {"rope_type": "default", "rope_theta": model.rope_theta}
    config = transformers.Qwen3Config(**sizes, rope_parameters=theta, attn_implementation="sdpa")
    self.trunk = transformers.Qwen3Model(config).train()
    self.trunk.load_state_dict(trunk_weights(model, weights))
    if model.remat == "full":
      # The older name leaves in transformers 6.
      newer = getattr(self.trunk, "activation_checkpointing_enable", None)
      (newer or self.trunk.gradient_checkpointing_enable)({"use_reentrant": False})
    self.table = torch.nn.Parameter(torch.tensor(weights["table"]))
    self.up = torch.nn.Parameter(torch.tensor(weights["up"])) if model.rank else None
    self._states: list[torch.Tensor] = []
    for depth in exits:
      self.trunk.layers[depth - 1].register_forward_hook(self._keep)

  def _keep(self, _: Any, __: Any, stream: torch.Tensor) -> None:
    self._states.append(stream[:, -1])

  def forward(self, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Returns the final-norm states of the last tokens, [E, texts, D]."""
    self._states.clear()
    rows = torch.nn.functional.embedding(tokens, self.table)
    self.trunk(inputs_embeds=rows if self.up is None else rows @ (self.up * mask[:, None]))
    return self.trunk.norm(torch.stack(self._states))


def trunk_weights(model: ModelConfig, weights: Any) -> dict[str, torch.Tensor]:
  def tensor(t: param_mapping.Tensor) -> torch.Tensor:
    array = weights[t.path] if t.layer is None else weights[t.path][t.layer]
    return torch.tensor(np.ascontiguousarray(t.to_hf(array)))

  unused = {param_mapping.TABLE[1]: torch.zeros(1, model.width)}
  return unused | {
    t.name: tensor(t)
    for t in param_mapping.tensors(dataclasses.replace(model, rank=0))
    if t.path != param_mapping.TABLE[0]
  }


class Theirs:
  """The step in PyTorch."""

  def __init__(self, args: Any, folder: pathlib.Path):
    torch.set_num_threads(cores())
    config, arrays = load(args), np.load(folder / "arrays.npz")
    self._config, self._axes = config, plan(config.model, config.matryoshka)
    self._device, self._rng = args.device, np.random.default_rng(0)
    self._encoder = Encoder(config.model, self._axes.exits, arrays).to(args.device)
    ids = random_ids(config, 2 + args.negatives).astype(np.int64)
    self._tokens = torch.tensor(ids, device=args.device)
    self._own, self._inbatch = (
      torch.tensor(arrays[name], device=args.device) for name in ("own", "inbatch")
    )
    o = config.optimizer
    settings = {"betas": (o.beta1, o.beta2), "eps": o.eps, "weight_decay": o.weight_decay}
    self._optimizer = torch.optim.AdamW(
      self._encoder.parameters(), lr=o.learning_rate, fused=True, **settings
    )
    loss, norm = self._backward(int(arrays["rank"]))
    self.first = loss.item(), norm.item()

  def _loss(self, rank: int) -> torch.Tensor:
    mask = (torch.arange(self._config.model.rank, device=self._device) < rank).float()
    half = self._config.model.dtype == "bfloat16"
    with torch.autocast(self._device, torch.bfloat16, enabled=half):
      states = self._encoder(self._tokens.flatten(0, 1), mask)
    return self._objective(states.float().unflatten(1, self._tokens.shape[:2]))

  def _objective(self, states: torch.Tensor) -> torch.Tensor:
    total = torch.zeros((), device=self._device)
    rows = torch.arange(states.shape[1], device=self._device)
    for x in states:
      for dim, weight in zip(self._axes.dims, self._axes.dim_weights, strict=True):
        v = torch.nn.functional.normalize(x[..., :dim], dim=-1)
        own = torch.einsum("bd,bkd->bk", v[:, 0], v[:, 1:])
        inbatch = v[:, 0] @ v[:, 1].T
        total = total + weight * cross_entropy(own, self._own, torch.zeros_like(rows))
        total = total + weight * cross_entropy(inbatch, self._inbatch, rows)
    return total / len(states)

  def step(self) -> None:
    axes = self._axes
    rank = self._rng.choice(axes.ranks, p=axes.rank_probabilities) if axes.ranks else 0
    self._backward(rank)
    self._optimizer.step()
    if self._device == "cuda":
      torch.cuda.synchronize()

  def _backward(self, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the loss and the norm of the gradients before clipping."""
    self._optimizer.zero_grad()
    loss, clip_norm = self._loss(rank), self._config.optimizer.clip_norm
    loss.backward()
    return loss, torch.nn.utils.clip_grad_norm_(self._encoder.parameters(), clip_norm)

  def device(self) -> tuple[str, int]:
    """Returns its kind, and the most bytes that were in use."""
    if self._device == "cuda":
      return torch.cuda.get_device_name(), torch.cuda.max_memory_allocated()
    return "cpu", resident_bytes()


def cross_entropy(cosines: torch.Tensor, mask: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
  logits = (cosines / TEMPERATURE).masked_fill(~mask, -torch.inf)
  return torch.nn.functional.cross_entropy(logits, right)


def serve(pipe: Any, side: Any, args: Any, folder: pathlib.Path) -> None:
  """Sends what the first step gives, the seconds of a step whenever asked, at last the device."""
  made = side(args, folder)
  pipe.send(made.first)
  while pipe.recv():
    start = time.perf_counter()
    made.step()
    pipe.send(time.perf_counter() - start)
  pipe.send(made.device())


def start(side: Any, args: Any, folder: pathlib.Path) -> tuple[Any, tuple[float, float]]:
  """Returns the end of a pipe to a process of this side, and what its first step gives."""
  context = multiprocessing.get_context("spawn")
  here, there = context.Pipe()
  context.Process(target=serve, args=(there, side, args, folder), daemon=True).start()
  there.close()  # so that a process that dies ends our wait
  return here, here.recv()


def measure(args: Any) -> dict[str, tuple[float, str, int]]:
  """Returns (least seconds, kind of device, peak bytes) of both sides."""
  with tempfile.TemporaryDirectory() as folder:
    sides = {"ours": Ours, "PyTorch": Theirs}
    pipes = {name: start(side, args, pathlib.Path(folder)) for name, side in sides.items()}
  first = {name: found for name, (_, found) in pipes.items()}
  if not np.allclose(first["ours"], first["PyTorch"], rtol=AGREE[args.dtype]):
    raise SystemExit(f"loss or gradient norm differ: {first}")
  best = dict.fromkeys(pipes, math.inf)
  for measured in (False, *(True for _ in range(args.repeats))):
    for name, (pipe, _) in pipes.items():
      pipe.send(True)
      seconds = pipe.recv()
      best[name] = min(best[name], seconds) if measured else math.inf
  for pipe, _ in pipes.values():
    pipe.send(False)
  return {name: (best[name], *pipe.recv()) for name, (pipe, _) in pipes.items()}


def describe(name: str, found: tuple[float, str, int], config: Config, texts: int) -> list[str]:
  (seconds, kind, peak), size = found, config.data.lengths[-1]
  count = config.data.global_batch * texts
  work = flops.step_flops(config.model, count * size, count * size * (size + 1))
  chip = chips.find(kind) if config.model.dtype == "bfloat16" else None
  mfu = f"{work / seconds / chip.bf16_flops:.1%}" if chip else "-"
  return [name, f"{seconds:.4g}", f"{count * size / seconds:,.0f}", mfu, common.mib(peak)]


def parse() -> argparse.Namespace:
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--config", default=common.CONFIGS / "140m.py", help="FILE[:variant]")
  parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
  parser.add_argument("--dtype", choices=AGREE, help="float32 on a CPU, bfloat16 on a GPU")
  parser.add_argument("--batch", type=int, default=32, help="rows")
  parser.add_argument("--negatives", type=int, default=1, help="stored negatives per row")
  parser.add_argument("--tokens", type=int, help="per text; 64 on a CPU, 512 on a GPU")
  parser.add_argument("--repeats", type=int, default=5)
  args = parser.parse_args()
  on_gpu = args.device == "cuda"
  args.dtype = args.dtype or ("bfloat16" if on_gpu else "float32")
  args.tokens = args.tokens or (512 if on_gpu else 64)
  return args


def main() -> None:
  args = parse()
  # Each side takes the memory that it needs, not three quarters of the GPU.
  os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
  config, texts = load(args), 2 + args.negatives
  found = measure(args)
  versions = f"jax {jax.__version__}, torch {torch.__version__}"
  print(
    f"{found['ours'][1]}, {cores()} cores, {versions}; {args.config}, "
    f"{args.dtype}, remat {config.model.remat}, "
    f"{args.batch} rows x {texts} texts x {args.tokens} tokens\n"
  )
  common.print_table(HEADER, [describe(name, f, config, texts) for name, f in found.items()])
  print(f"\nPyTorch / ours: {found['PyTorch'][0] / found['ours'][0]:.3f} of the time")


if __name__ == "__main__":
  main()
