"""Features of whole clips, whose distributions are compared: of a video encoder, or of an autoencoder's latents.

Legend: F frames, H, W pixels, D width of the features; c, h, w latent channels and size.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from mobius_train.encoders.image_encoder import ImageEncoder
from mobius_train.errors import MobiusError
from mobius_train.evaluate.frozen_model import load_frozen, load_local
from mobius_train.evaluate.resize import Resize
from mobius_train.pretrained.strict_load import load_diffusers

VIDEO_ENCODERS = ("videomae", "vivit", "timesformer", "vjepa2")


class SetFeatures(Protocol):
    """name: of the distance, after the features."""

    name: str

    def check(self, num_frames: int, source: str) -> None:
        """
        Raises:
            MobiusError: clips of this length do not fit.
        """

    def of(self, frames: Tensor) -> Tensor:
        """Features (D,) float64 on the CPU of uint8 (F, 3, H, W)."""


class VideoEncoder:
    """Mean over the tokens of a video transformer, on as many evenly spaced frames as it takes.

    Self-supervised encoders see motion better than those of action recognition (https://arxiv.org/abs/2404.12391).
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.model = load_frozen("AutoModel", folder, VIDEO_ENCODERS, device)
        config = self.model.config
        self.name = f"frechet_{config.model_type}"
        self._folder, self._device = folder, device
        self._num_frames = int(getattr(config, "num_frames", None) or config.frames_per_clip)
        size = getattr(config, "image_size", None) or config.crop_size
        processor = load_local("AutoImageProcessor", folder)
        side = size if isinstance(size, int) else size[0]
        self._resize = Resize(side, "bilinear", True, processor.image_mean, processor.image_std)

    def check(self, num_frames: int, source: str) -> None:
        if num_frames < self._num_frames:
            raise MobiusError(
                f"the video encoder of {self._folder} takes {self._num_frames} frames, but {source} has a clip of"
                f" {num_frames}: give longer clips or another encoder"
            )

    @torch.no_grad()
    def of(self, frames: Tensor) -> Tensor:
        chosen = [number * len(frames) // self._num_frames for number in range(self._num_frames)]
        pixels = self._resize(frames[chosen].to(self._device))[None]
        tokens = self.model(**{self.model.main_input_name: pixels}).last_hidden_state
        return tokens[0].mean(0).cpu().double()


class PooledLatents:
    """Mean and mean |change of adjacent frames| of each channel of an autoencoder's latents: 2 c numbers.

    So few numbers need only some hundred clips. They are blind to what happens within a frame.
    """

    name = "frechet_latents"

    def __init__(self, autoencoder: AutoencoderKL, device: torch.device) -> None:
        self._encoder = ImageEncoder(autoencoder, device)

    @classmethod
    def load(cls, folder: Path, device: torch.device) -> PooledLatents:
        """
        Raises:
            MobiusError: see `load_diffusers`.
        """
        return cls(load_diffusers(AutoencoderKL, folder), device)

    def check(self, num_frames: int, source: str) -> None:
        pass

    def of(self, frames: Tensor) -> Tensor:
        latents = self._encoder.space.scaled(self._encoder.posterior(frames).mean).cpu().double()
        return torch.cat([latents.mean((0, 2, 3)), latents.diff(dim=0).abs().mean((0, 2, 3))])
