"""Joining the processes of a run: starts jax.distributed as the environment says.

TPU pods, GKE, Slurm and Open MPI are known to jax. Anything else sets three variables on every
process: JAX_COORDINATOR_ADDRESS (HOST:PORT of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID.
"""

import contextlib
import dataclasses
import importlib.util
import os
import signal
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping

import jax

from mlembed_jax.errors import ConfigError

ADDRESS, COUNT, ID = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
RETRY_S = 0.5
# jax aborts with a stack trace when its own time is over; ours comes first, with a message.
JAX_LATER_S = 60
NO_CLUSTER = "coordinator_address should be defined"  # what jax says on a single machine
LEAVE_S = 5.0  # in which processes that end together have left
CHECK = (
  f"check that process 0 is running, that a firewall lets its port through, and that {ADDRESS} and "
  f"{COUNT} are the same everywhere. --join_timeout_s waits longer"
)


@dataclasses.dataclass(frozen=True)
class Member:
  """One process of a run, as the three variables say."""

  address: str  # HOST:PORT of process 0
  processes: int
  process: int

  @property
  def endpoint(self) -> tuple[str, int]:
    """Host and port of process 0."""
    host, _, port = self.address.rpartition(":")
    return host.strip("[]"), int(port)


def from_environment(variables: Mapping[str, str]) -> Member | None:
  """Returns what the three variables say, None where none is set.

  Raises:
    ConfigError: one of them is missing, or they contradict each other.
  """
  given = {name: variables[name] for name in (ADDRESS, COUNT, ID) if variables.get(name)}
  if not given:
    return None
  if missing := [name for name in (ADDRESS, COUNT, ID) if name not in given]:
    raise ConfigError(
      f"{', '.join(missing)} not set, but {', '.join(given)}; every process needs all three"
    )
  host, _, port = given[ADDRESS].rpartition(":")
  if not host or not port.isdigit() or not 0 < int(port) < 65536:
    raise ConfigError(f"{ADDRESS}: {given[ADDRESS]!r} is no HOST:PORT, such as 10.0.0.2:8476")
  processes, process = (_integer(name, given[name]) for name in (COUNT, ID))
  if not processes:
    raise ConfigError(f"{COUNT}: 0 processes; it counts all of them, process 0 too")
  if process >= processes:
    raise ConfigError(f"{ID}: {process} is too high; {COUNT} = {processes}, and ids begin at 0")
  return Member(given[ADDRESS], processes, process)


def _integer(name: str, text: str) -> int:
  if not (text.isascii() and text.isdigit()):
    raise ConfigError(f"{name}: {text!r} is no whole number from 0 on")
  return int(text)


def cluster(variables: Mapping[str, str]) -> str | None:
  """Returns jax's name of the cluster that the environment shows, None for a single process.

  Only where there are several processes: jax would else show one GPU of eight to a job of one task.
  Virtual machines of a TPU pod have no variables; `join` asks jax about them.
  """
  several = lambda name: variables.get(name, "").isdigit() and int(variables[name]) > 1  # noqa: E731
  slurm = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID")
  if "OMPI_MCA_orte_hnp_uri" in variables and several("OMPI_COMM_WORLD_SIZE"):
    return "ompi"
  if all(name in variables for name in slurm) and several("SLURM_NTASKS"):
    return "slurm"
  hosts = variables.get("TPU_PROCESS_ADDRESSES") or variables.get("TPU_WORKER_HOSTNAMES", "")
  if _may_use_tpus(variables) and ("," in hosts or (hosts and several("MEGASCALE_NUM_SLICES"))):
    return "gketpu"
  # jax asks the Kubernetes API who the others are, for which this package has to be there.
  if "JOB_COMPLETION_INDEX" in variables and "KUBERNETES_SERVICE_HOST" in variables:
    return "k8s" if not hosts and importlib.util.find_spec("kubernetes") else None
  return None


def _may_use_tpus(variables: Mapping[str, str]) -> bool:
  wanted = variables.get("JAX_PLATFORMS", "")
  return (not wanted or "tpu" in wanted) and importlib.util.find_spec("libtpu") is not None


def join(timeout_s: int) -> None:
  """Connects this process with the others of the run; nothing where it is the only one.

  Processes other than 0 print nothing from here on, but errors and warnings. Waits for the others
  at most `timeout_s` seconds, then ends the program with status 1 and a message.

  Raises:
    ConfigError: the environment contradicts itself, process 0 cannot be reached, its port is taken,
      or the processes have different numbers of devices.
  """
  member, found = from_environment(os.environ), cluster(os.environ)
  deadline = time.monotonic() + timeout_s
  if member:
    _check_address(member, deadline)
    _initialize(_absent(member, timeout_s), deadline, member)
  elif found:
    _initialize(_absent_of(found, timeout_s), deadline, None, found)
  elif _may_use_tpus(os.environ):
    try:
      _initialize(_absent_of("tpu", timeout_s), deadline)
    except ValueError as error:
      if NO_CLUSTER not in str(error):
        raise  # on one of many machines that must not go on alone
  if not jax.distributed.is_initialized():
    return
  # jax has caught SIGTERM, of which processes tell each other by stop.py.
  signal.signal(signal.SIGTERM, signal.SIG_DFL)
  _check_devices()
  if jax.process_index():
    sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  (until the end)
  devices = f"{jax.local_device_count()} x {jax.devices()[0].device_kind}"
  print(f"{jax.process_count()} processes with {devices} each", flush=True)


def _check_address(member: Member, deadline: float) -> None:
  """Finds out by plain sockets what jax would abort on."""
  if member.process == 0:
    port = member.endpoint[1]
    try:
      socket.create_server(("", port)).close()
    except OSError as error:
      raise ConfigError(
        f"{ADDRESS}: process 0 cannot listen on port {port}: {error.strerror}; choose a free one"
      ) from error
    return
  started, reason = time.monotonic(), ""
  while time.monotonic() < deadline:
    try:
      socket.create_connection(
        member.endpoint, timeout=max(0.1, deadline - time.monotonic())
      ).close()
      return
    except OSError as error:
      reason = error.strerror or str(error)
      time.sleep(RETRY_S)
  waited = time.monotonic() - started
  raise ConfigError(
    f"process {member.process} cannot reach process 0 at {member.address} ({reason}, for "
    f"{waited:.0f} s); {CHECK}"
  )


def _absent(member: Member, timeout_s: int) -> str:
  return (
    f"process {member.process} is connected with process 0 at {member.address}, but not all "
    f"{member.processes} processes came within {timeout_s} s; {CHECK}"
    if member.process
    else f"not all {member.processes} processes came to {member.address} within {timeout_s} s; "
    f"{CHECK}"
  )


def _absent_of(found: str, timeout_s: int) -> str:
  return (
    f"the processes that jax found in the environment ({found}) did not all meet within "
    f"{timeout_s} s; check that the same command runs on every machine and that a firewall lets "
    f"them reach each other, or set {ADDRESS}, {COUNT} and {ID}. --join_timeout_s waits longer"
  )


def _initialize(
  message: str, deadline: float, member: Member | None = None, method: str | None = None
) -> None:
  if member:  # where jax aborts, this line says why
    who = f"process {member.process} of {member.processes}"
    print(f"{who} joins process 0 at {member.address}", file=sys.stderr, flush=True)
  with _ends_after(deadline - time.monotonic(), message):
    try:
      jax.distributed.initialize(
        coordinator_address=member.address if member else None,
        num_processes=member.processes if member else None,
        process_id=member.process if member else None,
        # What Slurm or Open MPI say of devices is for processes that they counted.
        cluster_detection_method="deactivate" if member else method,
        initialization_timeout=int(deadline - time.monotonic()) + JAX_LATER_S,
      )
    except RuntimeError as error:
      raise ConfigError(f"{error}; {message}") from error


@contextlib.contextmanager
def _ends_after(seconds: float, message: str) -> Iterator[None]:
  """Ends the program with this message unless the block is done in time."""

  def end() -> None:
    print(f"error: {message}", file=sys.stderr, flush=True)
    os._exit(1)

  timer = threading.Timer(seconds, end)
  timer.daemon = True
  timer.start()
  try:
    yield
  finally:
    timer.cancel()


def _check_devices() -> None:
  counts = Counter(device.process_index for device in jax.devices())
  if len(set(counts.values())) > 1:
    shown = ", ".join(f"process {process}: {counts[process]}" for process in sorted(counts))
    raise ConfigError(f"every process needs the same number of devices, but there are {shown}")


@contextlib.contextmanager
def joined(timeout_s: int) -> Iterator[None]:
  """Joins the processes for the block; one that fails alone ends soon, with status 1.

  jax would have it wait minutes for the others, which do not know.
  """
  join(timeout_s)
  try:
    yield
  except (Exception, KeyboardInterrupt):
    if jax.distributed.is_initialized():
      timer = threading.Timer(LEAVE_S, os._exit, (1,))
      timer.daemon = True
      timer.start()
    raise
