"""Text-to-image, the first training stage: the image model applied to single frames."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from diffusers.models.unets.unet_3d_condition import UNet3DConditionOutput
from torch import Tensor, nn

from mobius_train.conditions import TEXT, Conditions
from mobius_train.errors import MobiusError
from mobius_train.models.added_conditions import check_conditions, given_conditions
from mobius_train.models.backbone import Backbone, Timestep, fold_conditions, fold_frames, unfold_frames
from mobius_train.models.denoiser import HEAD, SPATIAL
from mobius_train.models.recompute import LayerMemory
from mobius_train.sequence.group import SequenceGroup


class ImageDenoiser(nn.Module):
    """An image model that processes every frame of a clip independently; see Denoiser.

    The wrapper is for training and sampling; only the image model is saved.

    Args:
        model: the image model, with diffusers' methods for gradient checkpointing.
        backbone: the same model as a backbone.
        head: the modules of the output head.
    """

    frozen = None
    sequence = None

    def __init__(self, model: nn.Module, backbone: Backbone, head: Sequence[nn.Module]) -> None:
        super().__init__()
        self.image_model = model
        self.backbone = backbone
        self._head = tuple(head)

    @property
    def config(self) -> Any:
        return cast(Any, self.image_model).config

    @property
    def dtype(self) -> torch.dtype:
        return cast(Any, self.image_model).dtype

    @property
    def device(self) -> torch.device:
        return cast(Any, self.image_model).device

    @property
    def trained(self) -> nn.Module:
        return self.image_model

    def frozen_in_graph(self) -> list[nn.Module]:
        return []

    def set_memory(self, memory: LayerMemory) -> None:
        """See Denoiser. Image models support gradient checkpointing only."""
        model = cast(Any, self.image_model)
        if memory.gradient_checkpointing:
            model.enable_gradient_checkpointing()
        elif model.is_gradient_checkpointing:
            model.disable_gradient_checkpointing()

    def set_sequence(self, sequence: SequenceGroup | None) -> None:
        """See Denoiser.

        Raises:
            MobiusError: there is a group, but frames share nothing here.
        """
        if sequence is not None:
            raise MobiusError("a text-to-image model computes each frame alone: use more data-parallel ranks instead")

    def units(self) -> list[list[nn.Module]]:
        return self.backbone.units()

    def layers_to_compile(self) -> list[nn.Module]:
        return []

    def branches(self) -> Mapping[str, Sequence[nn.Module]]:
        return {SPATIAL: [self.image_model], HEAD: self._head}

    def predict(
        self,
        sample: Tensor,
        timestep: Timestep,
        conditions: Conditions,
        trained: Callable[..., Any] | None = None,
    ) -> Tensor:
        """See Denoiser. `trained` has the image model's call signature, on (B·F, C, H, W).

        Raises:
            MobiusError: a condition is missing, or has another shape.
        """
        check_conditions(conditions, self.backbone.condition_widths, len(sample))
        model = self.image_model if trained is None else trained
        num_frames = sample.shape[2]
        timestep, conditions = fold_conditions(timestep, conditions, num_frames)
        # An engine has its own compute dtype; under FSDP the weights are float32 between steps.
        dtype = getattr(trained, "dtype", self.dtype)
        prediction = self.call(model, fold_frames(sample).to(dtype), timestep, conditions.to(dtype=dtype))
        return unfold_frames(prediction, num_frames)

    def call(self, model: Callable[..., Any], frames: Tensor, timestep: Timestep, conditions: Conditions) -> Tensor:
        """Call the model with the text as its only condition; returns its prediction, (B·F, C, H, W)."""
        return model(frames, timestep, conditions[TEXT], return_dict=False)[0]

    def with_trained(self, module: nn.Module, frozen: nn.Module | None = None) -> nn.Module:
        """See Denoiser. Returns the image model itself, from which any image pipeline can sample."""
        return module

    def forward(
        self,
        sample: Tensor,
        timestep: Timestep,
        encoder_hidden_states: Tensor,
        return_dict: bool = True,
        *,
        added_cond_kwargs: Mapping[str, Tensor] | None = None,
        encoder_attention_mask: Tensor | None = None,
    ) -> UNet3DConditionOutput | tuple[Tensor]:
        """As UNet3DConditionModel: (B, C, F, H, W), () or (B,), (B, L, D) → `.sample` (B, C, F, H, W).

        `added_cond_kwargs` are those of UNet2DConditionModel, and so is `encoder_attention_mask`, (B, L); see
        `given_conditions`.
        """
        conditions = given_conditions(encoder_hidden_states, added_cond_kwargs, encoder_attention_mask)
        prediction = self.predict(sample, timestep, conditions)
        return UNet3DConditionOutput(sample=prediction) if return_dict else (prediction,)
