"""The launchers: every command they print, the JobSet, a worker's processes, every refusal."""

import copy
import json
import os
import pathlib
import shlex
import shutil
import subprocess
import sys
import time

import pytest
import yaml
from kubeflow_trainer_api.models.jobset_v1alpha2_job_set import JobsetV1alpha2JobSet

from mlembed_jax.devices.tpu import TPUS

ROOT = pathlib.Path(__file__).parent.parent
TPU_VM, WORKER, SLURM = "launch/tpu_vm.sh", "launch/worker.sh", "launch/slurm.sbatch"
JOBSET = "launch/gke/jobset.py"

# As a user would type them, with what breaks bad quoting.
TRICKY = ["--config", "configs/8b.py", "--workdir", "/gcs/bucket/my run"]
TRICKY += ["--config.data.train=('a b', \"c'd\", '$HOME', 'été', 'x\\y')"]
PLACE = ["--name", "run1", "--zone", "us-central2-b", "--project", "p"]


def call(script, *args, path=None, **environment):
  """Returns the finished process; only PATH and the given variables are in its environment."""
  program = sys.executable if script.endswith(".py") else "/bin/bash"
  return subprocess.run(
    [program, script, *args],
    cwd=ROOT,
    env={"PATH": path or os.environ["PATH"], "HOME": "/nowhere"} | environment,
    capture_output=True,
    text=True,
  )


def dry_run(script, *args, **environment):
  """Returns the printed commands as lists of arguments, after bash has found them well formed."""
  result = call(script, *args, **environment)
  assert result.returncode == 0, result.stderr
  subprocess.run(["bash", "-n"], input=result.stdout, text=True, check=True)
  return [shlex.split(line) for line in result.stdout.splitlines()]


def refusal(script, *args, **environment):
  """Returns the sentence of a refusal."""
  result = call(script, *args, **environment)
  assert result.returncode == 1
  assert result.stdout == ""
  assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr
  return result.stderr


def tpu_vm(command, *args, train=(), **environment):
  rest = ["--", *train] if train else []
  return dry_run(TPU_VM, command, "--dry_run", *PLACE, *args, *rest, **environment)


QUEUED = ["gcloud", "compute", "tpus", "queued-resources"]
WHERE = ["--zone=us-central2-b", "--project=p"]
TYPE = ["--accelerator_type", "v5p-256", "--runtime_version", "v2-alpha-tpuv5"]


def test_create_requests_one_slice_or_several():
  [one] = tpu_vm("create", *TYPE)
  assert one[:5] == [*QUEUED, "create"]
  assert {"run1", "--node-id=run1", "--accelerator-type=v5p-256", *WHERE} <= set(one)
  assert "--runtime-version=v2-alpha-tpuv5" in one
  [several] = tpu_vm("create", *TYPE, "--slices=2", "--spot")
  assert set(several) - set(one) == {"--node-count=2", "--node-prefix=run1", "--spot"}
  assert set(one) - set(several) == {"--node-id=run1"}


def test_options_may_stand_in_the_environment():
  names = dict(zip(("TPU_NAME", "TPU_ZONE", "TPU_PROJECT"), PLACE[1::2], strict=True))
  names |= {"TPU_ACCELERATOR_TYPE": TYPE[1], "TPU_RUNTIME_VERSION": TYPE[3]}
  names |= {"TPU_SLICES": "2", "TPU_SPOT": "yes"}
  [given] = dry_run(TPU_VM, "create", "--dry_run", **names)
  assert [given] == tpu_vm("create", *TYPE, "--slices", "2", "--spot")


def remote(command):
  """Returns what runs on the workers, after gcloud's shell has read it."""
  [text] = [arg.removeprefix("--command=") for arg in command if arg.startswith("--command=")]
  return shlex.split(text)


def test_run_hands_every_flag_to_every_worker_unchanged():
  [command] = tpu_vm("run", train=TRICKY)
  assert command[:6] == [*QUEUED, "ssh", "run1"]
  assert {"--node=all", "--worker=all", "--batch-size=all", *WHERE} <= set(command)
  assert remote(command) == ["bash", "mlembed_jax/launch/worker.sh", "start", *TRICKY]


def test_other_commands_of_tpu_vm():
  for command, verb in (("stop", "stop"), ("resume", "restart")):
    [sent] = tpu_vm(command)
    assert remote(sent) == ["bash", "mlembed_jax/launch/worker.sh", verb]
    assert {"--node=all", "--worker=all"} <= set(sent)
  [logs] = tpu_vm("logs")
  assert {"--node=0", "--worker=0"} <= set(logs) and remote(logs)[2] == "logs"
  assert tpu_vm("status")[0][4:6] == ["describe", "run1"]
  assert tpu_vm("delete")[0][4:6] == ["delete", "run1"]


def test_install_copies_the_commit_and_looks_at_the_bucket():
  bucket, archive, copied, installed = tpu_vm("install", "--bucket=b1")
  assert bucket[:5] == ["gcloud", "storage", "buckets", "describe", "gs://b1"]
  [file] = [arg.removeprefix("--output=") for arg in archive if arg.startswith("--output=")]
  assert archive[-1] == "HEAD" and file in copied and "run1:" in copied
  assert remote(installed)[-3:] == ["mlembed_jax.new/launch/worker.sh", "install", "b1"]
  assert len(tpu_vm("install")) == 3


@pytest.mark.parametrize(
  ("args", "words"),
  [
    (["bake"], "bake: unknown command"),
    (["stop"], "stop needs --name (or the environment variable TPU_NAME)"),
    (["stop", "--name", "a"], "stop needs --zone"),
    (["stop", "--name"], "--name needs a value"),
    (["stop", "--nmae", "a"], "--nmae: unknown option"),
    (["stop", "--name", "Run_1", "--zone", "z"], "--name Run_1: small letters"),
    (["create", *PLACE], "create needs --accelerator_type"),
    (["create", *PLACE, *TYPE, "--slices", "two"], "--slices two: a whole number"),
    (["install", *PLACE, "--bucket", "gs://b"], "--bucket gs://b: only its name"),
    (["run", *PLACE], "--config FILE is missing"),
    (["run", *PLACE, "--", "--config", "c"], "--workdir DIR is missing"),
    (["run", *PLACE, "--", "--config=c", "--workdir=gs://b/r"], "--workdir gs://b/r: not a path"),
    (["run", *PLACE, "--", "--config=c", "--workdir=run"], "--workdir run: give an absolute path"),
    (["stop", *PLACE, "--", "--config=c"], "stop takes no flags of mlembed_jax.train"),
  ],
)
def test_tpu_vm_refuses_in_one_sentence(args, words):
  assert words in refusal(TPU_VM, *args)


@pytest.fixture
def bare_path(tmp_path):
  """A PATH with what the scripts use, and neither gcloud nor kubectl."""
  for name in ("bash", "dirname", "git", "mktemp"):
    (tmp_path / name).symlink_to(shutil.which(name))
  return str(tmp_path)


def test_missing_clients_are_named(bare_path):
  assert "gcloud is not installed" in refusal(TPU_VM, "stop", *PLACE, path=bare_path)
  assert "kubectl is not installed" in refusal(JOBSET, "stop", "--name=a", path=bare_path)


# A worker, for real: its own home, real processes, real signals. In place of Python stands a script
# that ends as training does; a test of training itself is tests/test_train.py.
TRAIN = """#!/bin/bash
trap 'sleep 0.3; echo saved; exit 143' TERM
echo "in $PWD: $*"
for ((i = 0; i < 600; i++)); do sleep 0.1; done
"""


@pytest.fixture
def home(tmp_path):
  shutil.copytree(ROOT / "launch", tmp_path / "mlembed_jax/launch")
  python = tmp_path / "mlembed_run/venv/bin/python"
  python.parent.mkdir(parents=True)
  python.write_text(TRAIN)
  python.chmod(0o755)
  yield tmp_path
  worker(tmp_path, "stop")


def worker(home, *args):
  return call(str(home / "mlembed_jax/launch/worker.sh"), *args, HOME=str(home))


def log(home, line, seconds=20):
  """Waits for a line of the worker's log."""
  end = time.monotonic() + seconds
  while line not in (text := (home / "mlembed_run/log").read_text()).splitlines():
    assert time.monotonic() < end, text
    time.sleep(0.02)


def test_a_run_outlives_its_connection_saves_on_stop_and_starts_again(home):
  assert "nothing was run here yet" in worker(home, "restart").stderr
  assert "nothing is running" in worker(home, "stop").stdout
  assert worker(home, "start", *TRICKY).returncode == 0
  started = f"in {home}/mlembed_jax: -u -m mlembed_jax.train {' '.join(TRICKY)}"
  log(home, started)
  # Training goes on in a session of its own, although the shell that started it has ended.
  process = int((home / "mlembed_run/pid").read_text())
  assert os.getsid(process) not in (os.getsid(0), process)
  assert "already running" in worker(home, "start", *TRICKY).stderr
  assert "ended with status 143" in worker(home, "stop").stdout
  assert (home / "mlembed_run/log").read_text().splitlines()[-2:] == [
    "saved",
    "== ended with status 143",
  ]
  assert worker(home, "restart").returncode == 0
  assert "ended with status 143" in worker(home, "stop").stdout
  text = (home / "mlembed_run/log").read_text()
  assert text.count(started) == 2 and text.count("saved") == 2


def test_slurm_starts_one_task_per_gpu_with_flags_unchanged():
  [command] = dry_run(SLURM, "--dry_run", *TRICKY)
  assert command[0] == "srun" and "--kill-on-bad-exit=1" in command
  python = command.index(f"{ROOT}/.venv/bin/python")
  assert command[python + 1 :] == ["-u", "-m", "mlembed_jax.train", *TRICKY]
  flags = [line.split()[1] for line in (ROOT / SLURM).read_text().splitlines() if "#SBATCH" in line]
  values = dict(flag.partition("=")[::2] for flag in flags)
  assert values["--ntasks-per-node"] == values["--gpus-per-node"]
  assert values["--signal"] == "TERM@120"
  assert {"--requeue", "--open-mode"} <= set(values)
  assert not {"--gpus-per-task", "--gpu-bind"} & set(values)


def test_slurm_in_a_container():
  given = {"CONTAINER": "/images/a b.sqsh", "MOUNTS": "/data:/data"}
  [command] = dry_run(SLURM, "--dry_run", *TRICKY, **given)
  assert "--container-image=/images/a b.sqsh" in command
  assert f"--container-mounts={ROOT}:{ROOT},/data:/data" in command
  assert f"--container-workdir={ROOT}" in command and "python" in command


def test_slurm_refuses_in_one_sentence(tmp_path):
  assert "--workdir DIR is missing" in refusal(SLURM, "--config", "c")
  assert "not a path" in refusal(SLURM, "--config", "c", "--workdir", "gs://b/r")
  assert "MOUNTS is set without CONTAINER" in refusal(SLURM, *TRICKY, MOUNTS="/a:/a")
  assert "no such interpreter" in refusal(SLURM, *TRICKY, PYTHON="/nowhere/python")
  elsewhere = {"SLURM_SUBMIT_DIR": str(tmp_path)}
  assert "is not the root of the repository" in refusal(SLURM, *TRICKY, **elsewhere)


# srun and scontrol are Slurm's, so here they only say how they were called; the job as a whole was
# run on a real Slurm, through scancel, preemption and the time limit.
@pytest.mark.parametrize(("status", "requeued"), [(0, False), (1, False), (143, True)])
def test_slurm_requeues_after_143_alone(tmp_path, status, requeued):
  for name, text in {"srun": f"exit {status}", "scontrol": 'echo "scontrol $*"'}.items():
    (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
    (tmp_path / name).chmod(0o755)
  path = f"{tmp_path}:{os.environ['PATH']}"
  result = call(SLURM, *TRICKY, path=path, PYTHON="python3", SLURM_JOB_ID="7")
  assert result.returncode == status
  assert ("scontrol requeue 7" in result.stdout) == requeued


RUN = ["run", "--dry_run", "--name=run1", "--image=img", "--tpu=v5p", "--topology=4x4x8"]
RUN += ["--bucket=bucket"]


def jobset(*more):
  """Returns the manifest that `run` would create."""
  result = call(JOBSET, *RUN, *more, "--", *TRICKY)
  assert result.returncode == 0, result.stderr
  subprocess.run(["bash", "-n"], input=result.stdout, text=True, check=True)
  command, _, rest = result.stdout.partition("\n")
  assert command == "kubectl --namespace=default create --filename=- <<'MANIFEST'"
  text, end, _ = rest.rpartition("MANIFEST")
  assert end and "${" not in text
  return yaml.safe_load(text)


def job(manifest):
  return manifest["spec"]["replicatedJobs"][0]["template"]["spec"]


def pod(manifest):
  return job(manifest)["template"]["spec"]


def rule(manifest):
  return manifest["spec"]["failurePolicy"]["rules"][0]


ACTIONS = {"FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"}


def fits(manifest):
  """Whether models made from the OpenAPI of JobSet and Kubernetes give a manifest back unchanged.

  They know every field with its type. The actions of failures stand in the definition of JobSet
  alone; with that of JobSet 0.13 this manifest was checked, too.
  """
  try:
    same = JobsetV1alpha2JobSet.from_dict(manifest).to_dict() == manifest
  except ValueError:
    return False
  return same and rule(manifest)["action"] in ACTIONS


@pytest.mark.parametrize("more", [[], ["--slices=2", "--spot"]])
def test_the_jobset_fits_its_definition(more):
  assert fits(jobset(*more))


BREAKS = {
  "a misspelt field of the JobSet": lambda m: m["spec"].update(failurepolicy={}),
  "an action that does not exist": lambda m: m["spec"]["failurePolicy"]["rules"][0].update(
    action=""
  ),
  "a rule without name": lambda m: m["spec"]["failurePolicy"]["rules"][0].pop("name"),
  "text for a number": lambda m: m["spec"]["replicatedJobs"][0].update(replicas="2"),
  "a misspelt field of the job": lambda m: job(m).update(backofflimit=0),
  "a misspelt field of the pod": lambda m: pod(m).update(hostnetwork=True),
  "a flag that is no text": lambda m: pod(m)["containers"][0]["args"].append(3),
}


@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_jobset_is_found(name):
  broken = copy.deepcopy(jobset())
  BREAKS[name](broken)
  assert not fits(broken)


def test_the_jobset_says_what_was_asked_for():
  manifest = jobset("--slices=3", "--spot", "--max_restarts=5", "--grace_s=60")
  replicated = manifest["spec"]["replicatedJobs"][0]
  assert manifest["metadata"]["name"] == "run1" and replicated["replicas"] == 3
  # 4 x 4 x 8 chips, 4 to a machine.
  assert job(manifest)["parallelism"] == job(manifest)["completions"] == 32
  assert manifest["spec"]["failurePolicy"]["maxRestarts"] == 5
  assert pod(manifest)["terminationGracePeriodSeconds"] == 60
  selector = pod(manifest)["nodeSelector"]
  assert selector["cloud.google.com/gke-tpu-accelerator"] == "tpu-v5p-slice"
  assert selector["cloud.google.com/gke-tpu-topology"] == "4x4x8"
  assert selector["cloud.google.com/gke-spot"] == "true"
  [container], [volume] = pod(manifest)["containers"], pod(manifest)["volumes"]
  assert container["command"] == ["python", "-u", "-m", "mlembed_jax.train"]
  assert container["args"] == ["--grace_s=23", *TRICKY] and container["image"] == "img"
  assert container["resources"]["limits"] == {"google.com/tpu": 4}
  assert container["volumeMounts"] == [{"name": volume["name"], "mountPath": "/gcs/bucket"}]
  assert volume["csi"]["volumeAttributes"]["bucketName"] == "bucket"


CHANGES = {
  "--name": "other",
  "--image": "other",
  "--tpu": "v4",
  "--topology": "4x4x4",
  "--slices": "2",
  "--chips_per_host": "8",
  "--spot": None,
  "--service_account": "other",
  "--max_restarts": "9",
  "--grace_s": "9",
}


@pytest.mark.parametrize("flag", CHANGES)
def test_every_flag_changes_the_jobset(flag):
  value = CHANGES[flag]
  assert jobset(flag if value is None else f"{flag}={value}") != jobset()


@pytest.mark.parametrize("name", TPUS)
def test_the_jobset_asks_for_nodes_of_the_generation_where_nothing_is_installed(name):
  bare = [sys.executable, "-I", "-S", JOBSET]  # neither this package nor any other
  command = [*bare, *RUN, f"--tpu={name}", "--", *TRICKY]
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
  label = f'"cloud.google.com/gke-tpu-accelerator": "{TPUS[name].gke_accelerator}"'
  assert label in done.stdout


def test_other_commands_of_jobset():
  place = ["--name=run1", "--namespace=team", "--dry_run"]
  start = ["kubectl", "--namespace=team"]
  for command, value in (("stop", True), ("resume", False)):
    [sent] = dry_run(JOBSET, command, *place)
    assert sent[:5] == [*start, "patch", "jobset", "run1"]
    assert json.loads(sent[-1].removeprefix("--patch=")) == {"spec": {"suspend": value}}
  [logs] = dry_run(JOBSET, "logs", *place)
  assert "jobset.sigs.k8s.io/jobset-name=run1" in logs[-1]
  assert dry_run(JOBSET, "delete", *place) == [[*start, "delete", "jobset", "run1"]]


@pytest.mark.parametrize(
  ("args", "words"),
  [
    ([*RUN], "--config is missing"),
    ([*RUN, "--", "--config=c"], "--workdir is missing"),
    ([*RUN, "--", "--config=c", "--workdir=gs://b/r"], "--workdir gs://b/r: not a path"),
    ([*RUN, "--", "--config=c", "--workdir=/tmp/r"], "the disk of a pod is lost with it"),
    ([*RUN, "--tpu=v9", "--", *TRICKY], "--tpu v9: one of v4"),
    ([*RUN, "--topology=16", "--", *TRICKY], "--topology 16: chips along each axis"),
    ([*RUN, "--chips_per_host=3", "--", *TRICKY], "--chips_per_host 3: the 128 chips"),
    ([*RUN, "--slices=0", "--", *TRICKY], "--slices 0: 1 or more"),
    ([*RUN, "--bucket=gs://b", "--", *TRICKY], "--bucket gs://b: only its name"),
    ([*RUN, "--name=Run_1", "--", *TRICKY], "--name Run_1: small letters"),
    (["stop", "--name=a", "--", "--config=c"], "stop takes no flags of mlembed_jax.train"),
  ],
)
def test_jobset_refuses_in_one_sentence(args, words):
  assert words in refusal(JOBSET, *args)


def test_the_image_holds_what_training_needs():
  lines = (ROOT / "launch/gke/Dockerfile").read_text().splitlines()
  copied = [name for line in lines if line.startswith("COPY") for name in line.split()[1:-1]]
  assert {"pyproject.toml", "README.md", "mlembed_jax", "configs"} <= set(copied)
  assert all((ROOT / name).exists() for name in copied)
