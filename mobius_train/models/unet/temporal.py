"""The temporal blocks TC and TA of diffusers' UNet3DConditionModel, with the same weight names.

Legend: N = B·F frames, ordered clip by clip; C channels, H, W latent size.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import zip_longest
from typing import cast

from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import TemporalConvLayer
from diffusers.models.transformers.transformer_temporal import TransformerTemporalModel
from torch import Tensor, nn
from torch.nn import functional as F

from mobius_train.models.attention import TemporalProcessor
from mobius_train.models.backbone import LayerShape
from mobius_train.sequence.group_norm import SharedGroupNorm


class FrameConv(nn.Conv3d):
    """A (3, 1, 1) convolution over frames, with the weights of a Conv3d, (out, in, 3, 1, 1).

    Computed as a (3, 1) Conv2d over (F, H·W), which is the same sum. As a Conv3d this kernel can miss the fast path
    (CPU in float32; bfloat16 in some cuDNN releases, pytorch#166643).
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, kernel_size=(3, 1, 1), padding=(1, 0, 0))

    def forward(self, input: Tensor) -> Tensor:
        """(B, in, F, H, W) → (B, out, F, H, W)."""
        flat = F.conv2d(input.flatten(-2), self.weight.squeeze(-1), self.bias, padding=(1, 0))
        return flat.unflatten(-1, input.shape[-2:])


class TemporalConv(TemporalConvLayer):
    """TC: four (3, 1, 1) convolutions with a residual, preceded by a projection if the channels change.

    Unlike diffusers' layer, its last convolution is not initialised with zeros, and it has no dropout.
    """

    def __init__(self, in_channels: int, channels: int, norm_num_groups: int) -> None:
        super().__init__(channels, norm_num_groups=norm_num_groups)
        for convolutions in (self.conv1, self.conv2, self.conv3, self.conv4):
            convolutions[0] = SharedGroupNorm(norm_num_groups, channels)
            convolutions[-1] = FrameConv(channels, channels)
        self.projection: nn.Module | None = None
        if in_channels != channels:
            self.projection = nn.Sequential(
                SharedGroupNorm(norm_num_groups, in_channels), nn.SiLU(), FrameConv(in_channels, channels)
            )

    def forward(self, hidden_states: Tensor, num_frames: int = 1) -> Tensor:
        """(N, in_channels, H, W) → (N, channels, H, W)."""
        if self.projection is not None:
            clips = hidden_states.unflatten(0, (-1, num_frames)).transpose(1, 2)
            hidden_states = self.projection(clips).transpose(1, 2).flatten(0, 1)
        return super().forward(hidden_states, num_frames=num_frames)

    def zero_output(self) -> None:
        """Turn the block into the identity, the initial state in a serial model."""
        last = cast(FrameConv, self.conv4[-1])
        nn.init.zeros_(last.weight)
        nn.init.zeros_(cast(nn.Parameter, last.bias))


class TemporalAttention(TransformerTemporalModel):
    """TA: two self-attentions over the frames of each position, a feed-forward layer, and a residual."""

    def __init__(self, **shape: int) -> None:
        """Arguments as for TransformerTemporalModel."""
        super().__init__(**shape)
        norm = cast(nn.GroupNorm, self.get_submodule("norm"))
        self.norm = SharedGroupNorm(norm.num_groups, norm.num_channels, eps=norm.eps)
        for module in self.modules():
            if isinstance(module, Attention):
                module.set_processor(TemporalProcessor("sdpa"))

    def forward(self, hidden_states: Tensor, num_frames: int = 1) -> Tensor:
        """(N, C, H, W) → (N, C, H, W)."""
        return super().forward(hidden_states, num_frames=num_frames).sample

    def zero_output(self) -> None:
        """Turn the block into the identity, the initial state in a serial model."""
        nn.init.zeros_(self.proj_out.weight)
        nn.init.zeros_(self.proj_out.bias)


def temporal_attention(channels: int, heads: int, norm_num_groups: int) -> TemporalAttention:
    """TA with the heads of the corresponding spatial attention."""
    return TemporalAttention(
        num_attention_heads=heads,
        attention_head_dim=channels // heads,
        in_channels=channels,
        norm_num_groups=norm_num_groups,
    )


def transformer_in(channels: int, heads: int, norm_num_groups: int) -> TemporalAttention:
    """The temporal transformer after conv_in: always 8 heads, each as wide as the first level's heads."""
    return TemporalAttention(
        num_attention_heads=8,
        attention_head_dim=channels // heads,
        in_channels=channels,
        norm_num_groups=norm_num_groups,
    )


class TemporalBlock(nn.Module):
    """Container for the temporal layers of one block of the 2D UNet, with the names of UNet3DConditionModel.

    Args:
        shapes: one for each layer.
        norm_num_groups: groups of all group normalisations.
        bridged: TC has the input channels of SC, including bridges, instead of its output channels.
    """

    def __init__(self, shapes: list[LayerShape], norm_num_groups: int, bridged: bool) -> None:
        super().__init__()
        self.temp_convs = nn.ModuleList()
        self.temp_attentions = nn.ModuleList()
        for shape in shapes:
            entering = shape.in_channels if bridged else shape.channels
            self.temp_convs.append(TemporalConv(entering, shape.channels, norm_num_groups))
            if shape.heads is not None:
                self.temp_attentions.append(temporal_attention(shape.channels, shape.heads, norm_num_groups))

    def zero_outputs(self) -> None:
        """Turn every layer into the identity."""
        for layer in (*self.temp_convs, *self.temp_attentions):
            cast(TemporalConv | TemporalAttention, layer).zero_output()

    def layers(self) -> Iterator[tuple[nn.Module, nn.Module | None]]:
        """The (TC, TA) pairs; TA is None if the spatial layer has no attention."""
        return zip_longest(self.temp_convs, self.temp_attentions)
