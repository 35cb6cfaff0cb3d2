#!/usr/bin/env bash
#SBATCH --job-name=retool
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --signal=TERM@300
#SBATCH --requeue
# Runs one of this project's commands on GPU nodes under SLURM, a process for each GPU:
#   sbatch --nodes=8 launch/pod_slurm.sh launch/ppo.py --config=configs/ppo.py:qwen2_5_32b \
#       --config.model.path=/shared/runs/sft/final --config.run.dir=/shared/runs/ppo --config.mesh.tensor=8
# Five minutes before its time is up the job gets SIGTERM, saves the step that is whole, ends, and is queued again; it
# then goes on from there. A step and a checkpoint must fit into them (RETOOL_GRACE_S). The checkout must be on storage that all nodes see, with
# `make setup EXTRA=cuda12` done.
set -euo pipefail
[ $# -gt 0 ] || { echo 'pod_slurm.sh: which binary? launch/sft.py --config=...' >&2; exit 2; }
cd "${SLURM_SUBMIT_DIR:-.}"
status=0
RETOOL_PROCESSES=auto RETOOL_GRACE_S="${RETOOL_GRACE_S:-300}" srun --kill-on-bad-exit=1 .venv/bin/python "$@" || status=$?
if [ "$status" -eq 143 ]; then  # stopped by SIGTERM: not done
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
