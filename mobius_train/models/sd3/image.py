"""The transformer of Stable Diffusion 3 as trained in the text-to-image stage."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor

from mobius_train.conditions import POOLED, TEXT, Conditions
from mobius_train.models.backbone import Timestep
from mobius_train.models.image_denoiser import ImageDenoiser
from mobius_train.models.sd3.backbone import SD3Backbone
from mobius_train.models.tokens.grid import token_grid


class ImageSD3(ImageDenoiser):
    """A transformer that processes every frame of a clip independently; see ImageDenoiser.

    Raises:
        MobiusError: it is another transformer, or its configuration is not supported.
    """

    def __init__(self, model: SD3Transformer2DModel) -> None:
        super().__init__(model, SD3Backbone(model), [model.norm_out, model.proj_out])

    def call(self, model: Callable[..., Any], frames: Tensor, timestep: Timestep, conditions: Conditions) -> Tensor:
        """Call the model with SD3Transformer2DModel's signature; returns its prediction, (B·F, C, H, W).

        Raises:
            MobiusError: see `token_grid`.
        """
        token_grid(self.config, *frames.shape[-2:])
        return model(
            hidden_states=frames,
            encoder_hidden_states=conditions[TEXT],
            pooled_projections=conditions[POOLED],
            timestep=torch.as_tensor(timestep, device=frames.device).expand(len(frames)),
            return_dict=False,
        )[0]
