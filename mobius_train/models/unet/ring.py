"""The ring: the trainable temporal branch beside a frozen 2D UNet.

Legend: h hidden state of the frozen spatial branch, t time state of the ring; SC, SA spatial convolution and
attention blocks; TC, TA temporal ones; ⊕ concatenation along channels. N = B·F frames, ordered clip by clip;
C channels, H, W latent size.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import cast

import torch
from diffusers import ConfigMixin, ModelMixin, UNet2DConditionModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.activations import get_activation
from diffusers.models.downsampling import Downsample2D
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

from mobius_train.models.backbone import Feature, LayerShape
from mobius_train.models.recompute import LayerMemory, TreatedUnits
from mobius_train.models.unet.layers import LAYOUT_FIELDS, bytes_per_flop, read_layout
from mobius_train.models.unet.temporal import TemporalAttention, TemporalBlock, TemporalConv, transformer_in
from mobius_train.models.units import layer_units

HEAD_FIELDS = ("out_channels", "act_fn", "norm_num_groups", "norm_eps", "conv_out_kernel")


class Ring(ModelMixin, ConfigMixin):
    """The time states t, their fusion with h, and the output head.

        t_0     = transformer_in(h_0)
        t_{i+1} = SA(SC(h_i)) + TA(SC(h_i) + TC(t_i))          (Mobius, Eq. 9)
        t_{i+1} = SC(h_i) + TC(t_i)                            in layers without attention
        output  = conv_out(act(norm(Conv1x1(h ⊕ t))))          (Eq. 6)

    Like h, t has its own bridges (Eq. 5), downsamplers and upsamplers. The weights of TC, TA, transformer_in and the
    samplers have the names of UNet3DConditionModel.

    The configuration entries have the same meaning as in UNet2DConditionModel.

    Attributes:
        memory: how the layers store activations for the backward pass.
        host_bytes: bytes that the last forward pass offloaded to host memory.
    """

    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self,
        out_channels: int,
        down_block_types: tuple[str, ...],
        mid_block_type: str | None,
        up_block_types: tuple[str, ...],
        block_out_channels: tuple[int, ...],
        layers_per_block: int | tuple[int, ...],
        attention_head_dim: int | tuple[int, ...],
        downsample_padding: int,
        act_fn: str,
        norm_num_groups: int,
        norm_eps: float,
        conv_out_kernel: int,
    ) -> None:
        super().__init__()
        layout = read_layout(self.config)
        first = block_out_channels[0]
        self.transformer_in = transformer_in(first, layout.in_heads, norm_num_groups)
        down = [RingBlock(shapes, norm_num_groups) for shapes in layout.down]
        for block, width in zip(down[:-1], block_out_channels, strict=False):
            block.downsamplers.append(Downsample2D(width, use_conv=True, padding=downsample_padding, name="op"))
        up = [RingBlock(shapes, norm_num_groups) for shapes in layout.up]
        for block, width in zip(up[:-1], reversed(block_out_channels), strict=False):
            block.upsamplers.append(Upsample2D(width, use_conv=True))
        self.down_blocks = nn.ModuleList(down)
        self.mid_block = RingBlock(layout.mid, norm_num_groups)
        self.up_blocks = nn.ModuleList(up)

        self.fusion = nn.Conv2d(2 * first, first, kernel_size=1)
        # [I | 0] without bias: a new ring predicts the same as the 2D UNet.
        nn.init.dirac_(self.fusion.weight)
        nn.init.zeros_(cast(nn.Parameter, self.fusion.bias))
        self.conv_norm_out = nn.GroupNorm(norm_num_groups, first, eps=norm_eps)
        self.conv_act = get_activation(act_fn)
        self.conv_out = nn.Conv2d(first, out_channels, conv_out_kernel, padding=(conv_out_kernel - 1) // 2)
        self._layers = layout.layers()
        self.set_memory(LayerMemory())
        self.host_bytes = 0

    def set_memory(self, memory: LayerMemory) -> None:
        """Set how the layers store activations for the backward pass."""
        self.memory = memory
        self.treatments = memory.treatments([bytes_per_flop(layer) for layer in self._layers])

    def layers(self) -> list[LayerShape]:
        """The layers of the ring's UNet."""
        return self._layers

    def units(self) -> list[list[nn.Module]]:
        """The (TC, TA) pairs and the samplers."""
        return layer_units(self)

    def layers_to_compile(self) -> list[nn.Module]:
        """Every TC and TA."""
        return [m for m in self.modules() if isinstance(m, TemporalConv | TemporalAttention)]

    def head_modules(self) -> list[nn.Module]:
        """The fusion with h and the output head."""
        return [self.fusion, self.conv_norm_out, self.conv_act, self.conv_out]

    @property
    def gradient_checkpointing(self) -> bool:
        """diffusers' switch: recompute every layer."""
        return self.memory.gradient_checkpointing

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, enable: bool) -> None:
        self.set_memory(LayerMemory(gradient_checkpointing=enable))

    @classmethod
    def from_unet2d(cls, unet: UNet2DConditionModel) -> Ring:
        """A new ring for `unet`, in float32.

        Samplers and output head start as copies of the UNet's, because t resembles h in scale and meaning. The fusion
        starts as the identity on h, and the other layers start at random.
        """
        names = (*LAYOUT_FIELDS, *HEAD_FIELDS, "downsample_padding")
        ring = cls(**{name: unet.config[name] for name in names})
        state = unet.state_dict()
        copied = {
            name: state[name]
            for name in ring.state_dict()
            if name.startswith(("conv_norm_out.", "conv_out.")) or "samplers." in name
        }
        ring.load_state_dict(copied, strict=False)
        return ring

    def forward(self, features: Iterable[Feature], num_frames: int) -> Tensor:
        """Run in step with the spatial branch, consuming its features one at a time.

        Args:
            features: h_0, then one feature for each layer, as yielded by `walk`, without a graph.
            num_frames: F.

        Returns:
            (N, out_channels, H, W).
        """
        stream, units = _Stream(features, self.dtype), TreatedUnits(self.treatments)
        state = units.run(self._enter, stream.take().hidden, num_frames)
        bridges = [state]
        for block in cast(Sequence[RingBlock], self.down_blocks):
            for conv, attention in block.layers():
                state = _layer(units, conv, attention, state, None, stream.take(), num_frames)
                bridges.append(state)
            for downsampler in block.downsamplers:
                state = downsampler(state)
                bridges.append(state)
        for conv, attention in self.mid_block.layers():
            state = _layer(units, conv, attention, state, None, stream.take(), num_frames)
        for block in cast(Sequence[RingBlock], self.up_blocks):
            for conv, attention in block.layers():
                state = _layer(units, conv, attention, state, bridges.pop(), stream.take(), num_frames)
            for upsampler in block.upsamplers:
                state = upsampler(state, bridges[-1].shape[-2:])
        state = units.run(self._head, stream.hidden, state)
        self.host_bytes = units.host_bytes
        return state

    def _enter(self, hidden: Tensor, num_frames: int) -> Tensor:
        return self.transformer_in(hidden.to(self.dtype), num_frames)

    def _head(self, hidden: Tensor, state: Tensor) -> Tensor:
        fused = self.fusion(torch.cat([hidden, state], dim=1))
        return self.conv_out(self.conv_act(self.conv_norm_out(fused)))


def _layer(
    units: TreatedUnits,
    temporal_conv: nn.Module,
    temporal_attention: nn.Module | None,
    state: Tensor,
    bridge: Tensor | None,
    feature: Feature,
    num_frames: int,
) -> Tensor:
    """t_{i+1} (Eq. 9); a bridge is concatenated to t_i along the channels."""

    def temporal(state: Tensor, bridge: Tensor | None, convolution: Tensor) -> Tensor:
        if bridge is not None:
            state = torch.cat([state, bridge], dim=1)
        state = convolution + temporal_conv(state, num_frames)
        return state if temporal_attention is None else temporal_attention(state, num_frames)

    state = units.run(temporal, state, bridge, feature.convolution)
    # Added outside the recomputed function, so SA(SC(h)) is not kept for the backward pass.
    return state if feature.attention is None else feature.attention + state


class RingBlock(TemporalBlock):
    """The ring's layers for one block of the 2D UNet, with its own sampler if that block has one."""

    def __init__(self, shapes: list[LayerShape], norm_num_groups: int) -> None:
        super().__init__(shapes, norm_num_groups, bridged=True)
        self.downsamplers = nn.ModuleList()
        self.upsamplers = nn.ModuleList()


class _Stream:
    """The spatial features, one at a time, in the ring's dtype or a narrower dtype that a sum with t widens.

    It keeps only the last hidden state, which `walk` holds for its next layer anyway.
    """

    hidden: Tensor

    def __init__(self, features: Iterable[Feature], dtype: torch.dtype) -> None:
        self._features = iter(features)
        self._dtype = dtype

    def take(self) -> Feature:
        convolution, attention = next(self._features)
        feature = Feature(self._fitted(convolution), None if attention is None else self._fitted(attention))
        self.hidden = feature.hidden
        return feature

    def _fitted(self, tensor: Tensor) -> Tensor:
        # A copy widened here would stay in memory until the backward pass of a recomputed layer.
        narrower = tensor.itemsize < self._dtype.itemsize
        return tensor if narrower or torch.is_autocast_enabled(tensor.device.type) else tensor.to(self._dtype)
