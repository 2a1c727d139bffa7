#!/usr/bin/env bash
# Encode a recipe's clips into its data.cache_dir before training. Each task of the array encodes its share:
#
#     sbatch --array=0-15 --gpus=1 slurm/cache_latents.sh --config configs/sd21.yaml data.train=/data/clips
#
# After a failure, submit it again, with any array or none, to complete what is missing.
#SBATCH --job-name=mobius-latents
#SBATCH --output=logs/%x-%A-%a.out
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --array=0-3
#SBATCH --ntasks=1

set -euo pipefail
cd "$SLURM_SUBMIT_DIR"
source slurm/site.sh
srun --ntasks=1 --cpus-per-task="$SLURM_CPUS_ON_NODE" "${CONTAINER[@]}" "$PYTHON" tools/cache_latents.py "$@"
