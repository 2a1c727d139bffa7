"""Building of a run's final pipeline from its recipe and saved weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mobius_train.assembly.options import without_gpu_options
from mobius_train.assembly.parts import parts_of
from mobius_train.assembly.weights import Pretrained
from mobius_train.config import RunConfig
from mobius_train.convert.lazy_weights import Weights
from mobius_train.errors import MobiusError
from mobius_train.models import Denoiser, weights_hash
from mobius_train.pipeline import TextToVideoPipeline
from mobius_train.pretrained.model_files import indexed_files
from mobius_train.pretrained.pickles import UNREADABLE, unreadable_file


class FromCheckpoint(Pretrained):
    """The pretrained models of a recipe, with trained weights from a checkpoint.

    Args:
        trained: exactly the trained parameters, by their names in the module that the engine wrapped (such as a ring).
        frozen_sha256: hash of the frozen weights that were used in training; None: unknown.
    """

    def __init__(self, trained: Weights, frozen_sha256: str | None = None) -> None:
        self._trained, self._frozen_sha256 = trained, frozen_sha256

    def fill(self, denoiser: Denoiser) -> None:
        """
        Raises:
            MobiusError: a weight is missing, unexpected or has another shape, or the frozen weights differ.
        """
        if denoiser.frozen is not None and self._frozen_sha256 is not None:
            frozen_sha256 = weights_hash(denoiser.frozen)
            if frozen_sha256 != self._frozen_sha256:
                raise MobiusError(
                    f"the frozen weights in the recipe's pretrained_model_name_or_path have hash {frozen_sha256[:12]}…,"
                    f" but the training used {self._frozen_sha256[:12]}…: restore these weights, or set"
                    " pretrained_model_name_or_path in a copy of the run's config.yaml to their location"
                )
        assign_weights(denoiser.trained, self._trained)


def pipeline_of(config: RunConfig, weights: Weights, frozen_sha256: str | None = None) -> TextToVideoPipeline:
    """Build the pipeline of a run with the given trained weights, as in its final/.

    Args:
        config: the run's config.yaml; its pretrained models must still exist.
        weights, frozen_sha256: see FromCheckpoint.

    Raises:
        MobiusError: a model cannot be loaded, or the weights do not match.
    """
    if config.stage == "autoencoder":
        raise MobiusError("stage 'autoencoder' has no pipeline: its final/ is a diffusers AutoencoderKL")
    config = without_gpu_options(config)
    parts = parts_of(config, FromCheckpoint(weights, frozen_sha256), torch.device("cpu"))
    trained = parts.denoiser.trained.to(parts.dtypes.trained)
    return parts.pipeline(parts.denoiser.with_trained(trained).eval())


def open_safetensors(path: Path) -> Weights:
    """Open the tensors of a .safetensors file, or of the files listed in NAME.safetensors.index.json.

    Raises:
        MobiusError: a file is missing or damaged.
    """
    files = [path]
    if path.name.endswith(".index.json"):
        files = indexed_files(path)
    layout: dict[str, Tensor] = {}
    for file in files:
        try:
            with safe_open(file, "pt") as opened:
                for name in opened.keys():  # noqa: SIM118
                    layout[name] = opened.get_tensor(name).to("meta")
        except (*UNREADABLE, SafetensorError) as error:
            raise unreadable_file(file, error) from error

    def read() -> Iterator[tuple[str, Tensor]]:
        for file in files:
            with safe_open(file, "pt") as opened:
                for name in opened.keys():  # noqa: SIM118
                    yield name, opened.get_tensor(name)

    return Weights(layout, read)


@torch.no_grad()
def assign_weights(module: torch.nn.Module, weights: Weights) -> None:
    """Copy weights into exactly the trained parameters of a module, and into buffers that they name.

    Raises:
        MobiusError: a weight is missing, unexpected or has another shape.
    """
    trained = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    buffers = dict(module.named_buffers())
    problems = [f"{name} is missing" for name in trained if name not in weights.layout]
    for name, meta in weights.layout.items():
        target = trained.get(name, buffers.get(name))
        if target is None:
            problems.append(f"{name} is not a trained weight of the {type(module).__name__}")
        elif target.shape != meta.shape:
            problems.append(f"{name} is {tuple(meta.shape)}, the {type(module).__name__}'s is {tuple(target.shape)}")
    if problems:
        raise MobiusError(f"the weights do not match the recipe: {len(problems)} differ, " + "; ".join(problems[:5]))
    for name, tensor in weights.read():
        (trained | buffers)[name].copy_(tensor)
