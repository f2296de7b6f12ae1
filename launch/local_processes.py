"""Rehearses a pod on one machine: several processes, each with simulated CPU devices.

python launch/local_processes.py --processes 2 --devices 4 -- -m mlembed_jax.train --config ...

What follows `--` is run by this Python in every process. Their lines come out with the number of
the process in front. Ctrl-C and SIGTERM go to all of them. One that fails ends the others soon; its
status is that of this command.
"""

import argparse
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import IO, Any

POLL_S = 0.1


def main() -> int:
  """Returns the status of the first process that failed, 0 where none did."""
  options = _options()
  port = options.port or _free_port()
  variables = [_variables(options, port, number) for number in range(options.processes)]
  command = [sys.executable, *options.arguments]
  if options.dry_run:
    for own in variables:
      print(shlex.join(["env", *(f"{k}={v}" for k, v in own.items()), *command]))
    return 0
  return _run(command, variables, options.leave_s)


def _options() -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--processes", type=_positive, default=2, help="how many (2)")
  parser.add_argument("--devices", type=_positive, default=4, help="CPU devices of each (4)")
  parser.add_argument("--port", type=_positive, help="of process 0 (a free one)")
  parser.add_argument(
    "--leave_s",
    type=float,
    default=10.0,
    help="for the others when one has failed, in seconds (10)",
  )
  parser.add_argument("--dry_run", action="store_true", help="print the commands and end")
  parser.add_argument("arguments", nargs="+", metavar="-- ARGUMENTS", help="of python")
  return parser.parse_args()


def _positive(text: str) -> int:
  if not (text.isascii() and text.isdigit()) or not int(text):
    raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 on")
  return int(text)


def _free_port() -> int:
  with socket.create_server(("", 0)) as server:
    return server.getsockname()[1]


def _variables(options: argparse.Namespace, port: int, number: int) -> dict[str, str]:
  return {
    "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
    "JAX_NUM_PROCESSES": str(options.processes),
    "JAX_PROCESS_ID": str(number),
    "JAX_PLATFORMS": "cpu",
    "JAX_NUM_CPU_DEVICES": str(options.devices),
    "PYTHONUNBUFFERED": "1",
  }


def _run(command: list[str], variables: list[dict[str, str]], leave_s: float) -> int:
  """Returns the status of the command in all processes."""
  running: list[subprocess.Popen[str]] = []

  def forward(number: int, _: Any) -> None:
    for process in running:
      process.send_signal(number)  # nothing where it has ended

  for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, forward)
  for own in variables:
    # A session of its own: the terminal would send Ctrl-C a second time.
    process = subprocess.Popen(
      command,
      env=os.environ | own,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      stdin=subprocess.DEVNULL,
      text=True,
      errors="replace",
      start_new_session=True,
    )
    running.append(process)
  readers = [
    threading.Thread(target=_copy, args=(number, source, target), daemon=True)
    for number, process in enumerate(running)
    for source, target in ((process.stdout, sys.stdout), (process.stderr, sys.stderr))
  ]
  for reader in readers:
    reader.start()
  status = _wait(running, leave_s)
  for reader in readers:
    reader.join(1.0)  # a process that a killed one left behind may hold its end
  return status


def _copy(number: int, source: IO[str], target: IO[str]) -> None:
  for line in source:
    if text := line.rstrip():
      target.write(f"[{number}] {text}\n")
      target.flush()


def _wait(running: list[subprocess.Popen[str]], leave_s: float) -> int:
  """Returns the first status that is not 0, when all have ended; kills what stays after it."""
  failed, end = 0, float("inf")
  while any(process.poll() is None for process in running):
    if not failed and (failed := _first_failure(running)):
      end = time.monotonic() + leave_s
    if time.monotonic() > end:
      for process in running:
        process.kill()
    time.sleep(POLL_S)
  return failed or _first_failure(running)


def _first_failure(running: list[subprocess.Popen[str]]) -> int:
  for number, process in enumerate(running):
    if status := process.poll():
      print(f"process {number} ended with status {status}", file=sys.stderr, flush=True)
      return status if status > 0 else 128 - status
  return 0


if __name__ == "__main__":
  sys.exit(main())
