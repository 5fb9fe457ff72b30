#!/usr/bin/env bash
# On this machine, on its CPU cores or its GPUs.
#
# launch/laptop.sh install [--extra=cuda]     an environment in .venv
# launch/laptop.sh run -- --config=configs/cappa_demo.py [--workdir=…]
#
# --dry_run prints the commands.

# shellcheck source=launch/lib.sh
source "$(dirname "$0")/lib.sh"
OPT=([extra]="")
options "$@"

case "$ACTION" in
  install)
    run python3 -m venv .venv
    run .venv/bin/pip install -q -e ".${OPT[extra]:+[${OPT[extra]}]}"
    ;;
  run)
    need_training
    run .venv/bin/python -m capvl.main "${TRAIN[@]}"
    ;;
  *) fail "unknown action $ACTION; $0 --help lists them" ;;
esac
