#!/usr/bin/env bash
# Train the usual way, temporal layers between the frozen spatial ones; as train_parallel.sh in everything else.
#SBATCH --job-name=mobius-serial
#SBATCH --output=logs/%x-%j.out
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@180

cd "$SLURM_SUBMIT_DIR" && source slurm/train.sh
train mode=serial "$@"
