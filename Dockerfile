# The commands of mobius-train on NVIDIA GPUs, as any user:
#   docker build --tag mobius .
#   docker run --rm --gpus all --shm-size 8g --volume "$PWD:/work" --user "$(id -u):$(id -g)" mobius \
#       deepspeed --module mobius_train.main --config my/recipe.yaml
# --shm-size: NCCL and the data workers exchange data in shared memory. docs/install.md has more.

FROM python:3.12-slim AS wheel
WORKDIR /source
COPY setup.py pyproject.toml MANIFEST.in README.md CHANGELOG.md constraints.txt ./
COPY assets assets
COPY configs configs
COPY ds_configs ds_configs
COPY mobius_train mobius_train
COPY slurm slurm
COPY tools tools
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

# The CUDA of the torch that constraints.txt names. DeepSpeed and flash-attn compile kernels with its nvcc, hence devel;
# cuDNN and NCCL come with torch.
FROM nvidia/cuda:13.0.1-devel-ubuntu24.04
# Of Ubuntu, whose own versions fit each other.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends openssh-client pdsh python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/mobius
ENV PATH=/opt/mobius/bin:$PATH
COPY --from=wheel /wheels /wheels
COPY constraints.txt /wheels/
RUN pip install --no-cache-dir --constraint /wheels/constraints.txt "$(ls /wheels/*.whl)[emoji,remote,8bit]"

# docker build --build-arg FLASH_ATTN=1: compiles flash-attn, which takes an hour.
ARG FLASH_ATTN=0
ARG MAX_JOBS=4
RUN if [ "$FLASH_ATTN" = 1 ]; then \
        pip install --no-cache-dir --no-build-isolation --constraint /wheels/constraints.txt \
            setuptools ninja "$(ls /wheels/*.whl)[flash]"; \
    fi

# Not root. Any other user too can write caches of compiled kernels and models, and has a name.
RUN useradd --uid 1001 mobius && mkdir -m 1777 /work /cache
ENV HOME=/cache USER=mobius
USER 1001
WORKDIR /work
CMD ["mobius-train", "--help"]
