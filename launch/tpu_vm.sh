#!/usr/bin/env bash
# On a TPU VM, of one or many hosts: create, install, run, logs, status, stop, report, delete.
#
# launch/tpu_vm.sh create  --project=P --zone=Z --name=N --type=v5litepod-16
# launch/tpu_vm.sh install --project=P --zone=Z --name=N [--data=gs://BUCKET/tfds]
# launch/tpu_vm.sh run     --project=P --zone=Z --name=N --workdir=gs://BUCKET/runs/x -- --config=configs/cappa_l16.py
# launch/tpu_vm.sh logs | status | stop | delete --project=P --zone=Z --name=N
# launch/tpu_vm.sh report  --workdir=gs://BUCKET/runs/x
#
# stop sends SIGTERM: all hosts save the same step; run with the same workdir resumes.
# --dry_run prints the commands.

# shellcheck source=launch/lib.sh
source "$(dirname "$0")/lib.sh"
OPT=([project]="" [zone]="" [name]="" [type]="" [version]="" [workdir]="" [data]="")
options "$@"

tpu() {
  local verb="$1"
  shift
  run gcloud compute tpus tpu-vm "$verb" "$@" "--project=${OPT[project]}" "--zone=${OPT[zone]}"
}

on() { # Runs a command on workers.
  tpu ssh "${OPT[name]}" "--worker=$1" "--command=$2"
}

case "$ACTION" in
  report) need workdir ;;
  *) need project zone name ;;
esac
case "$ACTION" in
  create)
    need type
    image="${OPT[version]:-$(system_image)}"
    tpu create "${OPT[name]}" "--accelerator-type=${OPT[type]}" "--version=$image"
    ;;
  install)
    pack /tmp/capvl.tar.gz
    tpu scp /tmp/capvl.tar.gz "${OPT[name]}:capvl.tar.gz" --worker=all
    on all "$(setup_command)"
    ;;
  run)
    need workdir
    need_training
    on all "$(train_command)"
    ;;
  logs) on 0 "tail -n 100 -F capvl.log" ;;
  status) on all "cat capvl.exit 2> /dev/null || { pgrep -f $TRAINING > /dev/null && echo running || echo none; }" ;;
  stop) on 0 "pkill -TERM -f $TRAINING" ;;
  report) run gcloud storage cp "${OPT[workdir]}/report.html" . ;;
  delete) tpu delete "${OPT[name]}" --quiet ;;
  *) fail "unknown action $ACTION; $0 --help lists them" ;;
esac
