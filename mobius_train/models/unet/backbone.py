"""diffusers' UNet2DConditionModel as a backbone: its forward pass as a stream of layer features.

All models with a 2D UNet use this walk. The parallel model consumes the stream unchanged; the serial model inserts its
temporal layers.

Legend: SC spatial convolution block (ResnetBlock2D), SA spatial attention block (Transformer2DModel), h hidden state.
N = B·F frames, C channels, H, W latent size; L text tokens, D text width; T width of the time embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import zip_longest
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from mobius_train.conditions import TEXT, Conditions
from mobius_train.models.backbone import Feature, LayerShape, Timestep
from mobius_train.models.unet.check import check_unet
from mobius_train.models.unet.layers import read_layout
from mobius_train.models.units import layer_units

# (SC, SA or None, h, bridge or None, time embedding (N, T), text (N, L, D)) → feature
Layer = Callable[[nn.Module, nn.Module | None, Tensor, Tensor | None, Tensor, Tensor], Feature]


def spatial_layer(
    resnet: Callable[[Tensor, Tensor], Tensor],
    attention: nn.Module | None,
    hidden: Tensor,
    bridge: Tensor | None,
    time_embedding: Tensor,
    text: Tensor,
) -> Feature:
    """h_{i+1} = SA(SC(h_i)) (Mobius, Eq. 8); a bridge is concatenated to h_i along the channels."""
    if bridge is not None:
        hidden = torch.cat([hidden, bridge], dim=1)
    convolved = resnet(hidden, time_embedding)
    if attention is None:
        return Feature(convolved)
    return Feature(convolved, attention(convolved, encoder_hidden_states=text, return_dict=False)[0])


def walk(
    unet: UNet2DConditionModel,
    sample: Tensor,
    timestep: Timestep,
    encoder_hidden_states: Tensor,
    layer: Layer = spatial_layer,
    enter: Callable[[Tensor], Tensor] = lambda hidden: hidden,
) -> Iterator[Feature]:
    """Yield the features of the UNet in forward order: h_0 after conv_in, then one for each layer.

    The walk holds only the hidden state and the bridges, so a feature is freed as soon as the consumer drops it.
    `output_head` takes the hidden state of the last feature.

    Args:
        sample: (N, C, H, W) of any size: if H or W does not halve evenly, upsampling uses the bridge's size.
        timestep: a number or a tensor of shape (), (1,) or (N,).
        encoder_hidden_states: (N, L, D).
        layer: computes one layer.
        enter: transforms h_0 before the first layer.
    """
    if unet.config.center_input_sample:
        sample = 2 * sample - 1.0
    time_embedding = unet.time_embedding(unet.get_time_embed(sample=sample, timestep=timestep))
    if unet.time_embed_act is not None:
        time_embedding = unet.time_embed_act(time_embedding)
    conditions = (time_embedding, encoder_hidden_states)
    even = all(size % 2**unet.num_upsamplers == 0 for size in sample.shape[-2:])

    hidden = enter(unet.conv_in(sample))
    yield Feature(hidden)

    bridges = [hidden]
    for block in unet.down_blocks:
        for resnet, attention in _layers(block):
            feature = layer(resnet, attention, hidden, None, *conditions)
            hidden = feature.hidden
            bridges.append(hidden)
            yield feature
            del feature
        for downsampler in block.downsamplers or ():
            hidden = downsampler(hidden)
            bridges.append(hidden)

    for resnet, attention in _layers(unet.mid_block):
        feature = layer(resnet, attention, hidden, None, *conditions)
        hidden = feature.hidden
        yield feature
        del feature

    for block in unet.up_blocks:
        for resnet, attention in _layers(block):
            feature = layer(resnet, attention, hidden, bridges.pop(), *conditions)
            hidden = feature.hidden
            yield feature
            del feature
        for upsampler in block.upsamplers or ():
            hidden = upsampler(hidden, None if even else bridges[-1].shape[-2:])


def output_head(unet: UNet2DConditionModel, hidden: Tensor) -> Tensor:
    """Last hidden state (N, C, H, W) → prediction, (N, out_channels, H, W)."""
    return unet.conv_out(unet.conv_act(unet.conv_norm_out(hidden)))


def _layers(block: Any) -> Iterator[tuple[nn.Module, nn.Module | None]]:
    """The (SC, SA) pairs of a block; SA is None where the block has fewer attentions than resnets."""
    if block is None:
        return iter(())
    return zip_longest(block.resnets, getattr(block, "attentions", ()))


class UNetBackbone:
    """See Backbone. The UNet is not modified.

    Raises:
        MobiusError: the UNet has unsupported conditions or blocks.
    """

    def __init__(self, unet: UNet2DConditionModel) -> None:
        check_unet(unet)
        self.unet = unet
        self.layout = read_layout(unet.config)

    @property
    def latent_channels(self) -> int:
        return int(self.unet.config.in_channels)

    @property
    def condition_widths(self) -> dict[str, int]:
        return {TEXT: int(self.unet.config.cross_attention_dim)}

    def layers(self) -> list[LayerShape]:
        return self.layout.layers()

    def features(self, sample: Tensor, timestep: Timestep, conditions: Conditions) -> Iterator[Feature]:
        dtype = self.unet.dtype
        return walk(self.unet, sample.to(dtype), timestep, conditions[TEXT].to(dtype))

    def head(self, hidden: Tensor) -> Tensor:
        return output_head(self.unet, hidden)

    def units(self) -> list[list[nn.Module]]:
        return layer_units(self.unet)
