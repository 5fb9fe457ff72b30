# shellcheck shell=bash
# Sourced by the launch scripts: options, dry runs, errors in one sentence.
set -euo pipefail

ACTION=""     # The first argument.
TRAIN=()      # What follows `--`: arguments of capvl.main.
DRY_RUN=""    # Not empty: commands are printed and nothing is done.
declare -A OPT # Options; a script sets their defaults before it calls `options`.

fail() {
  echo "error: $*" >&2
  exit 2
}

usage() { # The script's first comment.
  sed -n '2,/^$/{s/^# \{0,1\}//;p}' "$0"
}

options() {
  ACTION="${1:-}"
  case "$ACTION" in
    "" | -h | --help)
      usage
      exit 0
      ;;
    --*) fail "the first argument is an action, not $ACTION; $0 --help lists them" ;;
  esac
  shift
  while [ $# -gt 0 ]; do
    case "$1" in
      --)
        shift
        TRAIN=("$@")
        return
        ;;
      --dry_run) DRY_RUN=1 ;;
      --*=*)
        local name="${1%%=*}"
        name="${name#--}"
        [ -n "${OPT[$name]+known}" ] || fail "unknown option --$name; known: $(printf -- '--%s\n' "${!OPT[@]}" | sort | tr '\n' ' ')"
        OPT[$name]="${1#*=}"
        ;;
      *) fail "$1 should read --name=value; arguments of the training follow --" ;;
    esac
    shift
  done
}

need() { # Options that must have a value.
  local name
  for name in "$@"; do
    [ -n "${OPT[$name]}" ] || fail "$ACTION needs --$name=…"
  done
}

need_training() {
  local argument
  for argument in "${TRAIN[@]}"; do
    case "$argument" in --config=*) return ;; esac
  done
  fail "$ACTION needs the recipe: … -- --config=configs/cappa_l16.py"
}

quoted() { # Arguments as a shell would read them.
  local argument out=""
  for argument in "$@"; do
    if [[ "$argument" =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]]; then
      out+=" $argument"
    else
      out+=" '${argument//\'/\'\\\'\'}'"
    fi
  done
  echo "${out# }"
}

explain() { # What a cloud's error means; $1 is a file with what it printed.
  if grep -qiE 'quota' "$1"; then
    echo "The project has no quota for that; see docs/launch.md, 'Quota'." >&2
  elif grep -qiE 'PERMISSION_DENIED|does not have permission|403|forbidden' "$1"; then
    echo "The account lacks a permission; see docs/launch.md, 'Permissions'." >&2
  elif grep -qiE 'no more capacity|stockout|RESOURCE_EXHAUSTED|ZONE_RESOURCE_POOL_EXHAUSTED' "$1"; then
    echo "The zone has no such chips free now; launch/tpu_queued.sh waits for them." >&2
  elif grep -qiE 'API has not been used|SERVICE_DISABLED' "$1"; then
    echo "An API is off; see docs/launch.md, 'Permissions'." >&2
  fi
}

run() { # Runs a command, or prints it.
  if [ -n "$DRY_RUN" ]; then
    quoted "$@"
    return
  fi
  command -v "$1" > /dev/null || fail "$1 is not installed; see docs/launch.md"
  local errors code=0
  errors="$(mktemp)"
  { "$@" 2>&1 >&3 3>&- | tee "$errors" >&2; } 3>&1 || code=$?
  if [ "$code" -ne 0 ]; then
    explain "$errors"
  fi
  rm -f "$errors"
  return "$code"
}

fill() { # The file $1 with every {option} replaced by its value, and {arguments} by those of the training.
  local text name
  text="$(cat "$1")"
  for name in "${!OPT[@]}"; do
    text="${text//\{$name\}/${OPT[$name]}}"
  done
  local arguments=""
  for name in "${TRAIN[@]}"; do
    arguments+=", \"${name//\"/\\\"}\""
  done
  echo "${text//\{arguments\}/${arguments#, }}"
}

pack() { # The committed code as $1; nothing that isn't committed runs elsewhere.
  run git -C "$(dirname "$0")/.." archive --format=tar.gz --output="$1" HEAD
}

train_command() { # What each host runs, detached: its output in capvl.log, its exit code in capvl.exit.
  local data=""
  [ -z "${OPT[data]}" ] || data="TFDS_DATA_DIR=\$HOME/data "
  local command
  command="$(quoted .venv/bin/python -m capvl.main "${TRAIN[@]}" "--workdir=${OPT[workdir]}")"
  echo "cd capvl && rm -f ../capvl.exit && ${data}nohup sh -c $(quoted "$command; echo \$? > ../capvl.exit") > ../capvl.log 2>&1 < /dev/null &"
}

# The training of this host; `sh -c` around it does not match, nor does the shell that looks for it.
# shellcheck disable=SC2034 # The scripts that source this use it.
TRAINING="'^[^ ]*python -m [c]apvl.main'"

setup_command() { # What each host does once.
  echo "mkdir -p capvl && tar -xzf capvl.tar.gz -C capvl && bash capvl/launch/host.sh tpu${OPT[data]:+ ${OPT[data]}}"
}

system_image() { # The system image that a type of TPU wants.
  case "${OPT[type]}" in
    v6e-*) echo v2-alpha-tpuv6e ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v4-*) echo tpu-ubuntu2204-base ;;
    *) fail "--type=${OPT[type]} is no type of TPU, such as v5litepod-16, v5p-128, v6e-256 or v4-32" ;;
  esac
}
