"""Vectors cut at the output dims, and the logits of all dims from one pass over them.

The dot product of a prefix is the one of the prefix before plus one block of coordinates. So the
logits of all dims cost one product over the whole width, about half of what separate products
cost. Arrays only.

Letters: A anchors, N candidates (a and n in one tile), B rows, K documents per row, M output dims,
W coordinates of one block.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

ABSENT = -1  # a text with this number only fills up a tile


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Texts:
  """Vectors cut at the output dims, with what makes each prefix a unit vector."""

  blocks: tuple[Float[Array, "... W"], ...]
  scale: Float[Array, "... M"]  # 1 / norm of each prefix

  def __getitem__(self, index: Any) -> "Texts":
    """Returns the texts at an index of the leading axes."""
    return jax.tree.map(lambda x: x[index], self)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Anchors:
  """What decides which candidates are negatives of each anchor."""

  row: Int[Array, "A"]
  text: Int[Array, "A"]  # equal numbers are equal texts
  targets: Int[Array, "A P"]  # the anchor's own positives
  judge: Float[Array, "A D"] | None = None  # unit vectors; None: no limit
  limit: Float[Array, "A"] | None = None  # of the judge's cosine of anchor and negative


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Candidates:
  """What decides of which anchors each candidate is a negative."""

  row: Int[Array, "N"]
  text: Int[Array, "N"]
  anchors: Int[Array, "N P"]  # ids of the anchors of which this candidate is a positive
  judge: Float[Array, "N D"] | None = None


def texts(x: Float[Array, "... D"], dims: Sequence[int]) -> Texts:
  """Returns the vectors with the inverse norm of each prefix; float32 sums.

  A norm counts as at least 1e-12. Bounding its square keeps the gradient of a zero vector finite.
  """
  blocks = tuple(jnp.split(x, tuple(dims[:-1]), axis=-1))
  squares = [jnp.sum(jnp.square(block.astype(jnp.float32)), axis=-1) for block in blocks]
  norms = jnp.cumsum(jnp.stack(squares, axis=-1), axis=-1)
  return Texts(blocks, jax.lax.rsqrt(jnp.maximum(norms, 1e-24)))


def divide(anchors: Texts, temperature: Any) -> Texts:
  """Returns texts whose products with others are logits instead of cosines."""
  return dataclasses.replace(anchors, scale=anchors.scale / temperature)


# Products in float32: at the default precision accelerators would round float32 inputs to bfloat16
# or TF32. Products of bfloat16 inputs are exact.
product = functools.partial(
  jnp.einsum, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32
)


def own_logits(
  anchors: Texts,  # [B, ...]
  documents: Texts,  # [B, K, ...]
) -> Float[Array, "B K M"]:
  """Returns the logits of each row's anchor with its own documents, all dims."""
  products = [
    product("bw,bkw->bk", a, d) for a, d in zip(anchors.blocks, documents.blocks, strict=True)
  ]
  cumulated = jnp.cumsum(jnp.stack(products, axis=-1), axis=-1)
  return cumulated * anchors.scale[:, None] * documents.scale


def tile_products(a: Texts, c: Texts) -> list[Float[Array, "a n"]]:
  """Returns the dot products of one tile for each dim, each the sum of the blocks so far."""
  out = []
  for x, y in zip(a.blocks, c.blocks, strict=True):
    block = product("aw,nw->an", x, y)
    out.append(out[-1] + block if out else block)
  return out


def tile_logits(a: Texts, c: Texts) -> list[Float[Array, "a n"]]:
  """Returns the logits of one tile for each dim."""
  return [x * a.scale[:, m, None] * c.scale[None, :, m] for m, x in enumerate(tile_products(a, c))]


def tile_keep(a: Anchors, c: Candidates) -> Bool[Array, "a n"]:
  """Returns which candidates of a tile are negatives of which anchor.

  Left out are candidates of the anchor's own row, those whose text is the anchor's or one of its
  positives, and those of rows with the same anchor text; with a judge, also those too similar.
  """
  keep = (a.row[:, None] != c.row[None]) & (a.text[:, None] != c.text[None])
  keep &= (c.text != ABSENT)[None]
  for target in a.targets.T:
    keep &= target[:, None] != c.text[None]
  for anchor in c.anchors.T:
    keep &= a.text[:, None] != anchor[None]
  if a.judge is not None and a.limit is not None and c.judge is not None:
    keep &= product("ad,nd->an", a.judge, c.judge) <= a.limit[:, None]
  return keep


def tile_pull(
  d_logits: Sequence[Float[Array, "a n"]], a: Texts, c: Texts
) -> tuple[tuple[list[Array], Array], tuple[list[Array], Array]]:
  """Returns the float32 cotangents (blocks, scale) of both sides of `tile_logits`.

  The candidates' blocks come as [W, n]: so the small operand of their product is the one that is
  transposed, not the tile.
  """
  d_scale_a, d_scale_c, d_products = [], [], []
  for m, (d, x) in enumerate(zip(d_logits, tile_products(a, c), strict=True)):
    scale_a, scale_c = a.scale[:, m], c.scale[:, m]
    # The cotangents are written to memory once: otherwise XLA takes the exponentials again for each
    # of the uses.
    d = jax.lax.optimization_barrier(d * scale_a[:, None] * scale_c[None])
    d_scale_a.append(jnp.sum(d * x, axis=1) / scale_a)
    d_scale_c.append(jnp.sum(d * x, axis=0) / scale_c)
    d_products.append(d)
  d_a, d_c, total = [], [], jnp.zeros(())
  # A block is part of its own dim and of all larger ones.
  for d, x, y in list(zip(d_products, a.blocks, c.blocks, strict=True))[::-1]:
    total = total + d
    rounded = total.astype(x.dtype)
    d_a.append(product("an,nw->aw", rounded, y))
    d_c.append(product("aw,an->wn", x, rounded))
  return (d_a[::-1], jnp.stack(d_scale_a, axis=-1)), (d_c[::-1], jnp.stack(d_scale_c, axis=-1))
