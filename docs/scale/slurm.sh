#!/bin/bash
# Run a command of llama on all nodes of a Slurm job, with one rank for each GPU:
#     sbatch docs/scale/slurm.sh batch prompts.jsonl results.jsonl --ckpt_dir Llama-3.3-70B-Instruct
#SBATCH --job-name=llama
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

# One torchrun on each node. If it fails on one node, srun ends it on the others.
srun --kill-on-bad-exit=1 torchrun --nnodes "$SLURM_JOB_NUM_NODES" \
    --nproc_per_node "$SLURM_GPUS_ON_NODE" --rdzv_id "$SLURM_JOB_ID" --rdzv_backend c10d \
    --rdzv_endpoint "$first:29400" -m llama "$@"
