#!/usr/bin/env bash
# One attempt at a training where a scheduler starts it again: in a container, or in a SLURM step.
#
# attempt.sh WORKDIR --config=…   ends with 0 only when the run is at its end, with 75 when it was
# stopped by a signal and has saved, with 2 when the recipe is at fault, else as the training did

set -uo pipefail
workdir="$1"
shift
child="" signalled=""
trap 'signalled=1; [ -z "$child" ] || kill -TERM "$child"' TERM INT
python -m capvl.main "$@" "--workdir=$workdir" &
child=$!
[ -z "$signalled" ] || kill -TERM "$child"
signalled=1
while [ -n "$signalled" ]; do # A trapped signal ends `wait`, not the training.
  signalled=""
  wait "$child"
  code=$?
done
[ "$code" -eq 0 ] || exit "$code"
python -c 'import sys; from etils import epath; sys.exit(0 if epath.Path(sys.argv[1], "report.html").exists() else 75)' "$workdir"
