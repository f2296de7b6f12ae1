#!/usr/bin/env bash
# What launch/tpu_vm.sh runs on each worker: worker.sh COMMAND.
#
#   install [BUCKET]  moves the repository this file stands in to ~/mlembed_jax and installs it;
#                     mounts the bucket at /gcs/BUCKET
#   start FLAGS       starts mlembed_jax.train, detached from the connection
#   restart           starts the last command again
#   logs              follows the log, from its last lines
#   stop              SIGTERM, and waits for the end
#
# ~/mlembed_run holds the virtual environment, and command.sh, pid and log of the last start.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
root=$HOME/mlembed_jax
folder=$HOME/mlembed_run

# Prints the process number of a live run, nothing where none is.
running() {
  local pid
  pid=$(cat "$folder/pid" 2> /dev/null) || return 0
  # After a reboot the number may be another program's.
  if tr '\0' ' ' 2> /dev/null < "/proc/$pid/cmdline" | grep -q mlembed_jax.train; then echo "$pid"; fi
}

# Takes the place of the installation before. The images have Python 3.10, and 3.11 is needed, so uv
# brings an interpreter of its own. The quickstart is a first check of a new pod.
install() {
  local new pid
  pid=$(running)
  [[ -z $pid ]] || fail "$(hostname): process $pid is training; stop it first"
  new=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
  rm -rf "$root" && mv "$new" "$root"
  export PATH=$HOME/.local/bin:$PATH
  command -v uv > /dev/null || curl -LsSf https://astral.sh/uv/install.sh | sh
  uv venv --quiet --allow-existing --python 3.12 "$folder/venv"
  uv pip install --quiet --python "$folder/venv/bin/python" -e "${root}[tpu,quickstart]"
  if [[ -n ${1:-} ]]; then mount_bucket "$1"; fi
  echo "$(hostname): installed"
}

# The mount point belongs to root: where the mount is missing, after a reboot, a run fails instead of
# filling the local disk; install mounts again. Metadata are not cached: every worker must see at
# once what another wrote.
mount_bucket() {
  mountpoint -q "/gcs/$1" && return
  command -v gcsfuse > /dev/null || install_gcsfuse
  sudo mkdir -p "/gcs/$1"
  sudo gcsfuse -o allow_other --uid "$(id -u)" --gid "$(id -g)" --implicit-dirs \
    --metadata-cache-ttl-secs 0 "$1" "/gcs/$1"
}

install_gcsfuse() {
  local key=/usr/share/keyrings/cloud.google.asc packages=https://packages.cloud.google.com/apt
  curl -fsS "$packages/doc/apt-key.gpg" | sudo tee "$key" > /dev/null
  echo "deb [signed-by=$key] $packages gcsfuse-$(lsb_release -cs) main" |
    sudo tee /etc/apt/sources.list.d/gcsfuse.list > /dev/null
  sudo apt-get update -qq && sudo apt-get install -y -qq gcsfuse
}

# Writes the command to command.sh, so that `restart` needs no flags.
start() {
  mkdir -p "$folder"
  {
    echo "cd $(quoted "$root")"
    echo "exec $(quoted "$folder/venv/bin/python" -u -m mlembed_jax.train "$@")"
  } > "$folder/command.sh.new"
  mv "$folder/command.sh.new" "$folder/command.sh"
  launch
}

restart() {
  [[ -f $folder/command.sh ]] || fail "$(hostname): nothing was run here yet; use run"
  launch
}

# A session of its own, without terminal: the end of the connection does not reach it.
launch() {
  local pid
  pid=$(running)
  [[ -z $pid ]] || fail "$(hostname): already running as process $pid; stop it first"
  echo "== $(date --iso-8601=seconds) $(tail -n 1 "$folder/command.sh")" >> "$folder/log"
  # shellcheck disable=SC2016 # expanded by the new shell
  setsid bash -c 'bash "$1/command.sh" & echo $! > "$1/pid"; wait $!; echo "== ended with status $?"' \
    launch "$folder" >> "$folder/log" 2>&1 < /dev/null &
  while [[ -z $(running) ]] && kill -0 $! 2> /dev/null; do sleep 0.1; done
  echo "$(hostname): started, log in $folder/log"
}

stop() {
  local pid
  pid=$(running)
  if [[ -z $pid ]]; then
    echo "$(hostname): nothing is running"
    return
  fi
  kill -TERM "$pid"
  while kill -0 "$pid" 2> /dev/null; do sleep 0.5; done
  sleep 0.2 # the shell around it writes the status
  echo "$(hostname): $(tail -n 1 "$folder/log")"
}

logs() {
  [[ -f $folder/log ]] || fail "$(hostname): nothing was run here yet"
  exec tail -n 50 -F "$folder/log"
}

command=${1:-}
case $command in
  install | start | restart | stop | logs) shift && "$command" "$@" ;;
  *) fail "worker.sh: unknown command '$command'" ;;
esac
