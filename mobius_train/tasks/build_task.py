"""Build a task from a configuration: its parts and its data.

All input errors are detected here, before slow work starts.
"""

from __future__ import annotations

from mobius_train.assembly.fetch import describe_data
from mobius_train.assembly.open_data import open_data
from mobius_train.assembly.parts import autoencoder_of, build_parts, load_parts
from mobius_train.assembly.weights import Pretrained, WeightSource
from mobius_train.config import RunConfig
from mobius_train.dtypes import Dtypes
from mobius_train.files import check_writable
from mobius_train.job.distributed import Distributed
from mobius_train.tasks.autoencoder import AutoencoderTask
from mobius_train.tasks.denoising import DiffusionTask
from mobius_train.tasks.task import Task


def build_task(config: RunConfig, distributed: Distributed, weights: WeightSource | None = None) -> Task:
    """Build the task of `config.stage`, with its models on this rank's device and its data open.

    Args:
        weights: the source of the models; default: the recipe's pretrained models.

    Raises:
        MobiusError: a model or data folder is missing, the latent cache cannot be written, or the parts do not fit each
            other.
    """
    # Check only names and sizes now; read and fetch data after the models are known to fit.
    describe_data(config.data)
    if config.data.cache_dir is not None and not config.data.cache_required:
        check_writable(config.data.cache_dir)
    if config.data.download_dir is not None:
        check_writable(config.data.download_dir)
    distributed.share_clips(config.sequence_parallel_size, config.sequence_overlap)
    weights, device = weights or Pretrained(), distributed.device
    if config.stage == "autoencoder":
        vae = autoencoder_of(config, weights, device)
        train, heldout = open_data(config, distributed)
        return AutoencoderTask(config, vae, train, heldout, distributed, Dtypes.of(config).trained)
    loaded = load_parts(config, weights, device)
    train, heldout = open_data(config, distributed)
    parts = build_parts(config, loaded, weights, device)
    if distributed.sequence is not None:
        parts.denoiser.set_sequence(distributed.sequence)
    if distributed.is_main:
        print(*parts.attention, sep="\n", flush=True)
    return DiffusionTask(parts, train, heldout, distributed)
