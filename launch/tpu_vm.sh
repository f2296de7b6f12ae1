#!/usr/bin/env bash
# Trains on a Cloud TPU slice, or several, without Kubernetes.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=launch/common.sh
source "$root/launch/common.sh"

usage() {
  cat <<'EOF'
Usage: launch/tpu_vm.sh COMMAND --name NAME --zone ZONE [OPTIONS] [-- FLAGS OF mlembed_jax.train]

Commands:
  create    requests the slices as a queued resource and returns at once
  status    prints the state of the request; install when it says ACTIVE
  install   copies the last commit of this repository to all workers and installs it there;
            again after changes
  run       starts training on all workers; it goes on when the connection is lost. Needs the flags
            of mlembed_jax.train, with an absolute --workdir on storage that all workers share
  logs      follows the log of process 0
  stop      SIGTERM on all workers, and waits until the checkpoint is written and they have ended
  resume    starts the command of the last `run` again; it goes on from its newest checkpoint.
            Preempted slices are gone with their disks: delete, create, install and run again
  delete    gives the slices back. What is not on shared storage is lost

Options, each also as an environment variable:
  --name NAME                TPU_NAME     of the queued resource and of its slices
  --zone ZONE                TPU_ZONE     such as us-central2-b
  --project PROJECT          TPU_PROJECT  default: that of gcloud's configuration
  --accelerator_type TYPE    TPU_ACCELERATOR_TYPE  for create: such as v5p-256, v6e-64
  --runtime_version VERSION  TPU_RUNTIME_VERSION   for create: such as v2-alpha-tpuv5
  --slices N                 TPU_SLICES   for create: how many (1)
  --spot                     TPU_SPOT=yes for create: cheaper, and may be taken back
  --bucket BUCKET            TPU_BUCKET   for install: Cloud Storage bucket, mounted at /gcs/BUCKET
  --dry_run                  prints the commands and runs nothing
EOF
}

# Sets the variables of the options from the arguments; the rest goes to $train.
parse() {
  train=()
  while (($#)); do
    case $1 in
      --dry_run) dry_run=yes ;;
      --spot) TPU_SPOT=yes ;;
      --name | --zone | --project | --accelerator_type | --runtime_version | --slices | --bucket)
        (($# > 1)) || fail "$1 needs a value"
        set_option "$1" "$2"
        shift
        ;;
      --name=* | --zone=* | --project=* | --accelerator_type=* | --runtime_version=* | --slices=* | --bucket=*)
        set_option "${1%%=*}" "${1#*=}"
        ;;
      --)
        shift
        train=("$@")
        return
        ;;
      *) fail "$1: unknown option; launch/tpu_vm.sh --help lists them" ;;
    esac
    shift
  done
}

# Gives variable TPU_NAME the value of option --name, and so for every option.
set_option() {
  local name=${1#--}
  printf -v "TPU_${name^^}" '%s' "$2"
}

# Ends the program where an option of the command is missing or cannot be meant.
check() {
  require name zone
  [[ $TPU_NAME =~ ^[a-z]([a-z0-9-]*[a-z0-9])?$ ]] ||
    fail "--name $TPU_NAME: small letters, digits and hyphens, a letter first"
  case $command in
    create)
      require accelerator_type runtime_version
      [[ $TPU_SLICES =~ ^[1-9][0-9]*$ ]] || fail "--slices $TPU_SLICES: a whole number, 1 or more"
      ;;
    install)
      [[ -z $TPU_BUCKET || $TPU_BUCKET =~ ^[a-z0-9][a-z0-9._-]+$ ]] ||
        fail "--bucket $TPU_BUCKET: only its name, without gs:// and folders"
      ;;
    run) check_train_flags "${train[@]}" ;;
  esac
  [[ $command == run || ${#train[@]} == 0 ]] ||
    fail "$command takes no flags of mlembed_jax.train; only run does"
  [[ -n $dry_run ]] || command -v gcloud > /dev/null ||
    fail "gcloud is not installed; see https://cloud.google.com/sdk/docs/install"
}

# Ends the program unless these options have values.
require() {
  local name variable
  for name in "$@"; do
    variable=TPU_${name^^}
    [[ -n ${!variable} ]] || fail "$command needs --$name (or the environment variable $variable)"
  done
}

# gcloud compute tpus queued-resources COMMAND TPU_NAME with what every call needs.
queued_resources() {
  local verb=$1
  shift
  execute gcloud compute tpus queued-resources "$verb" "$@" --zone="$TPU_ZONE" \
    ${TPU_PROJECT:+--project="$TPU_PROJECT"}
}

# Runs worker.sh with these arguments on all workers of all slices at once, after shell code $1.
on_workers() {
  local first=$1
  shift
  queued_resources ssh "$TPU_NAME" --node=all --worker=all --batch-size=all \
    --command="${first:+$first }bash $(quoted "$@")"
}

create() {
  local nodes=(--node-id="$TPU_NAME")
  ((TPU_SLICES == 1)) || nodes=(--node-count="$TPU_SLICES" --node-prefix="$TPU_NAME")
  # The scope lets workers read and write buckets.
  queued_resources create "$TPU_NAME" "${nodes[@]}" --accelerator-type="$TPU_ACCELERATOR_TYPE" \
    --runtime-version="$TPU_RUNTIME_VERSION" ${TPU_SPOT:+--spot} \
    --scopes=https://www.googleapis.com/auth/cloud-platform
}

install() {
  local archive
  archive=$(mktemp -d)/mlembed_jax.tar.gz
  trap 'rm -rf "$(dirname "$archive")"' RETURN
  [[ -z $TPU_BUCKET ]] || check_bucket
  [[ -z $(git -C "$root" status --porcelain) ]] ||
    echo "note: changes that are not committed are not copied" >&2
  execute git -C "$root" archive --format=tar.gz --prefix=mlembed_jax.new/ --output="$archive" HEAD
  queued_resources scp "$archive" "$TPU_NAME:" --node=all --worker=all
  on_workers "rm -rf mlembed_jax.new && tar xzf mlembed_jax.tar.gz &&" \
    mlembed_jax.new/launch/worker.sh install "$TPU_BUCKET"
}

# Checkpoints are written to a folder that is then renamed: in a bucket without a hierarchical
# namespace, gcsfuse refuses that, and the run would fail at its first checkpoint.
check_bucket() {
  local found
  found=$(execute gcloud storage buckets describe "gs://$TPU_BUCKET" --raw \
    --format='value(hierarchicalNamespace.enabled)')
  if [[ -n $dry_run ]]; then echo "$found"; elif [[ $found != True ]]; then
    fail "gs://$TPU_BUCKET has no hierarchical namespace; create a bucket with" \
      "--uniform-bucket-level-access --enable-hierarchical-namespace"
  fi
}

if [[ $# == 0 || $1 == -h || $1 == --help ]]; then
  usage
  exit 0
fi
command=$1
shift
: "${TPU_NAME:=}" "${TPU_ZONE:=}" "${TPU_PROJECT:=}" "${TPU_ACCELERATOR_TYPE:=}" "${TPU_RUNTIME_VERSION:=}"
: "${TPU_SLICES:=1}" "${TPU_SPOT:=}" "${TPU_BUCKET:=}"
dry_run=""
worker=mlembed_jax/launch/worker.sh # under the home directory of a worker
case $command in
  create | status | install | run | logs | stop | resume | delete) ;;
  *) fail "$command: unknown command; launch/tpu_vm.sh --help lists them" ;;
esac
parse "$@"
check

case $command in
  create) create ;;
  status) queued_resources describe "$TPU_NAME" --format='value(state.state)' ;;
  install) install ;;
  run) on_workers "" "$worker" start "${train[@]}" ;;
  resume) on_workers "" "$worker" restart ;;
  logs) queued_resources ssh "$TPU_NAME" --node=0 --worker=0 --command="bash $worker logs" ;;
  stop) on_workers "" "$worker" stop ;;
  delete) queued_resources delete "$TPU_NAME" --force --quiet ;;
esac
