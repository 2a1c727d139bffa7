#!/usr/bin/env bash
# Encode a recipe's clips into its data.cache_dir before training, each task of the array a part of them:
#
#     sbatch --array=0-15 --gpus=1 slurm/prepare_data.sh --config configs/sd21.yaml data.train=/data/clips
#
# A task that failed is submitted again alone (--array=7): it does what is missing, whichever parts that were.
#SBATCH --job-name=mobius-data
#SBATCH --output=logs/%x-%A-%a.out
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --array=0-3
#SBATCH --ntasks=1

set -euo pipefail
cd "$SLURM_SUBMIT_DIR"
source slurm/site.sh
part=$((SLURM_ARRAY_TASK_ID - SLURM_ARRAY_TASK_MIN))
srun --ntasks=1 "${CONTAINER[@]}" "$PYTHON" tools/encode_data.py \
    --part="$part" --parts="$SLURM_ARRAY_TASK_COUNT" "$@"
