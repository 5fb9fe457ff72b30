#!/usr/bin/env bash
# On Google Kubernetes Engine with TPUs: as a JobSet, or through xpk.
#
# launch/gke.sh build --image=REGION-docker.pkg.dev/P/R/capvl
# launch/gke.sh run   --name=N --image=I --topology=4x4 --workdir=gs://BUCKET/runs/x [--slices=2] [--restarts=100] \
#                     [--accelerator=tpu-v5-lite-podslice] [--chips=4] -- --config=configs/cappa_l16.py
# launch/gke.sh xpk   --name=N --image=I --cluster=C --project=P --zone=Z --type=v5litepod-16 \
#                     --workdir=gs://BUCKET/runs/x [--slices=2] -- --config=configs/cappa_l16.py
# launch/gke.sh logs | delete --name=N
# launch/gke.sh report --workdir=gs://BUCKET/runs/x
#
# Kubernetes starts a run again, up to --restarts times, unless the recipe is at fault. --chips are those of a host.
# --dry_run prints the commands.

# shellcheck source=launch/lib.sh
source "$(dirname "$0")/lib.sh"
OPT=([name]="" [image]="" [topology]="" [workdir]="" [slices]=1 [restarts]=100 [chips]=4
  [accelerator]=tpu-v5-lite-podslice [hosts]="" [cluster]="" [project]="" [zone]="" [type]="")
options "$@"

count_hosts() { # Of one slice.
  [[ "${OPT[topology]}" =~ ^[0-9]+(x[0-9]+)+$ ]] || fail "--topology=${OPT[topology]} should read 4x4 or 2x2x2"
  local all=$((${OPT[topology]//x/*}))
  [ $((all % OPT[chips])) -eq 0 ] || fail "--topology=${OPT[topology]} doesn't divide into hosts of ${OPT[chips]} chips"
  echo $((all / OPT[chips]))
}

case "$ACTION" in
  build)
    need image
    run docker build -f launch/Dockerfile -t "${OPT[image]}" .
    run docker push "${OPT[image]}"
    ;;
  run)
    need name image topology workdir
    need_training
    OPT[hosts]="$(count_hosts)"
    if [ -n "$DRY_RUN" ]; then
      echo "kubectl apply -f - <<EOF"
      fill "$(dirname "$0")/jobset.yaml"
      echo EOF
    else
      fill "$(dirname "$0")/jobset.yaml" | run kubectl apply -f -
    fi
    ;;
  xpk)
    need name image cluster project zone type workdir
    need_training
    run xpk workload create "--workload=${OPT[name]}" "--cluster=${OPT[cluster]}" "--project=${OPT[project]}" \
      "--zone=${OPT[zone]}" "--tpu-type=${OPT[type]}" "--num-slices=${OPT[slices]}" "--docker-image=${OPT[image]}" \
      "--max-restarts=${OPT[restarts]}" --termination-grace-period-seconds=300 \
      "--command=bash launch/attempt.sh $(quoted "${OPT[workdir]}" "${TRAIN[@]}")"
    ;;
  logs)
    need name
    run kubectl logs -f "-ljobset.sigs.k8s.io/jobset-name=${OPT[name]},batch.kubernetes.io/job-completion-index=0" \
      --all-containers
    ;;
  delete)
    need name
    run kubectl delete jobset "${OPT[name]}"
    ;;
  report)
    need workdir
    run gcloud storage cp "${OPT[workdir]}/report.html" .
    ;;
  *) fail "unknown action $ACTION; $0 --help lists them" ;;
esac
