"""A layer of a 2D UNet with temporal layers inside, as in serial models and behind a ring's fusion.

Legend: SC, SA spatial convolution and attention blocks; TC, TA temporal ones.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from mobius_train.models.backbone import Feature
from mobius_train.models.unet.backbone import spatial_layer
from mobius_train.sequence.split import Split

# (N, C, H, W) and F → (N, C, H, W)
Temporal = Callable[[Tensor, int], Tensor]


def serial_layer(
    temporal_conv: Temporal | None,
    temporal_attention: Temporal | None,
    num_frames: int,
    split: Split,
    resnet: nn.Module,
    attention: nn.Module | None,
    hidden: Tensor,
    bridge: Tensor | None,
    time_embedding: Tensor,
    text: Tensor,
) -> Feature:
    """`spatial_layer` with TC after SC and TA after SA (Mobius, Eq. 7); each may be absent.

    Args:
        split: how the ranks of a sequence group share the frames.
    """

    def convolve(hidden: Tensor, time_embedding: Tensor) -> Tensor:
        convolved = resnet(hidden, time_embedding)
        return convolved if temporal_conv is None else on_positions(temporal_conv, split)(convolved, num_frames)

    feature = spatial_layer(convolve, attention, hidden, bridge, time_embedding, text)
    if feature.attention is None or temporal_attention is None:
        return feature
    return feature._replace(attention=on_positions(temporal_attention, split)(feature.attention, num_frames))


def on_positions(temporal: Temporal, split: Split) -> Temporal:
    """A temporal layer between spatial layers that have this rank's frames: (N_r, C, H, W) and F → (N_r, C, H, W)."""

    def run(hidden: Tensor, num_frames: int) -> Tensor:
        return split.frames(temporal(split.positions(hidden), num_frames), (hidden.shape[-2], hidden.shape[-1]))

    return run
