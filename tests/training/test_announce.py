"""What a run says of itself before the first step is what the arrays are."""

import math

import jax

from mlembed_jax.files import readable_size
from mlembed_jax.parallel.sharding import make_mesh
from mlembed_jax.training import announce, optimizer, train_state


def test_counts_are_those_of_the_arrays(tiny):
  mesh, tx = make_mesh(tiny), optimizer.make(tiny.optimizer, 10)
  state = train_state.create(tiny, tx, mesh)
  held = lambda tree: sum(  # noqa: E731
    shard.data.nbytes
    for x in jax.tree.leaves(tree)
    for shard in x.addressable_shards
    if shard.device == jax.devices()[0]
  )
  said = announce.description(tiny, tx, mesh, None).splitlines()
  assert said[0] == "devices: 8 x cpu, mesh data 1, fsdp 8, tensor 1"
  assert said[1] == "computes in float32, trained weights in float32; attention: einsum"
  count = sum(math.prod(x.shape) for x in jax.tree.leaves(state.params))
  assert said[2].startswith(f"{count:,} parameters, ")
  params, moments = (readable_size(held(tree)) for tree in (state.params, state.opt_state))
  assert said[3] == f"each device holds {params} of weights and {moments} of optimiser moments"
