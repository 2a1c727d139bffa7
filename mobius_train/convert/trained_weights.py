"""From a recipe and the weights that its training saved to the pipeline that its final/ would hold."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mobius_train.assembly.parts import parts_of
from mobius_train.assembly.weights import Pretrained
from mobius_train.config import RunConfig
from mobius_train.convert.pickles import UNREADABLE, unreadable
from mobius_train.convert.weights import Weights
from mobius_train.errors import MobiusError
from mobius_train.models import Denoiser, weights_hash
from mobius_train.pipeline import TextToVideoPipeline


class FromCheckpoint(Pretrained):
    """The models that a recipe names, with trained weights from elsewhere.

    Args:
        trained: every trained parameter by its name in the module that the engine wrapped (a ring's, say), once, and
            nothing else.
        frozen_sha256: of the frozen weights that the trained ones belong to; None: not known.
    """

    def __init__(self, trained: Weights, frozen_sha256: str | None = None) -> None:
        self._trained, self._frozen_sha256 = trained, frozen_sha256

    def fill(self, denoiser: Denoiser) -> None:
        """
        Raises:
            MobiusError: a weight is missing, left over, or of another shape, or the frozen weights are others.
        """
        if denoiser.frozen is not None and self._frozen_sha256 is not None:
            found = weights_hash(denoiser.frozen)
            if found != self._frozen_sha256:
                raise MobiusError(
                    f"the frozen weights of the recipe's pretrained_model_name_or_path have the hash {found[:12]}…, and"
                    f" the trained weights belong to {self._frozen_sha256[:12]}…: put those back, or give the"
                    " config.yaml of the run with another pretrained_model_name_or_path"
                )
        _assign(denoiser.trained, self._trained)


def pipeline_of(config: RunConfig, weights: Weights, frozen_sha256: str | None = None) -> TextToVideoPipeline:
    """The pipeline of a run, with its trained weights from elsewhere; its final/ would hold the same.

    Args:
        config: the run's config.yaml; its pretrained models must still be where it says.
        weights, frozen_sha256: see FromCheckpoint.

    Raises:
        MobiusError: a model does not load, or the weights do not fit.
    """
    if config.stage == "autoencoder":
        raise MobiusError("stage 'autoencoder' makes no pipeline: its final/ is an AutoencoderKL of diffusers")
    # Options of the run's GPUs: none of them changes a weight.
    config = config.model_copy(update={"activation_offload": 0.0, "compile": False, "attention_backend": "sdpa"})
    parts = parts_of(config, FromCheckpoint(weights, frozen_sha256), torch.device("cpu"))
    trained = parts.denoiser.trained.to(parts.dtypes.trained)
    return parts.pipeline(parts.denoiser.with_trained(trained).eval())


def open_safetensors(path: Path) -> Weights:
    """The tensors of a .safetensors file, or of the files that NAME.safetensors.index.json lists.

    Raises:
        MobiusError: a file is missing or damaged.
    """
    files = [path]
    if path.name.endswith(".index.json"):
        files = sorted(path.parent.glob(path.name.removesuffix(".safetensors.index.json") + "-*-of-*.safetensors"))
    layout: dict[str, Tensor] = {}
    for file in files:
        try:
            with safe_open(file, "pt") as opened:
                for name in opened.keys():  # noqa: SIM118
                    layout[name] = opened.get_tensor(name).to("meta")
        except (*UNREADABLE, SafetensorError) as error:
            raise unreadable(file, error) from error

    def read() -> Iterator[tuple[str, Tensor]]:
        for file in files:
            with safe_open(file, "pt") as opened:
                for name in opened.keys():  # noqa: SIM118
                    yield name, opened.get_tensor(name)

    return Weights(layout, read)


@torch.no_grad()
def _assign(module: torch.nn.Module, weights: Weights) -> None:
    trained = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    buffers = dict(module.named_buffers())
    problems = [f"{name} is missing" for name in trained if name not in weights.layout]
    for name, meta in weights.layout.items():
        mine = trained.get(name, buffers.get(name))
        if mine is None:
            problems.append(f"{name} is no trained weight of the {type(module).__name__}")
        elif mine.shape != meta.shape:
            problems.append(f"{name} is {tuple(meta.shape)}, the {type(module).__name__}'s {tuple(mine.shape)}")
    if problems:
        raise MobiusError(
            f"these weights are not those of the recipe: {len(problems)} do not fit, " + "; ".join(problems[:5])
        )
    for name, tensor in weights.read():
        (trained | buffers)[name].copy_(tensor)
