"""The checks that an image or video model, an autoencoder and text encoders fit each other."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from mobius_train.conditions import SIZE_NUMBERS, SIZES
from mobius_train.encoders.image_encoder import LatentSpace
from mobius_train.encoders.text_encoding import TextEncoding
from mobius_train.errors import MobiusError
from mobius_train.models import Denoiser
from mobius_train.models.families import family_of

# Channels of frames.
COLOURS = 3


def check_side(name: str, pixels: int, image_model: Any, vae_config: Mapping[str, Any]) -> None:
    """Check that the models take frames whose height or width is so many pixels.

    Args:
        name: of the side, for the error.
        image_model: with its configuration; None: the autoencoder alone.

    Raises:
        MobiusError: it is no multiple of the autoencoder's reduction times the model's patch_size; or the model has no
            positions for so many patches (pos_embed_max_size).
    """
    config, reduction = getattr(image_model, "config", {}), LatentSpace.of(vae_config).reduction
    patch, most = config.get("patch_size"), config.get("pos_embed_max_size")
    multiple = reduction * (patch if isinstance(patch, int) else 1)
    if pixels < 1 or pixels % multiple:
        reason = "the autoencoder's reduction" + (" times the image model's patch_size" if multiple > reduction else "")
        raise MobiusError(f"{name}={pixels} is not a multiple of {multiple}, {reason}")
    if most is not None and pixels > most * multiple:
        raise MobiusError(
            f"{name}={pixels}: the image model has positions for at most {most} patches along a side"
            f" (pos_embed_max_size), that is {most * multiple} pixels. Use a smaller size"
        )


def check_positions(size: tuple[int, int], image_model: Any, vae_config: Mapping[str, Any], ranks: int) -> None:
    """Check that ranks that share a clip have a position each in every level of the model.

    Args:
        size: pixels of a frame's sides.
        image_model: with its configuration.
        ranks: sequence_parallel_size.

    Raises:
        MobiusError: the deepest level of a UNet, or a transformer, has fewer positions than ranks.
    """
    levels, patch = len(image_model.config.get("block_out_channels", [0])), image_model.config.get("patch_size")
    step = LatentSpace.of(vae_config).reduction * 2 ** (levels - 1) * (patch if isinstance(patch, int) else 1)
    positions = math.prod(-(-side // step) for side in size)
    if positions < ranks:
        raise MobiusError(
            f"sequence_parallel_size={ranks}, but frames of {size[0]} x {size[1]} pixels have only {positions}"
            f" position(s) in the image model's deepest level: each rank needs one. Use at most {positions}"
        )


def check_latents(denoiser: Denoiser, vae_config: Mapping[str, Any]) -> None:
    """Check that the model takes and predicts the autoencoder's latents.

    Args:
        vae_config: of an AutoencoderKL.

    Raises:
        MobiusError: they have other channels.
    """
    for name in ("in_channels", "out_channels"):
        if vae_config[name] != COLOURS:
            raise MobiusError(f"the autoencoder has {name}={vae_config[name]}, but frames have {COLOURS} colours")
    channels = LatentSpace.of(vae_config).channels
    if denoiser.backbone.latent_channels != channels:
        raise MobiusError(
            f"the image model takes latents of {denoiser.backbone.latent_channels} channels but the autoencoder"
            f" produces {channels}: choose a matching pair. Models for inpainting (9 channels) are not supported"
        )
    config: Any = getattr(denoiser.image_model, "config", {})
    predicted = config.get("out_channels") or channels
    if predicted != channels and not family_of(type(denoiser.image_model).__name__).drops_variance:
        raise MobiusError(
            f"the image model predicts {predicted} channels, but its latents have {channels}: models that predict a"
            " variance too are not supported"
        )


def check_text(denoiser: Denoiser, text: TextEncoding, source: str) -> None:
    """Check that the text encoders give the conditions that the model takes.

    Args:
        source: the text encoders' folder or name, for the error.

    Raises:
        MobiusError: a condition is missing, or of another width.
    """
    widths = {name: shape[-1] for name, shape in text.shapes().items()} | {SIZES: SIZE_NUMBERS}
    for name, width in denoiser.backbone.condition_widths.items():
        found = widths.get(name)
        if found is None or width not in (0, found):
            raise MobiusError(
                f"the image model takes the condition {name!r}{f' of width {width}' if width else ''}, but the text"
                f" encoders of {source} produce {found or 'none'}: set text_encoder_name_or_path to a matching text"
                " encoder"
            )
