"""The comparator for SD3: Vchitect's parallel block in every block of the transformer.

The module path `mobius_train.models.sd3.serial` is part of a file format: diffusers writes it into the model_index.json
of every saved pipeline and imports SerialSD3 from it on loading.

Legend: B clips, F frames, N = B·F frames, ordered clip by clip; C latent channels, H, W latent size; L text tokens, D
text width, P width of the pooled text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
from diffusers import ModelMixin, SD3Transformer2DModel
from diffusers.models.unets.unet_3d_condition import UNet3DConditionOutput
from torch import Tensor, nn

from mobius_train.conditions import POOLED, TEXT, Conditions
from mobius_train.models.added_conditions import check_conditions
from mobius_train.models.backbone import Timestep, own_frames, unfold_frames
from mobius_train.models.denoiser import HEAD, SPATIAL, TEMPORAL
from mobius_train.models.recompute import LayerMemory
from mobius_train.models.sd3.backbone import SD3Backbone
from mobius_train.models.sd3.vchitect import VchitectLayers, VchitectProcessor
from mobius_train.models.serial_model import SerialModel
from mobius_train.models.tokens.grid import token_grid
from mobius_train.sequence.split import Split

# diffusers looks up ModelMixin in the module from which it imports a class.
__all__ = ["ModelMixin", "SerialSD3"]


class SerialSD3(SerialModel):
    """Text-to-video denoiser: an SD3 transformer whose blocks have Vchitect's branches; see `vchitect`.

    Every block's output depends on the branches, so the backward pass runs through the whole transformer.

    Raises:
        MobiusError: Vchitect's block is not defined for the transformer, or the branches do not fit it.

    Attributes:
        transformer: the image model. Only its attention processors are replaced; called by itself, it computes what it
            did before.
        temporal: the branches.
    """

    parts: ClassVar = {"transformer": SD3Transformer2DModel, "temporal": VchitectLayers}
    image_part: ClassVar = "transformer"

    def __init__(self, transformer: SD3Transformer2DModel, temporal: VchitectLayers) -> None:
        super().__init__()
        self.backbone = SD3Backbone(transformer)
        temporal.check_fit(transformer)
        for block in transformer.transformer_blocks:
            block.attn.set_processor(VchitectProcessor("sdpa"))
        self.transformer = transformer
        self.temporal = temporal
        self.register_backbone_config(transformer.config)

    @classmethod
    def from_sd3(cls, transformer: SD3Transformer2DModel, spatial_scale: float = 1.0) -> Self:
        """Add new branches to `transformer`.

        Args:
            spatial_scale: see VchitectLayers. With 1 the model predicts on every frame what the transformer does.

        Raises:
            MobiusError: the transformer cannot be a backbone, or Vchitect's block is not defined for it.
        """
        return cls(transformer, VchitectLayers.of(transformer, spatial_scale))

    def set_memory(self, memory: LayerMemory) -> None:
        """See Denoiser. Serial models support gradient checkpointing only, here by block."""
        if memory.gradient_checkpointing:
            self.transformer.enable_gradient_checkpointing()
        else:
            self.transformer.disable_gradient_checkpointing()

    def units(self) -> list[list[nn.Module]]:
        pairs = zip(self.transformer.transformer_blocks, self.temporal.blocks, strict=True)
        return [[module] for pair in pairs for module in pair]

    def branches(self) -> Mapping[str, Sequence[nn.Module]]:
        transformer = self.transformer
        return {SPATIAL: [self], TEMPORAL: [self.temporal], HEAD: [transformer.norm_out, transformer.proj_out]}

    def predict(
        self,
        sample: Tensor,
        timestep: Timestep,
        conditions: Conditions,
        trained: Callable[..., Any] | None = None,
    ) -> Tensor:
        """See Denoiser. `trained` has this model's call signature.

        Raises:
            MobiusError: a condition is missing, or has another shape.
        """
        check_conditions(conditions, self.backbone.condition_widths, len(sample))
        model = self if trained is None else trained
        return model(sample, timestep, conditions[TEXT], conditions[POOLED], return_dict=False)[0]

    def forward(
        self,
        sample: Tensor,
        timestep: Timestep,
        encoder_hidden_states: Tensor,
        pooled_projections: Tensor,
        return_dict: bool = True,
    ) -> UNet3DConditionOutput | tuple[Tensor]:
        """(B, C, F, H, W), () or (B,), (B, L, D), (B, P) → `.sample` (B, C, F, H, W).

        Raises:
            MobiusError: see `token_grid`.
        """
        token_grid(self.transformer.config, *sample.shape[-2:])
        clips, _, num_frames, *_ = sample.shape
        split = Split(self.sequence, clips * num_frames)
        given = Conditions({TEXT: encoder_hidden_states, POOLED: pooled_projections}).to(dtype=self.dtype)
        frames, timestep, conditions = own_frames(split, sample.to(self.dtype), timestep, given)
        blocks = self.transformer.transformer_blocks
        branches = {block.attn: own for block, own in zip(blocks, self.temporal.blocks, strict=True)}
        predicted = self.transformer(
            hidden_states=frames,
            timestep=torch.as_tensor(timestep, device=frames.device).expand(len(frames)),
            encoder_hidden_states=conditions[TEXT],
            pooled_projections=conditions[POOLED],
            joint_attention_kwargs={"branches": branches, "num_frames": num_frames, "split": split},
            return_dict=False,
        )[0]
        prediction = unfold_frames(split.whole(predicted), num_frames)
        return UNet3DConditionOutput(sample=prediction) if return_dict else (prediction,)
