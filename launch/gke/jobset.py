"""Trains on TPU slices of GKE: python launch/gke/jobset.py COMMAND --name NAME ...

Needs kubectl with credentials for a cluster that has JobSet 0.6 or newer, and this repository, of
which nothing has to be installed: flags of mlembed_jax.train stand after `--` and are handed on as
they are.
"""

import argparse
import itertools
import json
import math
import pathlib
import re
import shlex
import shutil
import string
import subprocess
import sys
from collections.abc import Callable
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

from mlembed_jax.devices.tpu import TPUS

TEMPLATE = pathlib.Path(__file__).with_name("jobset.yaml")

# gcsfuse, as needed by a run. Metadata are not cached: every machine must see at once what another
# wrote. The bucket needs a hierarchical namespace: checkpoints are written to a folder that is
# then renamed, which gcsfuse refuses in other buckets.
SPOT_S = 25  # between SIGTERM and SIGKILL on Spot machines
MOUNT_OPTIONS = "implicit-dirs,metadata-cache:ttl-secs:0"

EXAMPLE = """example, two slices of v5p-256:
  python launch/gke/jobset.py run --name run1 --image IMAGE --tpu v5p --topology 4x4x8 --slices 2 \\
    --bucket BUCKET -- --config configs/8b.py --workdir /gcs/BUCKET/run1"""


class InputError(Exception):
  """A flag that cannot be used; the message names it and says how to mend it."""


def parser() -> argparse.ArgumentParser:
  """Returns the flags of all commands."""
  top = argparse.ArgumentParser(
    prog="launch/gke/jobset.py",
    description="Trains on TPU slices of GKE.",
    epilog=EXAMPLE,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
  for name, (_, text) in COMMANDS.items():
    add = commands.add_parser(name, help=text, description=text, allow_abbrev=False).add_argument
    add("--name", required=True, help="of the run")
    add("--namespace", default="default", help="of the cluster")
    add("--dry_run", action="store_true", help="print the commands and run nothing")
    if name == "run":
      add_run_flags(add)
  return top


def add_run_flags(add: Callable[..., Any]) -> None:
  """Adds the flags that fill the template."""
  add("--image", required=True, help="made with launch/gke/Dockerfile")
  add("--tpu", required=True, help=f"generation: {', '.join(TPUS)}")
  add("--topology", required=True, help="chips of one slice, such as 4x4 or 4x4x8")
  add("--slices", type=int, default=1, help="how many (default: 1)")
  add("--chips_per_host", type=int, default=4, help="of the node pool's machines (default: 4)")
  add("--spot", action="store_true", help="only on spot machines")
  add("--bucket", required=True, help="Cloud Storage bucket to mount at /gcs/BUCKET")
  add("--service_account", default="default", help="of Kubernetes, with access to the bucket")
  add("--max_restarts", type=int, default=3, help="after failures; preemptions do not count")
  add("--grace_s", type=int, default=120, help="seconds to save a checkpoint after SIGTERM")


def train_workdir(flags: list[str]) -> str:
  """Returns the value of --workdir.

  Raises:
    InputError: flags of mlembed_jax.train are missing, or the workdir is no absolute path.
  """
  values = {"config": "", "workdir": ""}
  for flag, following in itertools.pairwise([*flags, ""]):
    name, equals, value = flag.lstrip("-").partition("=")
    if flag.startswith("-") and name in values:
      values[name] = value if equals else following
  for name, value in values.items():
    if not value:
      raise InputError(f"--{name} is missing among the flags of mlembed_jax.train, after --")
  workdir = values["workdir"]
  if "://" in workdir:
    raise InputError(f"--workdir {workdir}: not a path; the bucket is mounted at /gcs/BUCKET")
  if not workdir.startswith("/"):
    raise InputError(f"--workdir {workdir}: give an absolute path that all machines share")
  return workdir


def check_name(name: str) -> None:
  """Raises InputError unless pods can be named after the run."""
  if not re.fullmatch(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?", name):
    raise InputError(
      f"--name {name}: small letters, digits and hyphens, a letter first, at most 40"
    )


def machines(topology: str, chips_per_host: int) -> int:
  """Returns the number of machines of one slice.

  Raises:
    InputError: the topology is not of the form 4x4 or 4x4x8, or does not divide into machines.
  """
  if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){1,2}", topology):
    raise InputError(f"--topology {topology}: chips along each axis, such as 4x4 or 4x4x8")
  chips = math.prod(map(int, topology.split("x")))
  if chips_per_host < 1 or chips % chips_per_host:
    raise InputError(
      f"--chips_per_host {chips_per_host}: the {chips} chips of {topology} do not divide by it"
    )
  return chips // chips_per_host


def check_run(args: argparse.Namespace, train: list[str]) -> None:
  """Raises InputError where a flag of `run` cannot be meant."""
  workdir = train_workdir(train)
  if args.tpu not in TPUS:
    raise InputError(f"--tpu {args.tpu}: one of {', '.join(TPUS)}")
  for name, least in (("slices", 1), ("max_restarts", 0), ("grace_s", 1)):
    if (value := getattr(args, name)) < least:
      raise InputError(f"--{name} {value}: {least} or more")
  if not re.fullmatch(r"[a-z0-9][a-z0-9._-]+", args.bucket):
    raise InputError(f"--bucket {args.bucket}: only its name, without gs:// and folders")
  if not workdir.startswith(f"/gcs/{args.bucket}/"):
    raise InputError(
      f"--workdir {workdir}: the disk of a pod is lost with it; give /gcs/{args.bucket}/RUN"
    )


def volume(bucket: str) -> dict:
  """Returns the volume that mounts a bucket."""
  attributes = {"bucketName": bucket, "mountOptions": MOUNT_OPTIONS, "hostNetworkPodKSA": "true"}
  csi = {"driver": "gcsfuse.csi.storage.gke.io", "volumeAttributes": attributes}
  return {"name": "bucket", "csi": csi}


def grace(args: argparse.Namespace) -> int:
  """Returns the seconds after which a run ends by itself, with the status that restarts it."""
  return max(1, (min(args.grace_s, SPOT_S) if args.spot else args.grace_s) - 2)


def placeholders(args: argparse.Namespace, train: list[str]) -> dict[str, object]:
  """Returns name -> value of every placeholder of the template."""
  selector = {
    "cloud.google.com/gke-tpu-accelerator": TPUS[args.tpu].gke_accelerator,
    "cloud.google.com/gke-tpu-topology": args.topology,
  }
  taints = ["google.com/tpu"]
  if args.spot:
    selector["cloud.google.com/gke-spot"] = "true"
    taints.append("cloud.google.com/gke-spot")
  return {
    "NAME": args.name,
    "MAX_RESTARTS": args.max_restarts,
    "SLICES": args.slices,
    "HOSTS": machines(args.topology, args.chips_per_host),
    "POD_ANNOTATIONS": {"gke-gcsfuse/volumes": "true"},
    "NODE_SELECTOR": selector,
    "TOLERATIONS": [{"key": taint, "operator": "Exists"} for taint in taints],
    "SERVICE_ACCOUNT": args.service_account,
    "GRACE_S": args.grace_s,
    "IMAGE": args.image,
    "TRAIN_FLAGS": [f"--grace_s={grace(args)}", *train],
    "CHIPS_PER_HOST": args.chips_per_host,
    "VOLUME_MOUNTS": [{"name": "bucket", "mountPath": f"/gcs/{args.bucket}"}],
    "VOLUMES": [volume(args.bucket)],
  }


def manifest(args: argparse.Namespace, train: list[str]) -> str:
  """Returns the filled template. Values are written as JSON, which is YAML, so any text is safe."""
  values = placeholders(args, train)
  encoded = {name: json.dumps(value, ensure_ascii=False) for name, value in values.items()}
  return string.Template(TEMPLATE.read_text(encoding="utf-8")).substitute(encoded)


def run(args: argparse.Namespace, train: list[str]) -> tuple[list[str], str]:
  """Returns the command that starts a run, and its standard input."""
  check_run(args, train)
  return ["create", "--filename=-"], manifest(args, train)


def logs(args: argparse.Namespace, _: list[str]) -> tuple[list[str], str]:
  """Returns the command that follows the log of process 0."""
  labels = {
    "jobset.sigs.k8s.io/jobset-name": args.name,
    "jobset.sigs.k8s.io/job-index": 0,
    "batch.kubernetes.io/job-completion-index": 0,
  }
  selector = ",".join(f"{name}={value}" for name, value in labels.items())
  return ["logs", "--follow", "--tail=50", "--container=train", f"--selector={selector}"], ""


def suspend(value: bool) -> Callable[..., tuple[list[str], str]]:
  """Returns the function of a command that deletes all pods, with SIGTERM, or makes them again."""
  patch = json.dumps({"spec": {"suspend": value}})
  return lambda args, _: (["patch", "jobset", args.name, "--type=merge", f"--patch={patch}"], "")


def delete(args: argparse.Namespace, _: list[str]) -> tuple[list[str], str]:
  """Returns the command that ends a run and forgets it."""
  return ["delete", "jobset", args.name], ""


COMMANDS = {
  "run": (run, "starts a run; flags of mlembed_jax.train stand after --"),
  "logs": (logs, "follows the log of process 0"),
  "stop": (suspend(True), "saves a checkpoint and gives the machines back"),
  "resume": (suspend(False), "goes on after stop, from the newest checkpoint"),
  "delete": (delete, "saves a checkpoint and ends the run; the same run command goes on later"),
}


def show(command: list[str], text: str) -> None:
  """Prints a command as a shell reads it."""
  print(shlex.join(command) + (f" <<'MANIFEST'\n{text}MANIFEST" if text else ""))


def main(argv: list[str]) -> int:
  """Returns the exit status of kubectl, 0 for a dry run."""
  split = argv.index("--") if "--" in argv else len(argv)
  args, train = parser().parse_args(argv[:split]), argv[split + 1 :]
  check_name(args.name)
  if train and args.command != "run":
    raise InputError(f"{args.command} takes no flags of mlembed_jax.train; only run does")
  arguments, text = COMMANDS[args.command][0](args, train)
  command = ["kubectl", f"--namespace={args.namespace}", *arguments]
  if args.dry_run:
    show(command, text)
    return 0
  if not shutil.which("kubectl"):
    raise InputError("kubectl is not installed; see https://kubernetes.io/docs/tasks/tools")
  return subprocess.run(command, input=text or None, text=True).returncode


if __name__ == "__main__":
  try:
    sys.exit(main(sys.argv[1:]))
  except InputError as error:
    sys.exit(f"error: {error}")
