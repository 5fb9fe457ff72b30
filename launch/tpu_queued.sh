#!/usr/bin/env bash
# On TPUs from the queue: spot or reserved, one slice or several, with a babysitter that makes them anew.
#
# launch/tpu_queued.sh run    --project=P --zone=Z --name=N --type=v5litepod-256 --workdir=gs://BUCKET/runs/x \
#                             [--slices=4] [--kind=spot|guaranteed|reserved] [--data=gs://BUCKET/tfds] \
#                             -- --config=configs/cappa_l16.py [--config.mesh.replica=4]
# launch/tpu_queued.sh logs | stop | delete --project=P --zone=Z --name=N
# launch/tpu_queued.sh report --workdir=gs://BUCKET/runs/x
#
# run asks for the TPUs, waits, installs, trains, and does all of it again when they are taken away or the
# training ends by a fault, until the run has its report. It ends with 2 when the recipe is at fault. It may be
# interrupted and started again at any time. --dry_run prints the commands of one round.

# shellcheck source=launch/lib.sh
source "$(dirname "$0")/lib.sh"
OPT=([project]="" [zone]="" [name]="" [type]="" [version]="" [workdir]="" [data]="" [slices]=1 [kind]=spot [pause]=60)
options "$@"

queue() {
  local verb="$1"
  shift
  run gcloud compute tpus queued-resources "$verb" "$@" "--project=${OPT[project]}" "--zone=${OPT[zone]}"
}

on() { # Runs a command on workers $2 of slices $1.
  queue ssh "${OPT[name]}" "--node=$1" "--worker=$2" "--command=$3"
}

state() { # ACTIVE, WAITING_FOR_RESOURCES, SUSPENDED …; ABSENT; UNKNOWN where the cloud can't be asked.
  local said
  if said="$(gcloud compute tpus queued-resources describe "${OPT[name]}" "--project=${OPT[project]}" \
    "--zone=${OPT[zone]}" "--format=value(state.state)" 2>&1)"; then
    tail -n 1 <<< "$said"
  elif grep -qiE 'NOT_FOUND|not found' <<< "$said"; then
    echo ABSENT
  else
    echo "$said" >&2
    echo UNKNOWN
  fi
}

create() {
  local nodes=("--node-id=${OPT[name]}")
  [ "${OPT[slices]}" = 1 ] || nodes=("--node-count=${OPT[slices]}" "--node-prefix=${OPT[name]}")
  queue create "${OPT[name]}" "${nodes[@]}" "--accelerator-type=${OPT[type]}" "--runtime-version=$image" "--${OPT[kind]}"
}

install() {
  pack /tmp/capvl.tar.gz
  queue scp /tmp/capvl.tar.gz "${OPT[name]}:capvl.tar.gz" --node=all --worker=all
  on all all "$(setup_command)"
}

finished() { # The report is written when, and only when, a run is at its end.
  gcloud storage ls "${OPT[workdir]}/report.html" > /dev/null 2>&1
}

ended() { # The exit code of the first host's training, "none" where none was started, nothing while it runs.
  gcloud compute tpus queued-resources ssh "${OPT[name]}" --node=0 --worker=0 "--project=${OPT[project]}" \
    "--zone=${OPT[zone]}" \
    --command="cat capvl.exit 2> /dev/null || { pgrep -f $TRAINING > /dev/null || echo none; }" 2> /dev/null || true
}

tend() { # One look at an ACTIVE request.
  local code
  code="$(ended | tail -n 1)"
  case "$code" in
    "") return ;;
    none) install || return 0 ;;
    2)
      on 0 0 "tail -n 3 capvl.log"
      fail "the training ended with an error of the recipe, above; mend it and run again"
      ;;
    *) echo "The training ended with $code; it is started again." ;;
  esac
  on all all "$(train_command)" || true
}

babysit() {
  local now failures=0
  until finished; do
    now="$(state)"
    failures=$([ "$now" = UNKNOWN ] && echo $((failures + 1)) || echo 0)
    [ "$failures" -lt 10 ] || fail "gcloud failed $failures times in a row, with the error above"
    case "$now" in
      ABSENT) create ;;
      ACTIVE) tend ;;
      SUSPENDED | SUSPENDING | FAILED)
        echo "The TPUs are gone ($now); they are asked for again."
        queue delete "${OPT[name]}" --force --quiet || true
        ;;
    esac
    echo "$(date +%H:%M) $now"
    sleep "${OPT[pause]}"
  done
  echo "The run is at its end: ${OPT[workdir]}/report.html"
}

case "$ACTION" in
  report) need workdir ;;
  *) need project zone name ;;
esac
case "$ACTION" in
  run)
    need type workdir
    need_training
    case "${OPT[kind]}" in spot | guaranteed | reserved) ;; *) fail "--kind=${OPT[kind]} should be spot, guaranteed or reserved" ;; esac
    image="${OPT[version]:-$(system_image)}"
    if [ -n "$DRY_RUN" ]; then
      create
      install
      on all all "$(train_command)"
      queue delete "${OPT[name]}" --force --quiet
    else
      command -v gcloud > /dev/null || fail "gcloud is not installed; see docs/launch.md"
      babysit
    fi
    ;;
  logs) on 0 0 "tail -n 100 -F capvl.log" ;;
  stop) on 0 0 "pkill -TERM -f $TRAINING" ;;
  report) run gcloud storage cp "${OPT[workdir]}/report.html" . ;;
  delete) queue delete "${OPT[name]}" --force --quiet ;;
  *) fail "unknown action $ACTION; $0 --help lists them" ;;
esac
