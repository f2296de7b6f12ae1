"""Training on several processes, real ones: the same numbers, agreed stops, and every refusal."""

import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import safetensors.numpy

from mlembed_jax.errors import ConfigError
from mlembed_jax.parallel import join
from tests import runs
from tests.runs import ENVIRONMENT, ROOT, arrays, lines, wait_for_step

LAUNCHER = ROOT / "launch" / "local_processes.py"
STEPS = 16
# Gloo writes its line in these pieces, between which pieces of its other threads may come.
GLOO = re.compile(
  r"\[Gloo\] Rank |\d+| is connected to | peer ranks\. "
  r"|Expected number of connected peer ranks is : "
)
SMALL = runs.SMALL | {
  "data.heldout": "('heldout/bitext.parquet',)",
  "data.global_batch": 16,
  "matryoshka.dims": "(16,48)",
  "train.steps": STEPS,
  "train.checkpoint_every": 4,
  "export.at_end": True,
}


def launcher(processes, devices, *arguments, more=()):
  counts = f"--processes={processes}", f"--devices={devices}"
  return [sys.executable, LAUNCHER, *counts, *more, "--", *map(str, arguments)]


def start(*command, **variables):
  pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
  environment = ENVIRONMENT | variables
  return subprocess.Popen(list(map(str, command)), cwd=ROOT, env=environment, **pipes)


def finish(process, seconds=300):
  output, errors = process.communicate(timeout=seconds)
  return process.returncode, output, errors


def training(data, workdir, **overrides):
  shown = {"data.manifest": data / "manifest.json", "train.trackers": "('tensorboard',)"}
  return runs.command(data, workdir, **SMALL | shown | overrides)[1:]


def children(process):
  """Returns the processes of a launcher in their order."""
  path = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children")
  return [int(pid) for pid in path.read_text().split()]


@pytest.fixture(scope="module")
def alone(data, tmp_path_factory):
  """The workdir of a run on one process with eight devices, no launcher around it."""
  workdir = tmp_path_factory.mktemp("alone")
  command = [sys.executable, *training(data, workdir)]
  status, _, errors = finish(start(*command, JAX_NUM_CPU_DEVICES="8"))
  assert status == 0, errors
  return workdir


@pytest.fixture(scope="module")
def stopped(data, tmp_path_factory):
  """A run of 2 x 4 devices: workdir, status, output. SIGTERM to process 1 stopped it."""
  workdir = tmp_path_factory.mktemp("together")
  process = start(*launcher(2, 4, *training(data, workdir)))
  wait_for_step(workdir, 2)
  os.kill(children(process)[1], signal.SIGTERM)
  status, output, errors = finish(process)
  return workdir, status, output, errors, lines(workdir)


@pytest.fixture(scope="module")
def continued(data, stopped):
  """The same run to its end on 4 x 2 devices, each pair of which splits heads and MLP."""
  workdir = stopped[0]
  command = launcher(4, 2, *training(data, workdir, **{"mesh.tensor": 2}))
  status, output, errors = finish(start(*command))
  assert status == 0, errors
  return workdir, output


def test_a_signal_to_one_process_stops_all_after_the_same_step(stopped):
  workdir, status, output, errors, written = stopped
  assert status == 143, errors
  saved = max(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit())
  assert 2 <= saved < STEPS and written[-1]["step"] == saved
  assert f"[0] stopped by signal 15; step {saved} is saved, the same command goes on" in output
  assert "Traceback" not in errors


def test_every_layout_gives_the_same_losses(alone, stopped, continued):
  first, last = lines(alone), lines(continued[0])
  assert [line["step"] for line in last] == list(range(1, STEPS + 1))
  for name in ("loss", "gradient_norm", "negatives"):
    expected, found = ([line[name] for line in of] for of in (first, last))
    np.testing.assert_allclose(found, expected, rtol=1e-5)
  losses = [[line["loss"] for line in of] for of in (first, last)]
  assert max(losses[0]) > 1.1 * min(losses[0])  # there is something to compare


def test_a_run_goes_on_on_fewer_devices_and_more_processes(data, alone, tmp_path):
  shutil.copytree(alone, tmp_path, dirs_exist_ok=True)
  for at, processes, devices, tensor in ((4, 1, 4, 2), (8, 1, 1, 1), (12, 2, 1, 1)):
    arguments = training(data, tmp_path, **{"export.at_end": False, "mesh.tensor": tensor})
    command = launcher(processes, devices, *arguments, "--from_step", at)
    status, _, errors = finish(start(*command))
    assert status == 0, errors
  losses = [[line["loss"] for line in lines(workdir)] for workdir in (alone, tmp_path)]
  assert losses[0] != losses[1]  # other layouts have computed them
  np.testing.assert_allclose(losses[1], losses[0], rtol=1e-6)


def test_every_layout_ends_with_the_same_state(alone, continued):
  for one, other in zip(arrays(alone, STEPS), arrays(continued[0], STEPS), strict=True):
    np.testing.assert_allclose(other, one, rtol=1e-3, atol=1e-5 * np.abs(one).max())


def test_every_layout_gives_the_same_scores_and_export(alone, continued):
  for step in (0, STEPS):
    one, other = (
      json.loads((w / f"eval/step_{step}.json").read_text())["scores"]
      for w in (alone, continued[0])
    )
    axes = ("task", "metric", "rank", "depth", "dim", "precision")
    assert [[r[axis] for axis in axes] for r in one] == [[r[axis] for axis in axes] for r in other]
    scores = [[r["score"] for r in of] for of in (one, other)]
    np.testing.assert_allclose(scores[1], scores[0], atol=0.02)  # 1 of 100 texts per language
  one, other = (
    safetensors.numpy.load_file(w / "export/tiny/model.safetensors") for w in (alone, continued[0])
  )
  for name, array in one.items():
    np.testing.assert_allclose(other[name], array, rtol=1e-3, atol=1e-5 * np.abs(array).max())


def test_an_adapter_is_learnt_by_processes_as_by_one(data, exported, tmp_path):
  lora = {"model.lora.rank": 4, "train.init_from": exported["full"], "model.layers": 3}
  lora |= {"matryoshka.exits": "(3,)", "train.steps": 4, "data.heldout": "()", "data.manifest": ""}
  found = []
  for processes, devices, tensor in ((1, 1, 1), (2, 2, 2)):
    workdir = tmp_path / str(processes)
    arguments = training(data, workdir, **lora, **{"mesh.tensor": tensor})
    status, _, errors = finish(start(*launcher(processes, devices, *arguments)))
    assert status == 0, errors
    weights = safetensors.numpy.load_file(workdir / "export/tiny/model.safetensors")
    found.append(([line["loss"] for line in lines(workdir)], weights))
  (losses, weights), (others, same) = found
  before = safetensors.numpy.load_file(exported["full"] / "model.safetensors")
  assert max(np.abs(weights[name] - x).max() for name, x in before.items()) > 0.001
  np.testing.assert_allclose(others, losses, rtol=1e-5)
  for name, array in weights.items():
    np.testing.assert_allclose(same[name], array, rtol=1e-3, atol=1e-5 * np.abs(array).max())


def test_one_process_prints_and_writes(alone, continued):
  workdir, output = continued
  printed = output.splitlines()
  assert "[0] 4 processes with 2 x cpu each" in printed
  others = [line for line in printed if not line.startswith("[0]")]
  assert not [line for line in others if GLOO.sub("", line.partition(" ")[2]).strip()]
  names = lambda folder: {p.name for p in folder.iterdir()}  # noqa: E731
  assert names(workdir) == names(alone)
  assert len(list((workdir / "tensorboard").glob("events.*"))) == 2  # one of each run


def test_what_processes_do_together(tmp_path):
  status, output, errors = finish(start(*launcher(2, 2, "-m", "tests.processes_script", tmp_path)))
  assert status == 0, errors
  assert "[0] all is well" in output


DIFFERENT_SEED = (
  "import os, sys; own = ['--config.train.seed=7'] * (os.environ['JAX_PROCESS_ID'] == '1'); "
  "os.execv(sys.executable, [sys.executable, *sys.argv[1:], *own])"
)


def test_another_configuration_on_one_process_is_refused_by_all(data, tmp_path):
  command = launcher(2, 1, "-c", DIFFERENT_SEED, *training(data, tmp_path))
  status, _, errors = finish(start(*command))
  assert status == 1
  for number in (0, 1):
    assert f"[{number}] error: process 1: not the same run as process 0; start all " in errors
  assert "train.seed: 0 on process 0, 7 on process 1" in errors and "Traceback" not in errors
  assert not (tmp_path / "checkpoints").exists()


def test_processes_that_do_not_meet_end_in_time_with_a_message(data, tmp_path):
  with join.socket.create_server(("", 0)) as server:
    free = server.getsockname()[1]
  flags = [*training(data, tmp_path), "--join_timeout_s=3"]
  began = time.monotonic()
  two = [
    start(
      *(sys.executable, *flags),
      JAX_COORDINATOR_ADDRESS=f"localhost:{port}",
      JAX_NUM_PROCESSES="3",
      JAX_PROCESS_ID=str(number),
    )
    for number, port in ((0, free), (1, free), (2, 1))
  ]
  results = [finish(process) for process in two]
  assert time.monotonic() - began < 60  # jax alone waits 300 s
  assert [status for status, _, _ in results] == [1, 1, 1]
  expected = (
    f"error: not all 3 processes came to localhost:{free} within 3 s; check",
    f"error: process 1 is connected with process 0 at localhost:{free}, but not all 3 processes",
    "error: process 2 cannot reach process 0 at localhost:1 (Connection refused, for 3 s); check",
  )
  for (_, _, errors), message in zip(results, expected, strict=True):
    assert message in errors and "firewall" in errors
    assert "Traceback" not in errors and "stack trace" not in errors


def test_a_port_that_is_taken_is_named():
  with join.socket.create_server(("", 0)) as server:
    member = join.Member(f"localhost:{server.getsockname()[1]}", 2, 0)
    with pytest.raises(ConfigError, match=r"cannot listen on port \d+: Address already in use"):
      join._check_address(member, time.monotonic())


def test_jax_still_says_the_same_of_a_single_machine():
  """On TPU machines it is asked whether there are others; `join` goes by this answer."""
  code = "import jax; jax.distributed.initialize()"
  _, _, errors = finish(start(sys.executable, "-c", code))
  assert f"ValueError: {join.NO_CLUSTER}" in errors


ALL = {
  "JAX_COORDINATOR_ADDRESS": "10.0.0.2:8476",
  "JAX_NUM_PROCESSES": "4",
  "JAX_PROCESS_ID": "3",
}


def test_the_three_variables():
  assert join.from_environment({}) is None
  assert join.from_environment(ALL) == join.Member("10.0.0.2:8476", 4, 3)
  assert join.Member("[::1]:80", 1, 0).endpoint == ("::1", 80)


@pytest.mark.parametrize(
  ("changed", "message"),
  [
    ({"JAX_PROCESS_ID": ""}, "JAX_PROCESS_ID not set, but JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCES"),
    ({"JAX_PROCESS_ID": "4"}, "JAX_PROCESS_ID: 4 is too high; JAX_NUM_PROCESSES = 4, and ids begi"),
    ({"JAX_PROCESS_ID": "-1"}, "JAX_PROCESS_ID: '-1' is no whole number from 0 on"),
    ({"JAX_NUM_PROCESSES": "four"}, "JAX_NUM_PROCESSES: 'four' is no whole number from 0 on"),
    ({"JAX_NUM_PROCESSES": "0"}, "JAX_NUM_PROCESSES: 0 processes; it counts all of them"),
    ({"JAX_COORDINATOR_ADDRESS": "host"}, "'host' is no HOST:PORT, such as 10.0.0.2:8476"),
    ({"JAX_COORDINATOR_ADDRESS": "host:0"}, "'host:0' is no HOST:PORT"),
  ],
)
def test_variables_that_contradict_each_other_are_refused(changed, message):
  with pytest.raises(ConfigError) as error:
    join.from_environment(ALL | changed)
  assert message in str(error.value)


SLURM = dict.fromkeys(("SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID"), "0")


@pytest.mark.parametrize(
  ("variables", "expected"),
  [
    ({}, None),
    (SLURM | {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "2"}, "slurm"),
    (SLURM | {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "1"}, None),  # one task may have eight GPUs
    ({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "2"}, None),  # a batch script, not a step of it
    ({"OMPI_MCA_orte_hnp_uri": "1.0;tcp://10.0.0.1:1", "OMPI_COMM_WORLD_SIZE": "2"}, "ompi"),
    ({"TPU_WORKER_HOSTNAMES": "a,b"}, "gketpu"),
    ({"TPU_WORKER_HOSTNAMES": "a,b", "JAX_PLATFORMS": "cpu"}, None),
    ({"TPU_WORKER_HOSTNAMES": "localhost"}, None),
    ({"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"}, "gketpu"),
    ({"KUBERNETES_SERVICE_HOST": "a", "JOB_COMPLETION_INDEX": "0"}, "k8s"),
    ({"KUBERNETES_SERVICE_HOST": "a"}, None),
  ],
)
def test_clusters_are_told_by_their_variables(monkeypatch, variables, expected):
  monkeypatch.setattr(join.importlib.util, "find_spec", lambda name: name)
  assert join.cluster(variables) == expected
  monkeypatch.setattr(join.importlib.util, "find_spec", lambda name: None)
  assert join.cluster(variables) == (expected if expected in ("slurm", "ompi") else None)


FAILS = (
  "import os, sys, time; print('here'); "
  "os.environ['JAX_PROCESS_ID'] != '1' and time.sleep(60); sys.exit(3)"
)


def test_a_process_that_fails_ends_the_others():
  began = time.monotonic()
  status, output, errors = finish(start(*launcher(3, 1, "-c", FAILS, more=["--leave_s=0.2"])))
  assert status == 3 and time.monotonic() - began < 30
  assert sorted(output.split("\n")) == ["", "[0] here", "[1] here", "[2] here"]
  assert errors == "process 1 ended with status 3\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_are_passed_on(number):
  process = start(*launcher(2, 1, "-c", "import time; print('here'); time.sleep(60)"))
  for _ in range(2):
    process.stdout.readline()
  process.send_signal(number)
  assert finish(process, 30)[0] == 128 + number


def test_a_dry_run_prints_commands_that_a_shell_runs():
  command = launcher(2, 3, "-c", "print('a b')", more=["--dry_run", "--port=1234"])
  status, output, _ = finish(start(*command))
  assert status == 0
  for number, line in enumerate(output.splitlines()):
    words = shlex.split(line)
    assert words[0] == "env" and words[-3:] == [sys.executable, "-c", "print('a b')"]
    for variable in (
      "JAX_COORDINATOR_ADDRESS=localhost:1234",
      "JAX_NUM_PROCESSES=2",
      f"JAX_PROCESS_ID={number}",
      "JAX_NUM_CPU_DEVICES=3",
    ):
      assert variable in words
    assert subprocess.check_output(line, shell=True, text=True) == "a b\n"


@pytest.mark.parametrize("count", ["0", "two"])
def test_a_launcher_without_processes_is_refused(count):
  status, _, errors = finish(start(*launcher(count, 1, "-c", "pass")))
  assert status == 2 and f"{count!r} is no whole number from 1 on" in errors
