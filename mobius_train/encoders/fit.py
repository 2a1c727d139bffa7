"""The check that an image or video model, an autoencoder and a text encoder fit each other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mobius_train.encoders.image_encoder import LatentSpace
from mobius_train.encoders.text_encoder import TextEncoder
from mobius_train.errors import MobiusError
from mobius_train.models import Denoiser

# Channels of frames.
COLOURS = 3


def check_fit(denoiser: Denoiser, vae_config: Mapping[str, Any], text: TextEncoder, source: str) -> None:
    """Check that the parts of a pipeline can be trained and sampled together.

    Args:
        vae_config: of an AutoencoderKL.
        source: the text encoder's folder or name, for the error.

    Raises:
        MobiusError: the parts have other channels, or the denoiser takes another text.
    """
    for name in ("in_channels", "out_channels"):
        if vae_config[name] != COLOURS:
            raise MobiusError(f"the autoencoder has {name}={vae_config[name]}, but frames have {COLOURS} colours")
    config: Any = getattr(denoiser.image_model, "config", {})
    widths = config.get("cross_attention_dim")
    if isinstance(widths, list | tuple):
        raise MobiusError(
            f"the image model has a cross_attention_dim for each block ({', '.join(map(str, widths))}): only models"
            " with one width of the text are supported"
        )
    backbone, channels = denoiser.backbone, LatentSpace.of(vae_config).channels
    if backbone.latent_channels != channels:
        raise MobiusError(
            f"the image model takes latents of {backbone.latent_channels} channels but the autoencoder produces"
            f" {channels}: choose a matching pair. Models for inpainting (9 channels) are not supported"
        )
    predicted = config.get("out_channels", channels)
    if predicted != channels:
        raise MobiusError(
            f"the image model predicts {predicted} channels, but its latents have {channels}: models that predict a"
            " variance too are not supported"
        )
    for name, width in backbone.condition_widths.items():
        found: Any = text.widths.get(name)
        if found != width:
            raise MobiusError(
                f"the image model takes the condition {name!r} of width {width}, but the text encoder {source} produces"
                f" {'none' if found is None else found}: set text_encoder_name_or_path to a matching text encoder"
            )
