#!/usr/bin/env bash
#SBATCH --job-name=retool
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
# Runs one of this project's commands on GPU nodes under SLURM, one process a node with all its GPUs and one sandbox:
#   sbatch --nodes=8 launch/pod_slurm.sh launch/ppo.py --config=configs/ppo.py:qwen2_5_32b \
#       --config.model.path=/shared/runs/sft/final --config.run.dir=/shared/runs/ppo --config.mesh.tensor=8
# Flags of sbatch before the script go before those above (--gpus-per-node=4, --time=12:00:00, --partition=…).
# Five minutes before its time is up the job gets SIGTERM, saves the step that is whole, ends, and is queued again; it
# then goes on from there. A step and a checkpoint must fit into them (RETOOL_GRACE_S). A job of which a process was killed
# is queued again too; RETOOL_RESTARTS (50) is how often in all. The checkout must be on storage that all nodes see, with
# `make setup EXTRA=cuda12` done there. What each process writes is in logs/retool-JOB/PROCESS.log (docs/pods.md).
set -euo pipefail
say() { echo "pod_slurm.sh: $*" >&2; }
[ $# -gt 0 ] || { say 'which binary? launch/sft.py --config=...'; exit 2; }
[ -n "${SLURM_JOB_ID:-}" ] || { say 'there is no job: give it to sbatch --nodes=1'; exit 2; }
cd "$SLURM_SUBMIT_DIR"
[ -x .venv/bin/python ] || { say "no .venv in $PWD: submit from the checkout, after make setup EXTRA=cuda12"; exit 2; }
export RETOOL_PROCESSES=auto RETOOL_GRACE_S="${RETOOL_GRACE_S:-300}"
# Without it each of the job's lives compiles everything anew.
export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$PWD/.jax_cache}"
# JAX takes one GPU for each process under SLURM, the one of its number on the node, unless it is told otherwise.
if [ "${SLURM_NTASKS_PER_NODE:-1}" = 1 ] && [ "${SLURM_GPUS_ON_NODE:-0}" -gt 0 ]; then
    JAX_LOCAL_DEVICE_IDS="$(seq -s, 0 "$((SLURM_GPUS_ON_NODE - 1))")"
    export JAX_LOCAL_DEVICE_IDS
fi
logs="logs/$SLURM_JOB_NAME-$SLURM_JOB_ID"
mkdir -p "$logs"
say "$(date -u +%FT%TZ) $SLURM_JOB_NODELIST: $PWD/$logs"
restarts="${RETOOL_RESTARTS:-50}" before="${SLURM_RESTART_COUNT:-0}" status=0
srun --kill-on-bad-exit=1 --cpu-bind=none --label --open-mode=append --output="$logs/%t.log" \
    .venv/bin/python "$@" || status=$?
case "$status" in
    0) ;;
    # Stopped by SIGTERM; or a process died: 137 of its own, 75 of the others, 134 where JAX was the first to see it.
    143|75|134|137)
        if [ "$before" -lt "$restarts" ]; then
            say "exit status $status: queued again (restart $((before + 1)) of $restarts)"
            scontrol requeue "$SLURM_JOB_ID"
        else
            say "exit status $status, and RETOOL_RESTARTS=$restarts are used up: not queued again"
        fi ;;
    *) say "exit status $status: not queued again" ;;
esac
exit "$status"
