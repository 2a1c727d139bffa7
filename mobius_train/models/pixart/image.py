"""The transformer of PixArt as trained in the text-to-image stage."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import PixArtTransformer2DModel
from torch import Tensor

from mobius_train.conditions import MASK, TEXT, Conditions
from mobius_train.models.backbone import Timestep
from mobius_train.models.image_denoiser import ImageDenoiser
from mobius_train.models.pixart.backbone import PixArtBackbone, added_cond_kwargs
from mobius_train.models.tokens.grid import token_grid


class ImagePixArt(ImageDenoiser):
    """A transformer that processes every frame of a clip independently; see ImageDenoiser.

    A variance that it predicts has no part in the loss: its weights get a gradient of zero.

    Raises:
        MobiusError: it is another transformer, or its configuration is not supported.
    """

    def __init__(self, model: PixArtTransformer2DModel) -> None:
        super().__init__(model, PixArtBackbone(model), [model.norm_out, model.proj_out])

    def call(self, model: Callable[..., Any], frames: Tensor, timestep: Timestep, conditions: Conditions) -> Tensor:
        """Call the model with PixArtTransformer2DModel's signature; returns its prediction, (B·F, C, H, W).

        Raises:
            MobiusError: see `token_grid`.
        """
        token_grid(self.config, *frames.shape[-2:])
        prediction = model(
            hidden_states=frames,
            encoder_hidden_states=conditions[TEXT],
            encoder_attention_mask=conditions[MASK],
            timestep=torch.as_tensor(timestep, device=frames.device).expand(len(frames)),
            added_cond_kwargs=added_cond_kwargs(conditions),
            return_dict=False,
        )[0]
        return prediction[:, : frames.shape[1]]
