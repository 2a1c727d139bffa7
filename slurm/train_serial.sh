#!/usr/bin/env bash
# Train temporal layers between the frozen spatial layers. See train_parallel.sh for usage.
#SBATCH --job-name=mobius-serial
#SBATCH --output=logs/%x-%j.out
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@180

cd "$SLURM_SUBMIT_DIR" && source slurm/train.sh
train mode=serial "$@"
