"""From a recipe and the weights that its training saved to the pipeline that its final/ would hold."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mobius_train.assembly.build import DTYPES
from mobius_train.assembly.load import load_part, load_unet
from mobius_train.config import RunConfig
from mobius_train.convert.pickles import UNREADABLE, unreadable
from mobius_train.convert.weights import Weights
from mobius_train.diffusion.objective import training_scheduler
from mobius_train.encoders.text_encoder import load_text_encoder
from mobius_train.errors import MobiusError
from mobius_train.models import build_denoiser, weights_hash
from mobius_train.pipeline import TextToVideoPipeline


def pipeline_of(config: RunConfig, weights: Weights, frozen_sha256: str | None = None) -> TextToVideoPipeline:
    """The pipeline of a run, with its trained weights from elsewhere.

    Args:
        config: the run's config.yaml; its pretrained models must still be where it says.
        weights: every trained parameter by its name in the module that the engine wrapped (a ring's, say), once,
            and nothing else.
        frozen_sha256: of the frozen weights beside which they were trained; none: not known.

    Raises:
        MobiusError: a model does not load, a weight is missing, left over, or of another shape, or the frozen weights
            are others.
    """
    if config.stage == "autoencoder":
        raise MobiusError("stage 'autoencoder' makes no pipeline: its final/ is an AutoencoderKL of diffusers")
    source = config.pretrained_model_name_or_path
    unet = load_unet(config.unet_config, source)
    scheduler = load_part(DDPMScheduler, "scheduler", config.scheduler_config, source)
    vae = load_part(AutoencoderKL, "vae", None, config.vae_name_or_path or source)
    text_source = config.text_encoder_name_or_path or source
    if text_source is None:
        raise MobiusError("no text encoder: set text_encoder_name_or_path")
    text = load_text_encoder(text_source, torch.device("cpu"), config.max_text_tokens)
    denoiser = build_denoiser(unet, config.stage, config.mode, gradient_checkpointing=False)
    if denoiser.frozen is not None and frozen_sha256 is not None:
        # As the run had it in memory.
        found = weights_hash(denoiser.frozen.to(DTYPES[config.mixed_precision]))
        if found != frozen_sha256:
            raise MobiusError(
                f"the frozen weights in {source} ({found[:12]}…) are not those that the trained ones were trained"
                f" beside ({frozen_sha256[:12]}…): put these back, or give the config.yaml of the run with another"
                " pretrained_model_name_or_path"
            )
    _assign(denoiser.trained, weights)
    model: Any = denoiser.with_trained(denoiser.trained)
    return TextToVideoPipeline(
        vae=vae,
        text_encoder=text.model,
        tokenizer=text.tokenizer,
        # As in final/: what the run computed with.
        unet=model.to(DTYPES[config.mixed_precision]).eval(),
        scheduler=training_scheduler(scheduler, config.objective),
        max_text_tokens=text.max_tokens,
        num_frames=1 if config.stage == "text-to-image" else config.data.num_frames,
        resolution=config.data.resolution,
        guidance_scale=config.validation.guidance_scale,
        frame_noise_correlation=config.objective.frame_noise_correlation,
    )


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
