"""The parallel model: an untouched, frozen 2D UNet with a trainable ring beside it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Self, cast

from diffusers import ModelMixin, UNet2DConditionModel
from diffusers.models.unets.unet_3d_condition import UNet3DConditionOutput
from torch import Tensor, nn

from mobius_train.errors import MobiusError
from mobius_train.models.backbone import check_backbone
from mobius_train.models.composite import Assembly
from mobius_train.models.frames import Timestep, fold_conditions, fold_frames, unfold_frames
from mobius_train.models.ring import Ring
from mobius_train.models.spatial import spatial_features
from mobius_train.models.unet_layers import read_layout

__all__ = ["ModelMixin", "ParallelUNet"]


class ParallelUNet(Assembly):
    """Text-to-video denoiser whose temporal layers lie beside the spatial ones (Mobius, arXiv 2407.06617).

    A new model predicts on every frame what the 2D UNet predicts on it.

    Raises:
        MobiusError: the UNet wants conditions, or has blocks, that are not supported, or the ring is not its.

    Attributes:
        spatial: the 2D UNet, kept as it is: frozen, always in evaluation mode, never in a graph.
        ring: the trained branch.
    """

    parts: ClassVar = {"spatial": UNet2DConditionModel, "ring": Ring}
    _supports_gradient_checkpointing = True

    def __init__(self, spatial: UNet2DConditionModel, ring: Ring) -> None:
        super().__init__()
        check_backbone(spatial)
        if read_layout(ring.config) != read_layout(spatial.config):
            raise MobiusError(
                "this ring does not belong to this spatial UNet: their layers differ in number or shape."
                " Make a new ring with ParallelUNet.from_unet2d"
            )
        self.spatial = spatial.requires_grad_(False).eval()
        self.ring = ring
        self._register_backbone_config(spatial.config)

    @classmethod
    def from_unet2d(cls, unet: UNet2DConditionModel, gradient_checkpointing: bool = False) -> Self:
        """A new ring beside `unet`, which becomes `spatial` and is frozen.

        Raises:
            MobiusError: the UNet wants conditions, or has blocks, that are not supported.
        """
        check_backbone(unet)
        return cls(unet, Ring.from_unet2d(unet, gradient_checkpointing))

    @property
    def trained(self) -> nn.Module:
        return self.ring

    @property
    def frozen(self) -> nn.Module:
        return self.spatial

    def train(self, mode: bool = True) -> Self:
        """Set the ring's mode; the spatial branch stays in evaluation mode."""
        super().train(mode)
        self.spatial.eval()
        return self

    def predict(
        self,
        sample: Tensor,
        timestep: Timestep,
        encoder_hidden_states: Tensor,
        trained: Callable[..., Any] | None = None,
    ) -> Tensor:
        """See Denoiser. `trained` is called as `trained(features, num_frames=F)`."""
        ring = self.ring if trained is None else trained
        num_frames = sample.shape[2]
        conditions = fold_conditions(timestep, encoder_hidden_states, num_frames)
        features = spatial_features(self.spatial, fold_frames(sample), *conditions)
        return unfold_frames(ring(features, num_frames=num_frames), num_frames)

    def with_trained(self, module: nn.Module, frozen: nn.Module | None = None) -> Self:
        """See Denoiser. The spatial branch is shared, unless a copy is given."""
        return type(self)(cast(UNet2DConditionModel, frozen or self.spatial), cast(Ring, module))

    def forward(
        self, sample: Tensor, timestep: Timestep, encoder_hidden_states: Tensor, return_dict: bool = True
    ) -> UNet3DConditionOutput | tuple[Tensor]:
        """As UNet3DConditionModel: (B, C, F, H, W), () or (B,), (B, L, D) → `.sample` (B, C, F, H, W)."""
        prediction = self.predict(sample, timestep, encoder_hidden_states)
        return UNet3DConditionOutput(sample=prediction) if return_dict else (prediction,)
