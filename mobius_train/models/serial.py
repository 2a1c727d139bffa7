"""The serial model, the conventional design: temporal layers between the spatial layers of a 2D UNet.

The module path `mobius_train.models.serial` is part of a file format: diffusers writes it into the model_index.json of
every saved pipeline and imports SerialUNet from it on loading.

Legend: SC, SA spatial convolution and attention blocks; TC, TA temporal ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, Self

import torch
from diffusers import ConfigMixin, ModelMixin, UNet2DConditionModel, UNet3DConditionModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.unets.unet_3d_condition import UNet3DConditionOutput
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mobius_train.conditions import TEXT, Conditions
from mobius_train.models.added_conditions import added_cond_kwargs, check_conditions, given_conditions
from mobius_train.models.backbone import Feature, Timestep, own_frames, unfold_frames
from mobius_train.models.denoiser import HEAD, SPATIAL, TEMPORAL
from mobius_train.models.recompute import LayerMemory
from mobius_train.models.serial_model import SerialModel
from mobius_train.models.unet.backbone import UNetBackbone, Walk, output_head
from mobius_train.models.unet.layers import LAYOUT_FIELDS, read_layout
from mobius_train.models.unet.serial_layer import on_positions, serial_layer
from mobius_train.models.unet.temporal import TemporalAttention, TemporalBlock, TemporalConv, transformer_in
from mobius_train.models.units import layer_units
from mobius_train.sequence.split import Split

# diffusers looks up ModelMixin in the module from which it imports a class.
__all__ = ["ModelMixin", "SerialUNet", "TemporalLayers"]


class TemporalLayers(ModelMixin, ConfigMixin):
    """Container for the temporal layers of a serial model, with the names of UNet3DConditionModel.

    The configuration entries have the same meaning as in UNet2DConditionModel.
    """

    @register_to_config
    def __init__(
        self,
        down_block_types: tuple[str, ...],
        mid_block_type: str | None,
        up_block_types: tuple[str, ...],
        block_out_channels: tuple[int, ...],
        layers_per_block: int | tuple[int, ...],
        attention_head_dim: int | tuple[int, ...],
        norm_num_groups: int,
    ) -> None:
        super().__init__()
        layout = read_layout(self.config)
        self.transformer_in = transformer_in(block_out_channels[0], layout.in_heads, norm_num_groups)
        block = partial(TemporalBlock, norm_num_groups=norm_num_groups, bridged=False)
        self.down_blocks = nn.ModuleList(map(block, layout.down))
        self.mid_block = block(layout.mid)
        self.up_blocks = nn.ModuleList(map(block, layout.up))

    @classmethod
    def from_unet2d(cls, unet: UNet2DConditionModel) -> Self:
        """New temporal layers for `unet`, in float32, with default initialisation."""
        return cls(**{name: unet.config[name] for name in (*LAYOUT_FIELDS, "norm_num_groups")})

    def layers(self) -> list[tuple[nn.Module, nn.Module | None]]:
        """The (TC, TA) pairs in forward order."""
        blocks = (*self.down_blocks, self.mid_block, *self.up_blocks)
        return [layer for block in blocks for layer in block.layers()]

    def zero_outputs(self) -> None:
        """Turn every temporal layer into the identity."""
        for module in self.modules():
            if isinstance(module, TemporalConv | TemporalAttention):
                module.zero_output()


class SerialUNet(SerialModel):
    """Text-to-video denoiser with h_{i+1} = TA(SA(TC(SC(h_i)))) (Mobius, Eq. 7).

    Equivalent to diffusers' UNet3DConditionModel, for any 2D UNet. Weight names are those of UNet3DConditionModel with
    a prefix: `unet.` for the 2D layers, `temporal.` for the others.

    Attributes:
        unet: the 2D UNet.
        temporal: the temporal layers.
        gradient_checkpointing: recompute each layer in the backward pass.
    """

    parts: ClassVar = {"unet": UNet2DConditionModel, "temporal": TemporalLayers}
    image_part: ClassVar = "unet"

    def __init__(self, unet: UNet2DConditionModel, temporal: TemporalLayers) -> None:
        super().__init__()
        self.backbone = UNetBackbone(unet)
        self.unet = unet
        self.temporal = temporal
        self.gradient_checkpointing = False
        self.register_backbone_config(unet.config)

    @classmethod
    def from_unet2d(cls, unet: UNet2DConditionModel) -> Self:
        """Add temporal layers to `unet`, each initialised as the identity.

        Raises:
            MobiusError: the UNet has unsupported conditions or blocks.
        """
        temporal = TemporalLayers.from_unet2d(UNetBackbone(unet).unet)
        temporal.zero_outputs()
        return cls(unet, temporal)

    @classmethod
    def from_unet3d(cls, unet3d: UNet3DConditionModel) -> Self:
        """The same model with copies of the weights. TC has no dropout here, and 0.1 in diffusers.

        Raises:
            MobiusError: the UNet has unsupported conditions or blocks.
        """
        unet = UNetBackbone(UNet2DConditionModel(**_config2d(unet3d))).unet
        temporal = TemporalLayers.from_unet2d(unet)
        state = unet3d.state_dict()
        names = temporal.state_dict().keys()
        temporal.load_state_dict({name: state[name] for name in names})
        unet.load_state_dict({name: tensor for name, tensor in state.items() if name not in names})
        model = cls(unet, temporal)
        return model.to(unet3d.device, unet3d.dtype).train(unet3d.training)

    def set_memory(self, memory: LayerMemory) -> None:
        """See Denoiser. Serial models support gradient checkpointing only."""
        self.gradient_checkpointing = memory.gradient_checkpointing

    def units(self) -> list[list[nn.Module]]:
        return layer_units(self)

    def branches(self) -> Mapping[str, Sequence[nn.Module]]:
        unet = self.unet
        return {
            SPATIAL: [self],
            TEMPORAL: [self.temporal],
            HEAD: [unet.conv_norm_out, unet.conv_act, unet.conv_out],
        }

    def predict(
        self,
        sample: Tensor,
        timestep: Timestep,
        conditions: Conditions,
        trained: Callable[..., Any] | None = None,
    ) -> Tensor:
        """See Denoiser. `trained` has this model's call signature."""
        model = self if trained is None else trained
        added = added_cond_kwargs(conditions)
        return model(sample, timestep, conditions[TEXT], return_dict=False, added_cond_kwargs=added)[0]

    def forward(
        self,
        sample: Tensor,
        timestep: Timestep,
        encoder_hidden_states: Tensor,
        return_dict: bool = True,
        *,
        added_cond_kwargs: Mapping[str, Tensor] | None = None,
    ) -> UNet3DConditionOutput | tuple[Tensor]:
        """As UNet3DConditionModel: (B, C, F, H, W), () or (B,), (B, L, D) → `.sample` (B, C, F, H, W).

        `added_cond_kwargs` are those of UNet2DConditionModel; see `given_conditions`.

        Raises:
            MobiusError: a condition is missing, unknown, or has another shape.
        """
        clips, _, num_frames, *_ = sample.shape
        split = Split(self.sequence, clips * num_frames)
        conditions = given_conditions(encoder_hidden_states, added_cond_kwargs)
        check_conditions(conditions, self.backbone.condition_widths, len(sample))
        walk = Walk(self.unet, *own_frames(split, sample, timestep, conditions))
        pairs = iter(self.temporal.layers())

        def layer(*args: Any) -> Feature:
            return self._run(serial_layer, *next(pairs), num_frames, split, *args)

        def enter(hidden: Tensor) -> Tensor:
            return self._run(on_positions(self.temporal.transformer_in, split), hidden, num_frames)

        for feature in walk.features(layer, enter):
            hidden = feature.hidden
        prediction = unfold_frames(split.whole(self._run(output_head, self.unet, hidden)), num_frames)
        return UNet3DConditionOutput(sample=prediction) if return_dict else (prediction,)

    def _run(self, function: Callable[..., Any], *args: Any) -> Any:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(function, *args, use_reentrant=False)
        return function(*args)


def _config2d(unet3d: UNet3DConditionModel) -> dict[str, Any]:
    """The configuration of the 2D UNet inside the 3D UNet."""
    config = {name: value for name, value in unet3d.config.items() if not name.startswith("_")}
    # In 3D UNets this entry is the head size, in 2D UNets the number of heads.
    head_dim = config["attention_head_dim"]
    return config | {
        "down_block_types": tuple(kind.replace("3D", "2D") for kind in config["down_block_types"]),
        "up_block_types": tuple(kind.replace("3D", "2D") for kind in config["up_block_types"]),
        "attention_head_dim": tuple(width // head_dim for width in config["block_out_channels"]),
        "use_linear_projection": True,
    }
