"""The backward pass of a function, taken apart into what it keeps of each input and what of none.

`jax.vjp` gives one closure over everything. Kept for many inputs, it would hold the parameters, and
what is computed of them alone, as many times. Arrays only.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

Function = Callable[[Any, Any], Any]  # params, input -> output


class Pull:
  """From cotangents of `function(params, x)` to those of `params`, for many x of one shape."""

  def __init__(self, function: Function, params: Any, example: Any):
    self._function = function
    pull_of = lambda params, x: self._vjp(params, x)[1]  # noqa: E731
    jaxpr, pull = jax.make_jaxpr(pull_of, return_shape=True)(params, example)
    self._shapes, self._tree = jax.tree.flatten(pull)
    reached = _reached(jaxpr.jaxpr, len(jax.tree.leaves(params)))
    self._varies = [isinstance(v, core.Var) and v in reached for v in jaxpr.jaxpr.outvars]
    self._shared = _fixed(jaxpr, self._varies)

  def _vjp(self, params: Any, x: Any) -> tuple[Any, Any]:
    return jax.vjp(lambda p: self._function(p, x), params)

  @property
  def bytes(self) -> int:
    """Bytes of the residuals of one input."""
    return sum(x.size * x.dtype.itemsize for x in jax.eval_shape(lambda: self.empty(1)))

  def empty(self, count: int) -> list[jax.Array]:
    """Returns room for the residuals of `count` inputs."""
    varying = [x for x, varies in zip(self._shapes, self._varies, strict=True) if varies]
    return [jnp.zeros((count, *x.shape), x.dtype) for x in varying]

  def forward(self, params: Any, x: Any) -> tuple[Any, list[jax.Array]]:
    """Returns the output and the residuals that depend on x."""
    out, pull = self._vjp(params, x)
    leaves = zip(jax.tree.leaves(pull), self._varies, strict=True)
    return out, [leaf for leaf, varies in leaves if varies]

  def back(self, params: Any, example: Any, kept: Sequence[jax.Array], d_out: Any) -> Any:
    """Returns the cotangents of `params` from those of the output and the residuals of its x.

    `example` is any x; only its shape matters.
    """
    flat = jax.tree.leaves((params, example))
    of_x, of_none = iter(kept), iter(core.jaxpr_as_fun(self._shared)(*flat))
    leaves = [next(of_x) if varies else next(of_none) for varies in self._varies]
    return jax.tree.unflatten(self._tree, leaves)(d_out)[0]


def _reached(jaxpr: core.Jaxpr, first: int) -> set[Any]:
  """Returns the variables that depend on an input from number `first` on."""
  reached = set(jaxpr.invars[first:])
  for eqn in jaxpr.eqns:
    if any(isinstance(v, core.Var) and v in reached for v in eqn.invars):
      reached.update(eqn.outvars)
  return reached


def _fixed(jaxpr: core.ClosedJaxpr, varies: Sequence[bool]) -> core.ClosedJaxpr:
  """Returns the program of the outputs that do not vary."""
  fixed = [v for v, changes in zip(jaxpr.jaxpr.outvars, varies, strict=True) if not changes]
  needed, eqns = set(v for v in fixed if isinstance(v, core.Var)), []
  for eqn in reversed(jaxpr.jaxpr.eqns):
    if needed.intersection(eqn.outvars):
      needed.update(v for v in eqn.invars if isinstance(v, core.Var))
      eqns.insert(0, eqn)
  return jaxpr.replace(jaxpr=jaxpr.jaxpr.replace(eqns=eqns, outvars=fixed))
