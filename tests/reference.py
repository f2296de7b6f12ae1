"""The objective as its plain formula: float64, every pair written down, gradients by torch.

Beside it the random inputs that its tests share, and the call of the package with the same
arguments.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from mlembed_jax.batch import Arrays
from mlembed_jax.config import from_mapping
from mlembed_jax.matryoshka import Matryoshka, dim_weights
from mlembed_jax.objective import losses
from tests.material import FAST_COMPILE, config_dict, kind_of

NEVER = -torch.inf
# On 2 cores its threads and those of XLA wait for each other: 6 s instead of 0.2 s at width 2560.
torch.set_num_threads(1)


@dataclasses.dataclass(frozen=True)
class Options:
  """What the objective can be asked for; names as in LossesConfig where they are the same."""

  positives: int = 1
  inbatch: bool = True
  joint: bool = False
  symmetric: bool = False
  inbatch_negatives: bool = False
  passage_grad: bool = True
  masked: bool = True
  margin: float = 2.0
  judge: np.ndarray | None = None  # [B, C, D] states that judge the margin; None: the deepest exit
  temperature: float = 0.05


@dataclasses.dataclass(frozen=True)
class Result:
  loss: float
  gradient: np.ndarray  # [E, B, C, D]
  temperature_gradient: float
  terms: dict[str, np.ndarray]  # [E]
  negatives: float
  empty_rows: int


@dataclasses.dataclass(frozen=True)
class Keep:
  """Which candidates are negatives; found by comparing texts one by one."""

  stored: torch.Tensor  # [B, K]
  others: torch.Tensor  # [B, B * (used - 1)], candidates from other rows
  queries: torch.Tensor  # [B, P, B], queries that a positive meets


def unit(x):
  return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(1e-12)


def find_keep(hashes, judge, o):
  """Returns the masks of a batch; `judge` are float64 unit vectors [B, C, D]."""
  text = [[tuple(h) for h in row] for row in np.asarray(hashes).tolist()]
  B, C, P = len(text), len(text[0]), o.positives
  used = C if o.inbatch_negatives else 1 + P
  limit = [max(judge[i, 0] @ judge[i, p] for p in range(1, 1 + P)) + o.margin for i in range(B)]

  def meets(i, j, c):
    same = text[j][c] in text[i][: 1 + P] or text[j][0] == text[i][0]
    return i != j and not (o.masked and same) and judge[i, 0] @ judge[j, c] <= limit[i]

  def met_by(i, p, j):
    same = text[j][0] in (text[i][0], text[i][p]) or text[i][p] in text[j][1 : 1 + P]
    return i != j and not (o.masked and same) and judge[i, p] @ judge[j, 0] <= limit[i]

  def stored(i, c):
    return not (o.masked and text[i][c] in text[i][: 1 + P])

  return Keep(
    torch.tensor([[stored(i, c) for c in range(1 + P, C)] for i in range(B)]).reshape(B, -1),
    torch.tensor([[meets(i, j, c) for j in range(B) for c in range(1, used)] for i in range(B)]),
    torch.tensor(
      [[[met_by(i, p, j) for j in range(B)] for p in range(1, 1 + P)] for i in range(B)]
    ),
  )


def cross_entropy(positives, negatives, keep):
  """Returns the mean over [B, P] of -log softmax of a positive among itself and its negatives."""
  kept = negatives.masked_fill(~keep, NEVER).expand(*positives.shape, -1)
  logits = torch.cat([positives[..., None], kept], dim=-1)
  return torch.mean(torch.logsumexp(logits, dim=-1) - positives)


def views(x_BCD, o):
  """Returns queries [B, d], own passages [B, C - 1, d] and candidates from other rows [N, d]."""
  v = unit(x_BCD)
  used = v.shape[1] if o.inbatch_negatives else 1 + o.positives
  return v[:, 0], v[:, 1:], v[:, 1:used].flatten(0, 1)


def terms(x_BCD, keep, temperature, o):
  """Returns {name: value} at one exit and dim."""
  q, passages, met = views(x_BCD, o)
  own, stored = (torch.einsum("bd,bkd->bk", q, passages) / temperature).split(
    (o.positives, passages.shape[1] - o.positives), dim=1
  )
  hard, stored_keep = stored[:, None], keep.stored[:, None]
  if not o.inbatch:
    return {"hard": cross_entropy(own, hard, stored_keep)}
  p = passages[:, : o.positives]
  if not o.passage_grad:
    p, met = p.detach(), met.detach()
  others, others_keep = (q @ met.T / temperature)[:, None], keep.others[:, None]
  taught = torch.einsum("bd,bpd->bp", q, p) / temperature
  if o.joint:
    both = torch.cat([hard, others], dim=2), torch.cat([stored_keep, others_keep], dim=2)
    out = {"inbatch": cross_entropy(own, *both)}
  else:
    out = {
      "hard": cross_entropy(own, hard, stored_keep),
      "inbatch": cross_entropy(taught, others, others_keep),
    }
  if o.symmetric:
    back = cross_entropy(taught, torch.einsum("bpd,nd->bpn", p, q) / temperature, keep.queries)
    out["inbatch"] = (out["inbatch"] + back) / 2
  return out


def objective(states, hashes, dims, **options):
  """Returns the mean over exits of the weighted sum over dims, with what belongs to it."""
  o, weights = Options(**options), dim_weights(dims)
  x = torch.tensor(np.asarray(states, np.float64), requires_grad=True)
  temperature = torch.tensor(o.temperature, dtype=torch.float64, requires_grad=True)
  judge = x[-1].detach() if o.judge is None else torch.tensor(np.asarray(o.judge, np.float64))
  keep = find_keep(hashes, unit(judge), o)
  found = [[terms(e[..., :dim], keep, temperature, o) for dim in dims] for e in x]
  parts = {
    name: torch.stack(
      [sum(w * t[name] for w, t in zip(weights, row, strict=True)) for row in found]
    )
    for name in found[0][0]
  }
  loss = torch.mean(sum(parts.values()))
  loss.backward()
  seen = keep.stored.sum(1) + (keep.others.sum(1) if o.inbatch else 0)
  return Result(
    loss.item(),
    x.grad.numpy(),
    temperature.grad.item(),
    {name: value.detach().numpy() for name, value in parts.items()},
    seen.double().mean().item(),
    int((seen == 0).sum()),
  )


def choice_logits(x_BCD, keep, o):
  """Returns the logits of every candidate of a row [B, P + K + N], -inf for no candidate."""
  q, passages, met = views(x_BCD, o)
  own = torch.einsum("bd,bkd->bk", q, passages) / o.temperature
  stored = own[:, o.positives :].masked_fill(~keep.stored, NEVER)
  logits = [own[:, : o.positives], stored]
  if o.inbatch:
    met = met if o.passage_grad else met.detach()
    logits.append((q @ met.T / o.temperature).masked_fill(~keep.others, NEVER))
  return torch.cat(logits, dim=1)


def self_distillation(states, full, hashes, dims, **options):
  """Returns KL(full || exit and dim), mean over rows and weighted over dims [E], and its gradient.

  `full` [B, C, D] are the states of the full model, constants.
  """
  o, weights = Options(**options), dim_weights(dims)
  x = torch.tensor(np.asarray(states, np.float64), requires_grad=True)
  full = torch.tensor(np.asarray(full, np.float64))
  keep = find_keep(hashes, unit(full), o)
  target = torch.log_softmax(choice_logits(full, keep, o), dim=1)

  def divergence(student_BCD):
    found = torch.log_softmax(choice_logits(student_BCD, keep, o), dim=1)
    # Candidates only: 0 * (inf - inf) is no zero, and neither is its gradient.
    allowed = target > NEVER
    return torch.sum(target[allowed].exp() * (target[allowed] - found[allowed])) / len(target)

  out = torch.stack(
    [sum(w * divergence(e[..., :dim]) for dim, w in zip(dims, weights, strict=True)) for e in x]
  )
  out.sum().backward()
  return out.detach().numpy(), x.grad.numpy()


def random_states(exits, rows, texts, width, seed=0):
  """Returns float32 states [E, B, C, D]."""
  return np.random.default_rng(seed).normal(size=(exits, rows, texts, width)).astype(np.float32)


def distinct_hashes(rows, texts):
  """Returns hashes [B, C, 2] of texts that are all different."""
  return np.arange(rows * texts * 2, dtype=np.uint32).reshape(rows, texts, 2)


def repeated_hashes(rows, texts, positives=1):
  """Returns hashes with every kind of repeated text; needs 8 rows and a stored negative."""
  h, n = distinct_hashes(rows, texts), 1 + positives
  h[3, 1] = h[1, positives]  # a positive of another row
  h[4, 0] = h[2, 0]  # the query of another row
  h[0, 1] = h[5, 0]  # a positive that is another row's query
  h[5, n] = h[5, positives]  # a negative that is the own positive
  h[7, n] = h[7, 0]  # ... that is the own query
  h[6, n] = h[7, 1]  # ... that is another row's positive
  h[1, n] = h[6, 0]  # ... that is another row's query
  h[2, n:] = h[0, n]  # ... that is another row's negative, and repeated in its own row
  return h


def ours(
  states: Any,
  hashes: Any,
  dims: tuple[int, ...],
  *,
  weights: tuple[float, ...] | None = None,
  task_type: str = "retrieval",
  positives: int = 1,
  temperature: float = 0.05,
  scores: Any = None,
  teachers: losses.Teachers | None = None,
  projection: Any = None,
  **settings: Any,
) -> tuple[losses.Objective, tuple[Any, losses.Learnt]]:
  """Returns the package's objective and the loss's gradients to states and what is learnt beside.

  `settings` are fields of the configuration with __ for a dot.
  """
  config = from_mapping(config_dict(**{k.replace("__", "."): v for k, v in settings.items()}))
  weights = dim_weights(dims) if weights is None else weights
  axes = Matryoshka(dims, weights, tuple(range(1, len(states) + 1)), (), ())

  def run(states, learnt, batch, teachers):
    result = losses.objective(
      states,
      batch,
      losses.LossSettings(kind_of(task_type, positives), axes, config.losses, config.kd),
      learnt,
      teachers,
    )
    return result.loss, result

  batch = Arrays(hashes, scores)
  differentiate = jax.jit(
    jax.value_and_grad(run, argnums=(0, 1), has_aux=True), compiler_options=FAST_COMPILE
  )
  (_, result), grads = differentiate(
    jnp.asarray(states),
    losses.Learnt(temperature, projection),
    batch,
    teachers or losses.Teachers(),
  )
  return jax.device_get((result, grads))
