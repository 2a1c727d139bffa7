# shellcheck shell=bash
# Site settings that all jobs share; the only file to edit. Variables set in sbatch's environment take precedence.
# Partition, account and similar options are sbatch's own variables, exported before submitting:
#     export SBATCH_PARTITION=gpu SBATCH_ACCOUNT=my-project SBATCH_TIMELIMIT=24:00:00

# Environment modules, if the site uses them:
# module load cuda/12.6

# The Python with the package: the one of `make setup`, else the first python3 on the path.
: "${PYTHON:=$([[ -x .venv/bin/python ]] && echo .venv/bin/python || echo python3)}"

# Command prefix for Python in a container:
# CONTAINER=(apptainer exec --nv --bind /data mobius.sif)
# shellcheck disable=SC2034  # used by the scripts that source this file
CONTAINER=()

# Compute nodes often have no network, so runs use only local files and the Hugging Face cache. Fill the cache on a node
# with a network: `hf download NAME`. HF_HUB_OFFLINE=0 or empty, here or in sbatch's environment, allows downloads.
export HF_HUB_OFFLINE="${HF_HUB_OFFLINE-1}"

# NCCL carries all traffic between GPUs and detects the network by itself. Its warnings report failures.
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"
# Network interface for setup, if NCCL chooses the wrong one (docker0, or an administration network):
# export NCCL_SOCKET_IFNAME=ib0
# InfiniBand adapters for data, if some are reserved for storage:
# export NCCL_IB_HCA=mlx5_0,mlx5_1
# Disable InfiniBand, if there is none or for debugging. Traffic then uses sockets, about ten times slower.
# export NCCL_IB_DISABLE=1
