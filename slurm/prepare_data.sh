#!/usr/bin/env bash
# Convert media files to shards for training (docs/data.md). Each task of the array converts its share:
#
#     sbatch --array=0-15 --cpus-per-task=8 slurm/prepare_data.sh --config configs/data/emoji.yaml
#
# After a failure, submit it again, with any array or none, to complete what is missing.
#SBATCH --job-name=mobius-data
#SBATCH --output=logs/%x-%A-%a.out
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --array=0-3
#SBATCH --ntasks=1

set -euo pipefail
cd "$SLURM_SUBMIT_DIR"
source slurm/site.sh
srun --ntasks=1 --cpus-per-task="$SLURM_CPUS_ON_NODE" "${CONTAINER[@]}" "$PYTHON" tools/prepare_data.py \
    --workers="$SLURM_CPUS_ON_NODE" "$@"
