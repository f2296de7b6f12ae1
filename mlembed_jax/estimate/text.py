"""An estimate as text for people."""

from mlembed_jax.estimate.estimate import Estimate, gib


def report(estimate: Estimate) -> str:
  """Returns the report."""
  e = estimate
  used, there = gib(e.hbm_bytes_per_device), gib(e.hbm_capacity)
  kinds = ", ".join(f"{name} {gib(size)}" for name, size in e.hbm_by_kind.items())
  return f"""\
{e.topology}: {e.devices} chips, mesh {e.mesh}, model.remat {e.remat}
data.micro_batch {e.micro_batch:,} ({e.block:,} on each part of the batch), \
data.kept_tokens {e.kept_tokens:,}
memory per chip: {used} of {there} GiB ({e.free:.0%} free):
  {kinds}
step of {e.sequences:,} texts of {e.text_tokens:,} tokens ({e.task}): \
{e.model_flops_per_step / 1e15:,.3g} PFLOP
{_speed(e) if e.estimated_step_seconds else "estimated: nothing, as the compiler gave up"}"""


def _speed(e: Estimate) -> str:
  parts = ", ".join(f"{name} {1e3 * s:,.0f}" for name, s in e.seconds_by_kind.items())
  slower = 1 + e.seconds_by_kind["attention"] / e.estimated_step_seconds
  exchanges = "\n".join(
    f"  {x['count']:,.0f} x {x['kind']} of {x['bytes'] / 2**20:,.3g} among {x['group']}, "
    f"{x['scope']}"
    for x in e.collectives[:12]
  )
  left_out = ", without the network between slices" if " x " in e.topology else ""
  return f"""\
estimated{left_out}: {1e3 * e.estimated_step_seconds:,.0f} ms ({parts}), MFU {e.estimated_mfu:.3f} \
({e.estimated_mfu / slower:.3f} if attention takes twice as long), \
{e.tokens_per_second_per_chip:,.0f} tokens and {e.sequences_per_second_per_chip:,.1f} texts per \
second and chip
collectives, the largest first (MiB of the whole array):
{exchanges}
compiled in {e.compile_seconds:.0f} s"""
