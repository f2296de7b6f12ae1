#!/usr/bin/env bash
# What the launchers share. Sourced, never run.

# Prints one sentence and ends with status 1.
fail() {
  echo "error: $*" >&2
  exit 1
}

((BASH_VERSINFO[0] * 10 + BASH_VERSINFO[1] >= 44)) ||
  fail "bash $BASH_VERSION is too old, 4.4 is needed; on macOS: brew install bash"

# Prints its arguments as one line that any POSIX shell reads back as the same arguments. (bash's own
# ${word@Q} and printf %q write other letters in a form of bash alone.)
quoted() {
  local word line="" quote="'\\''"
  for word in "$@"; do
    [[ $word =~ ^[A-Za-z0-9_@%+=:,./-]+$ ]] || word="'${word//\'/"$quote"}'"
    line+="$word "
  done
  printf '%s\n' "${line% }"
}

# Runs a command, or prints it where $dry_run is set.
execute() {
  if [[ -n ${dry_run:-} ]]; then quoted "$@"; else "$@"; fi
}

# Prints the value of flag $1 among the other arguments, in any of absl's forms; the last one
# counts, as it does there. Nothing where the flag is absent.
flag_value() {
  local name=$1 value=""
  shift
  while (($#)); do
    case $1 in
      "--$name="* | "-$name="*) value=${1#*=} ;;
      "--$name" | "-$name") value=${2:-} ;;
    esac
    shift
  done
  printf '%s' "$value"
}

# Ends the program unless the arguments are flags of mlembed_jax.train that can work on a pod.
check_train_flags() {
  local workdir
  [[ -n $(flag_value config "$@") ]] ||
    fail "--config FILE is missing among the flags of mlembed_jax.train"
  workdir=$(flag_value workdir "$@")
  [[ -n $workdir ]] ||
    fail "--workdir DIR is missing among the flags of mlembed_jax.train"
  case $workdir in
    *://*) fail "--workdir $workdir: not a path; mount the bucket, as docs/pods.md says (Launchers)" ;;
    /*) ;;
    *) fail "--workdir $workdir: give an absolute path; all machines must see the same folder" ;;
  esac
}
