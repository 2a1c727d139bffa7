"""The protocol of a backbone: a frozen text-to-image model seen as a stream of features.

Each backbone has a folder of its own; `families.py` lists them, and docs/add-a-backbone.md is the guide.

Legend: N = B·F frames, the frames of a clip one after the other; C channels, H, W latent size.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from mobius_train.conditions import Conditions
from mobius_train.models.frames import Timestep


class Feature(NamedTuple):
    """What one layer computes, both (N, C, H, W)."""

    convolution: Tensor
    """SC(h): what enters the layer's attention."""
    attention: Tensor | None = None
    """SA(SC(h)); None for a layer without attention."""

    @property
    def hidden(self) -> Tensor:
        """h_{i+1}, what the next layer takes."""
        return self.convolution if self.attention is None else self.attention


class LayerShape(NamedTuple):
    """One layer of a backbone: a pair of spatial convolution and attention block, SC and SA."""

    in_channels: int
    """Channels that enter SC, those of a bridge included."""
    channels: int
    """Channels that leave SC and SA."""
    heads: int | None
    """SA's attention heads; None for a layer without attention."""


class Backbone(Protocol):
    """A text-to-image model whose forward pass is a stream of features."""

    @property
    def latent_channels(self) -> int:
        """Channels of the latents that the model denoises; the autoencoder's must be the same."""

    @property
    def condition_widths(self) -> Mapping[str, int]:
        """Size of the last axis of each condition that the model takes, by its name; the text encoder's must agree."""

    def layers(self) -> Sequence[LayerShape]:
        """The layers in the order of the forward pass."""

    def features(self, sample: Tensor, timestep: Timestep, conditions: Conditions) -> Iterator[Feature]:
        """h_0, then one feature for each of `layers`, one at a time.

        Args:
            sample: (N, C, H, W) noisy latents.
            timestep: a number or a tensor of shape (), (1,) or (N,).
            conditions: of N frames.
        """

    def head(self, hidden: Tensor) -> Tensor:
        """The last feature's hidden state → what the model predicts, (N, C, H, W)."""

    def units(self) -> list[list[nn.Module]]:
        """The layers as modules: what is gathered at once where the model is sharded over ranks."""


def without_graph(features: Iterable[Feature]) -> Iterator[Feature]:
    """The same features, computed without a graph.

    Gradients are off only while the stream computes, never while its taker does. A feature is freed as soon as the
    taker drops it.
    """
    stream = iter(features)
    while True:
        with torch.no_grad():
            feature = next(stream, None)
        if feature is None:
            return
        yield feature
        del feature
