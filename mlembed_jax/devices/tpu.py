"""TPU topologies: which there are, and how fast their chips compute and exchange. No jax."""

import dataclasses
import math
from collections.abc import Iterable, Sequence

from mlembed_jax.devices import chips


@dataclasses.dataclass(frozen=True)
class Tpu:
  """One generation. Sources: cloud.google.com/tpu/docs; clocks follow from peak and MXU count."""

  kind: str  # jax's device_kind
  clock_hz: float  # of the cycles that the compiler counts
  link_bytes_per_second: float  # of one link, one way
  ring: int  # an axis of the torus is closed to a ring from this length on
  largest: tuple[int, ...]  # axes of the largest topology
  # What an attention kernel reaches of the peak, of the products that a causal mask needs: an
  # assumption. Bounds at head width 128 and 1,024 tokens in one block: 0.5, as masked scores are
  # computed too; 0.25 on v6e, whose 256-wide arrays are half used. Exponentials come on top.
  kernel_efficiency: float

  @property
  def chip(self) -> chips.Chip:
    """Peak and memory."""
    return chips.CHIPS[self.kind]

  @property
  def peak_flops(self) -> float:
    """Per second, of one chip in bfloat16."""
    return self.chip.bf16_flops

  def gather_tokens(self, torus: Sequence[int], group: int) -> float:
    """Returns the tokens on a chip whose products take as long as gathering their weights.

    Both are 2 per parameter and token: FLOPs, and bytes of bfloat16 that `group` chips share.
    """
    return self.peak_flops / (self.links(torus, group) * self.link_bytes_per_second)

  def links(self, torus: Sequence[int], group: int) -> int:
    """Returns over how many links a chip receives in an exchange among `group` chips.

    An axis that the group takes whole, and that is closed to a ring, counts twice.
    """
    taken = zip(self.axes(torus, group), sorted(torus, reverse=True), strict=False)
    return max(1, sum(2 if n == axis >= self.ring else 1 for n, axis in taken))

  def axes(self, torus: Sequence[int], group: int) -> list[int]:
    """Returns how many chips of each axis a group takes, the longest axis first."""
    taken = []
    for axis in sorted(torus, reverse=True):
      if group > 1:
        taken.append(min(axis, group))
        group = math.ceil(group / axis)
    return taken


TPUS = {
  "v4": Tpu("TPU v4", 1.05e9, 45e9, 4, (12, 16, 16), 0.3),
  "v5e": Tpu("TPU v5 lite", 1.5e9, 45e9, 16, (16, 16), 0.3),
  "v5p": Tpu("TPU v5", 1.75e9, 90e9, 4, (16, 20, 28), 0.3),
  "v6e": Tpu("TPU v6 lite", 1.75e9, 90e9, 16, (16, 16), 0.15),
}


def find(device_kind: str) -> Tpu | None:
  """Returns the generation of a jax `device_kind`, None where its links are not known."""
  kinds = {tpu.kind: tpu for tpu in TPUS.values()}
  return kinds.get(chips.canonical(device_kind))


def torus(coords: Iterable[Sequence[int]]) -> tuple[int, ...]:
  """Returns how many chips lie along each axis of a slice whose chips have these coordinates."""
  return tuple(1 + max(axis) for axis in zip(*coords, strict=True))
