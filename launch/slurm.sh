#!/usr/bin/env bash
# Under SLURM, a process for each GPU.
#
# launch/slurm.sh run  --workdir=/shared/runs/x [--nodes=2] [--gpus=8] [--cpus=8] [--time=24:00:00] [--partition=P] \
#                      [--name=capvl] -- --config=configs/cappa_l16.py
# launch/slurm.sh logs | stop --name=N
#
# Five minutes before its time is over, and when it is preempted, the job saves and is queued again, until the run
# has its report; stop ends it for good (SLURM sends SIGTERM first, so it saves). --cpus are those of a process. Run it in the environment that has capvl. --dry_run prints the commands.

# shellcheck source=launch/lib.sh
source "$(dirname "$0")/lib.sh"
OPT=([workdir]="" [nodes]=1 [gpus]=8 [cpus]=8 [time]=24:00:00 [partition]="" [name]=capvl)
options "$@"

case "$ACTION" in
  run)
    need workdir
    need_training
    partition=()
    [ -z "${OPT[partition]}" ] || partition=("--partition=${OPT[partition]}")
    run sbatch "--job-name=${OPT[name]}" "--nodes=${OPT[nodes]}" "--gpus-per-node=${OPT[gpus]}" \
      "--ntasks-per-node=${OPT[gpus]}" "--cpus-per-task=${OPT[cpus]}" "--time=${OPT[time]}" "${partition[@]}" \
      --requeue --signal=TERM@300 --open-mode=append "--output=${OPT[name]}.log" \
      launch/slurm.sbatch "${OPT[workdir]}" "${TRAIN[@]}"
    ;;
  logs) run tail -n 100 -F "${OPT[name]}.log" ;;
  stop) run scancel "--name=${OPT[name]}" ;;
  *) fail "unknown action $ACTION; $0 --help lists them" ;;
esac
