#!/usr/bin/env bash
# Train a recipe or stages in their own mode (default: parallel, the ring next to the frozen backbone), on any number of
# nodes:
#
#     sbatch [sbatch's flags] slurm/train_parallel.sh [--config recipe.yaml | --stages stages.yaml] \
#         [--deepspeed ds.json] [key=value …]
#     sbatch --nodes=4 --gpus-per-node=8 --cpus-per-task=6 --ntasks-per-node=8 --partition=gpu --time=12:00:00 \
#         slurm/train_parallel.sh --config configs/sd21.yaml data.train=/data/clips
#
# Submit it from the repository's root. Settings for all jobs on a cluster belong in slurm/site.sh.
#SBATCH --job-name=mobius
#SBATCH --output=logs/%x-%j.out
#SBATCH --open-mode=append
#SBATCH --requeue
# Seconds before the time limit at which the run saves and the job requeues itself. Allow for one step and one save.
#SBATCH --signal=B:USR1@180

cd "$SLURM_SUBMIT_DIR" && source slurm/train.sh
train "$@"
