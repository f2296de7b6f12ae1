"""How long a TPU takes for a compiled module, by the compiler's own schedule and cost model.

XLA:TPU writes `estimated_cycles` beside every operation that it schedules. What it does not price
is priced here: attention kernels by their products, collectives by their bytes over the links.
Reads text only; knows neither jax nor the model.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterator, Sequence

from mlembed_jax.devices.tpu import Tpu
from mlembed_jax.errors import HloError

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f64": 8, "s64": 8}
START, DONE = "AsyncCollectiveStart", "AsyncCollectiveDone"


@dataclasses.dataclass(frozen=True)
class Operation:
  """One line of a computation."""

  name: str
  shape: str
  opcode: str
  operands: str  # the rest of the line, attributes too

  def attribute(self, pattern: str) -> str:
    """Returns what the first group of `pattern` finds in the rest of the line, or ""."""
    found = re.search(pattern, self.operands)
    return found.group(1) if found else ""

  @property
  def cycles(self) -> int:
    """Cycles that the compiler estimates, 0 where it says nothing."""
    return int(self.attribute(r'"estimated_cycles":"(\d+)"') or 0)

  @property
  def scope(self) -> str:
    """The name stack of the source code that the operation comes from."""
    return self.attribute(r'op_name="([^"]*)"')


@dataclasses.dataclass
class Seconds:
  """Time of one device by what it is spent on; the parts follow one another."""

  compute: float = 0.0
  attention: float = 0.0
  collectives: float = 0.0  # exchanges that nothing hides
  hidden: float = 0.0  # exchanges that run beside computation; they are not part of the total

  @property
  def total(self) -> float:
    """Seconds of the whole step."""
    return self.compute + self.attention + self.collectives

  def add(self, other: "Seconds", times: float = 1.0) -> None:
    """Adds every part of another account, multiplied by `times`."""
    for field in dataclasses.fields(self):
      value = getattr(self, field.name) + times * getattr(other, field.name)
      setattr(self, field.name, value)


@dataclasses.dataclass(frozen=True)
class Collective:
  """One exchange between devices."""

  opcode: str
  bytes: int  # on one device: of the whole array where parts are gathered, summed or scattered
  group: int  # devices that take part

  def seconds(self, tpu: Tpu, torus: Sequence[int]) -> float:
    """Returns how long the exchange takes: bytes that a device receives, over the links it uses.

    An exchange in a group that spans several axes of the torus uses the links of all of them, in
    both directions. Source: chapter "Sharded matrices" of "How to scale your model" (jax-ml).

    Args:
      tpu: generation of the chips.
      torus: chips along each axis of the slice.
    """
    share = (self.group - 1) / max(1, self.group)
    one_link = self.bytes / tpu.link_bytes_per_second
    if self.opcode == "collective-permute":  # to a neighbour
      return one_link
    links = tpu.links(torus, self.group)
    # Data of an all-to-all passes a quarter of each ring on its way, on average.
    hops = max(1.0, sum(tpu.axes(torus, self.group)) / 4)
    passed = {"all-reduce": 2 * share, "all-to-all": share * hops}.get(self.opcode, share)
    return one_link * passed / links


def size(shape: str) -> int:
  """Returns the bytes of a shape or tuple of shapes as HLO writes them."""
  total = 0
  for dtype, dims in re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", shape):
    total += BYTES.get(dtype, 4) * math.prod(int(d) for d in dims.split(",") if d)
  return total


def _shape_and_rest(text: str) -> tuple[str, str]:
  if not text.startswith("("):
    shape, _, rest = text.partition(" ")
    return shape, rest
  depth = 0
  for i, letter in enumerate(text):
    depth += (letter == "(") - (letter == ")")
    if depth == 0:
      return text[: i + 1], text[i + 2 :]
  raise HloError(f"a tuple without end: {text[:80]}")


def parse_module(text: str) -> tuple[dict[str, list[Operation]], str]:
  """Returns {computation: its operations in scheduled order} and the name of the entry."""
  computations: dict[str, list[Operation]] = {}
  current, entry = "", ""
  for line in text.splitlines():
    if head := re.match(r"(ENTRY )?%?([^\s(]+) \(.*\{$", line):
      current = head.group(2)
      computations[current], entry = [], (current if head.group(1) else entry)
    elif found := re.match(r"\s+(?:ROOT )?%([^\s=]+) = (.*)", line):
      shape, rest = _shape_and_rest(found.group(2))
      opcode, _, operands = rest.partition("(")
      computations[current].append(Operation(found.group(1), shape, opcode, operands))
  if not entry:
    raise HloError("no entry computation; this compiler writes modules in another form")
  return computations, entry


class Module:
  """A compiled module."""

  def __init__(self, text: str):
    self.computations, self.entry = parse_module(text)

  def seconds(self, tpu: Tpu, torus: Sequence[int], trips: Callable[[str], float]) -> Seconds:
    """Returns the time of one step on one device.

    `trips(scope)` gives how often a loop runs whose number of trips is an input of the program.
    """
    return _Clock(self, tpu, torus, trips).of(self.entry)

  def exchanges(
    self, trips: Callable[[str], float], name: str = "", times: float = 1.0
  ) -> Iterator[tuple[str, float, Collective]]:
    """Yields (scope, how often in a step, exchange), of a computation or of the entry."""
    seen: set[str] = set()
    for op in self.computations[name or self.entry]:
      if op.opcode == "while":
        count = self.trip_count(op)
        times_in = times * (trips(op.scope) if count is None else count)
        yield from self.exchanges(trips, op.attribute(r"body=%([^\s,)]+)"), times_in)
      for o in [op, *self.inner(op)]:
        channel = o.attribute(r"channel_id=(\d+)") or o.name
        if (found := self.collective(o)) and channel not in seen:
          seen.add(channel)  # one in the background stands in several fusions
          yield op.scope or o.scope, times, found

  def collective(self, op: Operation) -> Collective | None:
    """Returns the exchange that an operation is, if it is one."""
    opcode = op.opcode.removesuffix("-start")
    if opcode not in COLLECTIVES:
      return None
    group = _group(op)
    held = size(re.sub(r"\b[us]32\[\]", "", op.shape))  # without counters of the exchange
    if op.opcode == "reduce-scatter":
      held *= group
    elif op.opcode in ("all-gather-start", "reduce-scatter-start"):  # the parts and the whole
      held = held * group // (group + 1)
    elif op.opcode.endswith("-start") and opcode != "all-reduce":  # what is sent, what is received
      held //= 2
    return Collective(opcode, held, group)

  def inner(self, op: Operation) -> list[Operation]:
    """Returns the operations of the computation that a fusion calls."""
    called = op.attribute(r"calls=%([^\s,)]+)") if op.opcode == "fusion" else ""
    return self.computations.get(called, [])

  def trip_count(self, op: Operation) -> int | None:
    """Returns how often a while loop runs, None where that is an input."""
    condition = self.computations[op.attribute(r"condition=%([^\s,)]+)")]
    constants = {o.name: o.operands.partition(")")[0] for o in condition if o.opcode == "constant"}
    for o in condition:
      if o.opcode == "compare":
        named = [n for n in re.findall(r"%([^\s,)]+)", o.operands) if n in constants]
        return int(constants[named[0]]) if named else None
    raise HloError(f"the loop {op.name} ends by no comparison")


def _group(op: Operation) -> int:
  """Returns how many devices take part in one exchange."""
  mesh = op.attribute(r"replica_groups=mesh\[([^\]]*)\]")
  if mesh:
    sizes = {name: int(n) for name, n in re.findall(r"'([^']+)'=(\d+)", mesh)}
    axes = re.findall(r"'([^']+)'", op.attribute(r"replica_groups=mesh\[.*?\{([^}]*)\}"))
    return math.prod(sizes[axis] for axis in axes)
  iota = op.attribute(r"replica_groups=\[\d+,(\d+)\]")
  if iota:
    return int(iota)
  first = op.attribute(r"replica_groups=\{\{([^}]*)\}")
  return len(first.split(",")) if first else 2


class _Flights:
  """Exchanges under way. They take the links one after another, in the order of their starts."""

  def __init__(self):
    self.left: dict[str, float] = {}  # seconds

  def beside(self, work: float) -> float:
    """Returns for how long of `work` seconds the links were busy."""
    passed = 0.0
    for key, seconds in self.left.items():
      done = min(seconds, work - passed)
      self.left[key], passed = seconds - done, passed + done
    return passed

  def land(self, last: str) -> float:
    """Returns the seconds until the exchange `last` is through, and those before it."""
    if last not in self.left:
      return 0.0
    keys = list(self.left)
    return sum(self.left.pop(key) for key in keys[: keys.index(last) + 1])


class _Clock:
  """Adds up one module's operations."""

  def __init__(self, module: Module, tpu: Tpu, torus: Sequence[int], trips: Callable[[str], float]):
    self.module, self.tpu, self.torus, self.trips = module, tpu, torus, trips
    self.of = functools.cache(self._of)

  def _of(self, computation: str) -> Seconds:
    total, flights = Seconds(), _Flights()
    for op in self.module.computations[computation]:
      one = self._one(op)
      # Exchanges of a loop inside take their share of the links first.
      one.hidden += flights.beside(one.compute + one.attention - one.hidden)
      for key, exchange in self._ends(op):
        if exchange:
          flights.left[key] = self._alone(exchange)
        else:
          one.collectives += flights.land(key)
      total.add(one)
    total.collectives += sum(flights.left.values())
    return total

  def _ends(self, op: Operation) -> Iterator[tuple[str, Collective | None]]:
    """Yields (key, exchange) of those that start at `op`, and (key, None) of those that end."""
    if op.opcode.endswith("-start") and (exchange := self.module.collective(op)):
      yield op.name, exchange
    if op.opcode.endswith("-done"):
      yield op.attribute(r"%([^\s,)]+)"), None
    inner = self.module.inner(op)
    marks = {o.attribute(r'custom_call_target="(\w+)"') for o in inner}
    if marks & {START, DONE}:
      for o in inner:
        if exchange := self.module.collective(o):
          yield o.attribute(r"channel_id=(\d+)"), exchange if START in marks else None

  def _one(self, op: Operation) -> Seconds:
    if op.opcode == "while":
      return self._loop(op)
    if op.opcode == "conditional":
      return self._longest(op)
    if exchange := self.module.collective(op):
      in_background = op.opcode.endswith("-start")  # priced where it ends
      return Seconds(collectives=0.0 if in_background else self._alone(exchange))
    if op.opcode == "custom-call" and "tpu_custom_call" in op.operands:
      return Seconds(
        attention=kernel_flops(op) / (self.tpu.kernel_efficiency * self.tpu.peak_flops)
      )
    compute = Seconds(compute=op.cycles / self.tpu.clock_hz)
    if op.opcode == "fusion":
      compute.add(self._fused(op))
    return compute

  def _alone(self, exchange: Collective) -> float:
    return exchange.seconds(self.tpu, self.torus)

  def _fused(self, op: Operation) -> Seconds:
    """Returns the time of exchanges that a fusion makes by itself: a sum that it scatters."""
    inner = self.module.inner(op)
    if any("async_collective_fusion_config" in o.operands for o in inner):
      return Seconds()
    found = [c for o in inner if (c := self.module.collective(o))]
    # A sum is scattered where it is reduced, half of what an all-reduce sends.
    return Seconds(
      collectives=sum(self._alone(c) / (2 if c.opcode == "all-reduce" else 1) for c in found)
    )

  def _loop(self, op: Operation) -> Seconds:
    total, count = Seconds(), self.module.trip_count(op)
    body = self.of(op.attribute(r"body=%([^\s,)]+)"))
    total.add(body, self.trips(op.scope) if count is None else count)
    return total

  def _longest(self, op: Operation) -> Seconds:
    names = re.findall(r"%([^\s,)}]+)", op.attribute(r"branch_computations=\{([^}]*)\}"))
    names += re.findall(r"(?:true|false)_computation=%([^\s,)]+)", op.operands)
    longest = max((self.of(name) for name in names), key=lambda s: s.total)
    return dataclasses.replace(longest)  # the caller adds to it


def kernel_flops(op: Operation) -> float:
  """Returns the FLOPs of the products of an attention kernel, causal ones halved.

  Two products per score forward; five in the backward kernel, which computes the scores again.
  """
  products = 5 if "dkv" in op.name or "bwd" in op.name else 2
  # The largest output is of query heads: [batch, heads, tokens, width], or with an axis of parts; a
  # batch of one sheet has no axis.
  shapes = re.findall(r"(?:bf16|f32)\[((?:\d+,){2,4}\d+)\]", op.shape)
  if not shapes:
    raise HloError(f"the kernel {op.name} is no attention kernel: {op.shape[:100]}")
  sizes = max(([int(n) for n in shape.split(",")] for shape in shapes), key=math.prod)
  heads, tokens, width = sizes[-3:]
  batch = sizes[0] if len(sizes) > 3 else 1
  return products * 2 * batch * heads * tokens * (tokens + 1) / 2 * width
