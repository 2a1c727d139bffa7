# shellcheck shell=bash
# What is the same for every job on a cluster; the one file to edit. The environment of sbatch goes before it.
# Partition, account and the like are sbatch's own variables, exported before submitting:
#     export SBATCH_PARTITION=gpu SBATCH_ACCOUNT=my-project SBATCH_TIMELIMIT=24:00:00

# Modules, if the site has them:
# module load cuda/12.6

# The Python that the package is installed in: that of `make setup`, else the first on the path.
: "${PYTHON:=$([[ -x .venv/bin/python ]] && echo .venv/bin/python || echo python3)}"

# In front of Python, if it lives in a container:
# CONTAINER=(apptainer exec --nv --bind /data mobius.sif)
# shellcheck disable=SC2034  # of those who source this
CONTAINER=()

# Nothing of a run looks at a model hub unless the recipe names a model there.
export HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}"

# NCCL, which carries all traffic between GPUs. It finds out by itself what a node has; its warnings say if it could not.
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"
# The network card of the first contact, where it takes the wrong one (docker0, or an administration network):
# export NCCL_SOCKET_IFNAME=ib0
# The InfiniBand cards for the data, where some belong to storage:
# export NCCL_IB_HCA=mlx5_0,mlx5_1
# Without InfiniBand, or to see whether it is the fault: traffic goes over the socket, some ten times slower.
# export NCCL_IB_DISABLE=1
