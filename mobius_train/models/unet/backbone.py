"""diffusers' UNet2DConditionModel as a backbone: its forward pass as a stream of layer features.

All models with a 2D UNet use this walk. The parallel model consumes the stream unchanged; the serial model inserts its
temporal layers.

Legend: SC spatial convolution block (ResnetBlock2D), SA spatial attention block (Transformer2DModel), h hidden state.
N = B·F frames, C channels, H, W latent size; L text tokens, D text width; T width of the time embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import zip_longest
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from mobius_train.conditions import TEXT, Conditions
from mobius_train.models.added_conditions import added_cond_kwargs
from mobius_train.models.backbone import Feature, LayerShape, Tail, Timestep
from mobius_train.models.unet.check import check_unet
from mobius_train.models.unet.conditions import condition_widths
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


class Walk:
    """One forward pass of a UNet, layer by layer.

    It holds only the hidden state and the bridges, so a feature is freed as soon as the consumer drops it. It computes
    in the UNet's dtype.

    Args:
        sample: (N, C, H, W) of any size: if H or W does not halve evenly, upsampling uses the bridge's size.
        timestep: a number or a tensor of shape (), (1,) or (N,).
        conditions: of N frames; see `condition_widths`.
    """

    def __init__(self, unet: UNet2DConditionModel, sample: Tensor, timestep: Timestep, conditions: Conditions) -> None:
        self._unet = unet
        self._sample, self._timestep, self._text = sample.to(unet.dtype), timestep, conditions[TEXT].to(unet.dtype)
        # The sizes keep their dtype: in bfloat16 1023 would become 1024.
        self._added = added_cond_kwargs(conditions)
        self._even = all(size % 2**unet.num_upsamplers == 0 for size in sample.shape[-2:])
        self._bridges: list[Tensor] = []

    def features(
        self,
        layer: Layer = spatial_layer,
        enter: Callable[[Tensor], Tensor] = lambda hidden: hidden,
        depth: int = 0,
    ) -> Iterator[Feature]:
        """Yield h_0 after conv_in, then one feature for each layer in forward order.

        `output_head` takes the hidden state of the last feature.

        Args:
            layer: computes one layer.
            enter: transforms h_0 before the first layer.
            depth: stop before the last `depth` up blocks. If it is not 0, a last feature is their input.
        """
        unet = self._unet
        sample = 2 * self._sample - 1.0 if unet.config.center_input_sample else self._sample
        time_embedding = unet.time_embedding(unet.get_time_embed(sample=sample, timestep=self._timestep))
        added = unet.get_aug_embed(time_embedding, self._text, self._added)
        if added is not None:
            time_embedding = time_embedding + added
        if unet.time_embed_act is not None:
            time_embedding = unet.time_embed_act(time_embedding)
        self._conditions = (time_embedding, self._text)

        self._hidden = enter(unet.conv_in(sample))
        yield Feature(self._hidden)

        self._bridges = [self._hidden]
        for block in unet.down_blocks:
            for resnet, attention in _layers(block):
                yield self._run(layer, resnet, attention, None)
                self._bridges.append(self._hidden)
            for downsampler in block.downsamplers or ():
                self._hidden = downsampler(self._hidden)
                self._bridges.append(self._hidden)

        for resnet, attention in _layers(unet.mid_block):
            yield self._run(layer, resnet, attention, None)

        yield from self._up(unet.up_blocks[: len(unet.up_blocks) - depth], layer)
        if depth:
            yield Feature(self._hidden)

    def tail(self, hidden: Tensor, layer: Layer, blocks: Iterable[nn.Module]) -> Tensor:
        """Run the last up blocks, or copies of them, on another input than the one that `features` yielded last.

        Args:
            hidden: in the dtype in which the blocks compute.

        Returns:
            The input of `output_head`.
        """
        self._hidden = hidden
        self._bridges = [bridge.to(hidden.dtype) for bridge in self._bridges]
        time_embedding, text = self._conditions
        self._conditions = (time_embedding.to(hidden.dtype), text.to(hidden.dtype))
        for _ in self._up(blocks, layer):
            pass
        return self._hidden

    def _up(self, blocks: Iterable[Any], layer: Layer) -> Iterator[Feature]:
        for block in blocks:
            for resnet, attention in _layers(block):
                yield self._run(layer, resnet, attention, self._bridges.pop())
            for upsampler in block.upsamplers or ():
                self._hidden = upsampler(self._hidden, None if self._even else self._bridges[-1].shape[-2:])

    def _run(self, layer: Layer, resnet: nn.Module, attention: nn.Module | None, bridge: Tensor | None) -> Feature:
        feature = layer(resnet, attention, self._hidden, bridge, *self._conditions)
        self._hidden = feature.hidden
        return feature


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
        return condition_widths(self.unet.config)

    def layers(self) -> list[LayerShape]:
        return self.layout.layers()

    def features(self, sample: Tensor, timestep: Timestep, conditions: Conditions) -> Iterator[Feature]:
        return Walk(self.unet, sample, timestep, conditions).features()

    def split(
        self, sample: Tensor, timestep: Timestep, conditions: Conditions, depth: int
    ) -> tuple[Iterator[Feature], Tail]:
        walk = Walk(self.unet, sample, timestep, conditions)

        def tail(hidden: Tensor, layer: Layer, copies: Iterable[nn.Module] | None = None) -> Tensor:
            if copies is None:
                return walk.tail(hidden.to(self.unet.dtype), layer, self.behind(depth))
            return walk.tail(hidden, layer, copies)

        return walk.features(depth=depth), tail

    def behind(self, depth: int) -> list[nn.Module]:
        blocks = self.unet.up_blocks
        return list(blocks[len(blocks) - depth :])

    def head(self, hidden: Tensor) -> Tensor:
        return output_head(self.unet, hidden)

    def units(self) -> list[list[nn.Module]]:
        return layer_units(self.unet)
