#!/usr/bin/env bash
# Runs one of this project's commands on every host of a TPU slice (Google Cloud).
#   POD=my-slice ZONE=us-east5-a launch/pod_tpu.sh launch/ppo.py --config=configs/ppo.py:qwen2_5_32b \
#       --config.model.path=/mnt/runs/sft/final --config.run.dir=/mnt/runs/ppo
# Each host needs the checkout at REPO (default ~/retool_jax) with `make setup EXTRA=tpu` done, and model and run directories on storage that all of them see. COMMAND=... replaces the Python call,
# for example COMMAND='make setup EXTRA=tpu' for the first time. Ctrl-C reaches every host; the same line goes on.
set -euo pipefail
: "${POD:?name of the TPU slice}" "${ZONE:?its zone}"
repo="${REPO:-\$HOME/retool_jax}"
[ $# -gt 0 ] || [ -n "${COMMAND:-}" ] || { echo 'pod_tpu.sh: which binary? launch/sft.py --config=...' >&2; exit 2; }
# %q keeps every argument whole through the remote shell.
command="${COMMAND:-env RETOOL_PROCESSES=auto .venv/bin/python $(printf '%q ' "$@")}"
exec gcloud compute tpus tpu-vm ssh "$POD" --zone="$ZONE" ${PROJECT:+--project="$PROJECT"} --worker=all \
    --command="cd $repo && exec $command"
