"""Text-to-image as the first stage of training: the 2D UNet itself, on frames."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.unets.unet_3d_condition import UNet3DConditionOutput
from torch import Tensor, nn

from mobius_train.conditions import TEXT, Conditions
from mobius_train.models.denoiser import HEAD, SPATIAL
from mobius_train.models.frames import Timestep, fold_conditions, fold_frames, unfold_frames
from mobius_train.models.recompute import LayerMemory
from mobius_train.models.unet.backbone import UNetBackbone
from mobius_train.models.units import layer_units


class ImageUNet(nn.Module):
    """A 2D UNet that takes each frame of a clip for a picture of its own.

    It wraps the UNet for training and sampling; what is saved is the UNet.
    """

    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.backbone = UNetBackbone(unet)
        self.unet = unet

    @property
    def config(self) -> Any:
        return self.unet.config

    @property
    def dtype(self) -> torch.dtype:
        return self.unet.dtype

    @property
    def device(self) -> torch.device:
        return self.unet.device

    @property
    def trained(self) -> nn.Module:
        return self.unet

    @property
    def frozen(self) -> None:
        return None

    @property
    def image_model(self) -> nn.Module:
        return self.unet

    def set_memory(self, memory: LayerMemory) -> None:
        """See Denoiser: of all options a UNet of diffusers has gradient checkpointing alone."""
        if memory.gradient_checkpointing:
            self.unet.enable_gradient_checkpointing()
        else:
            self.unet.disable_gradient_checkpointing()

    def units(self) -> list[list[nn.Module]]:
        return layer_units(self.unet)

    def layers_to_compile(self) -> list[nn.Module]:
        return []

    def branches(self) -> Mapping[str, Sequence[nn.Module]]:
        unet = self.unet
        return {SPATIAL: [unet], HEAD: [unet.conv_norm_out, unet.conv_act, unet.conv_out]}

    def predict(
        self,
        sample: Tensor,
        timestep: Timestep,
        conditions: Conditions,
        trained: Callable[..., Any] | None = None,
    ) -> Tensor:
        """See Denoiser. `trained` is called as a UNet2DConditionModel on (B·F, C, H, W)."""
        unet = self.unet if trained is None else trained
        num_frames = sample.shape[2]
        timestep, conditions = fold_conditions(timestep, conditions, num_frames)
        # An engine computes in its own dtype; under FSDP the weights between its steps are float32.
        dtype = getattr(trained, "dtype", self.dtype)
        prediction = unet(fold_frames(sample).to(dtype), timestep, conditions[TEXT].to(dtype), return_dict=False)[0]
        return unfold_frames(prediction, num_frames)

    def with_trained(self, module: nn.Module, frozen: nn.Module | None = None) -> nn.Module:
        """See Denoiser. The UNet itself: stills are sampled from it as from any."""
        return module

    def forward(
        self, sample: Tensor, timestep: Timestep, encoder_hidden_states: Tensor, return_dict: bool = True
    ) -> UNet3DConditionOutput | tuple[Tensor]:
        """As UNet3DConditionModel: (B, C, F, H, W), () or (B,), (B, L, D) → `.sample` (B, C, F, H, W)."""
        prediction = self.predict(sample, timestep, Conditions.of_text(encoder_hidden_states))
        return UNet3DConditionOutput(sample=prediction) if return_dict else (prediction,)
