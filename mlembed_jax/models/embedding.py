"""Rows of a token table whose columns are split over the mesh. Takes arrays only."""

import jax
from jaxtyping import Array, Float, Int

from mlembed_jax.parallel import mesh_context


def look_up(table_VR: Float[Array, "V R"], tokens_BT: Int[Array, "B T"]) -> Float[Array, "B T R"]:
  """Returns the row of each token.

  Each device looks its columns up for all devices that share the table with it, and these exchange
  them: the cost is one all-to-all of the result. Left to itself XLA gathers the table on every
  device, or adds up residual streams. No device needs all columns, so rows are never split and the
  vocabulary may have any size.
  """
  columns, rows = mesh_context.mesh_axes("rank"), mesh_context.spec("batch", "token")
  # A table that is cut below its devices is not split.
  if not columns or table_VR.shape[1] % mesh_context.shards("rank"):
    return table_VR[tokens_BT]

  def local(table: Array, tokens: Array) -> Array:
    found = table[jax.lax.all_gather(tokens, columns, tiled=True)]
    return jax.lax.all_to_all(found, columns, split_axis=0, concat_axis=2, tiled=True)

  return jax.shard_map(
    local, in_specs=(mesh_context.spec("vocab", "rank"), rows), out_specs=rows, check_vma=False
  )(table_VR, tokens_BT)
