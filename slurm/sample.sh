#!/usr/bin/env bash
# Sample clips from a run on one GPU. The arguments are those of tools/sample.py:
#
#     sbatch --gpus=1 slurm/sample.sh runs/mobius-4711 --prompt "a rocket" --output samples
#SBATCH --job-name=mobius-sample
#SBATCH --output=logs/%x-%j.out
#SBATCH --ntasks=1

set -euo pipefail
cd "$SLURM_SUBMIT_DIR"
source slurm/site.sh
srun --ntasks=1 "${CONTAINER[@]}" "$PYTHON" tools/sample.py "$@"
