#!/bin/bash
# A run over several hosts that a scheduler may stop, and start again: sbatch recipes/slurm.sh
#SBATCH --job-name=neox
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

# All hosts see the run directory. resume=auto: the job begins the run, and goes on with it each time it is requeued.
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
export OMP_NUM_THREADS=$((SLURM_CPUS_PER_TASK / SLURM_GPUS_ON_NODE))
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=110  # seconds: more than train.grace

srun --kill-on-bad-exit=1 torchrun \
    --nnodes="$SLURM_JOB_NUM_NODES" --nproc-per-node="$SLURM_GPUS_ON_NODE" --max-restarts=3 \
    --rdzv-backend=c10d --rdzv-id="$SLURM_JOB_ID" --rdzv-endpoint="${hosts%%$'\n'*}:29500" \
    -m neox train neox-20b data.train=data/pile out=runs/20b resume=auto train.grace=100 \
    parallel.pp=4 parallel.tp=2 "$@"
