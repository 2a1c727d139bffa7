"""The backbone protocol: a frozen text-to-image model as a stream of features.

Each backbone has its own folder and is listed in `families.py`. docs/add-a-backbone.md is the guide.

Legend: B clips, F frames; N = B·F frames, ordered clip by clip; C channels, H, W latent size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn

from mobius_train.conditions import Conditions
from mobius_train.errors import MobiusError
from mobius_train.sequence.split import Split

Timestep = Tensor | float | int
# Runs the blocks behind the fusion: the hidden state after the fusion, and arguments on which a backbone and its ring
# agree → the input of the output head.
Tail = Callable[..., Any]
# What a backbone's layers hand to its ring: `Feature` for a UNet, `tokens.state.Tokens` for a transformer.
FeatureT = TypeVar("FeatureT", covariant=True)


class Feature(NamedTuple):
    """The outputs of one layer of a convolutional backbone, both (N, C, H, W)."""

    convolution: Tensor
    """SC(h), the input of the layer's attention."""
    attention: Tensor | None = None
    """SA(SC(h)); None for a layer without attention."""

    @property
    def hidden(self) -> Tensor:
        """h_{i+1}, the input of the next layer."""
        return self.convolution if self.attention is None else self.attention


class LayerShape(NamedTuple):
    """One layer of a convolutional backbone: a spatial convolution block SC and a spatial attention block SA."""

    in_channels: int
    """Input channels of SC, including those of a bridge."""
    channels: int
    """Output channels of SC and SA."""
    heads: int | None
    """SA's attention heads; None for a layer without attention."""


class Backbone(Protocol[FeatureT]):
    """A text-to-image model whose forward pass yields a stream of features."""

    @property
    def latent_channels(self) -> int:
        """Channels of the latents; must equal the autoencoder's."""

    @property
    def condition_widths(self) -> Mapping[str, int]:
        """Size of the last axis of each condition, by condition name; must equal the text encoder's.

        0 for a condition with one number for each token of the text.
        """

    def layers(self) -> Sequence[tuple[Any, ...]]:
        """The shapes of the layers in the order of the forward pass; a ring fits a backbone with equal shapes."""

    def features(self, sample: Tensor, timestep: Timestep, conditions: Conditions) -> Iterator[FeatureT]:
        """Yield h_0, then one feature for each of `layers`.

        Args:
            sample: (N, C, H, W) noisy latents.
            timestep: a number or a tensor of shape (), (1,) or (N,).
            conditions: of N frames.
        """

    def head(self, hidden: Any) -> Tensor:
        """The last hidden state → prediction, (N, C, H, W)."""

    def units(self) -> list[list[nn.Module]]:
        """The layers as modules. A sharded model gathers one unit at a time."""


class DivisibleBackbone(Backbone[FeatureT], Protocol[FeatureT]):
    """A backbone whose last blocks can run behind a ring's fusion."""

    def split(
        self, sample: Tensor, timestep: Timestep, conditions: Conditions, depth: int
    ) -> tuple[Iterator[FeatureT], Tail]:
        """As `features`, but the last `depth` blocks run separately.

        Args:
            depth: at least 1.

        Returns:
            h_0, one feature for each layer before these blocks, and a feature with their input; and the blocks.
        """

    def behind(self, depth: int) -> list[nn.Module]:
        """The modules of the last `depth` blocks."""


def without_graph(features: Iterable[FeatureT]) -> Iterator[FeatureT]:
    """Compute the features without a graph.

    Gradients are off only inside the stream, not in its consumer. A feature is freed as soon as the consumer drops it.
    """
    stream = iter(features)
    while True:
        with torch.no_grad():
            feature = next(stream, None)
        if feature is None:
            return
        yield feature
        del feature


def fold_frames(sample: Tensor) -> Tensor:
    """(B, C, F, H, W) → (B·F, C, H, W).

    Raises:
        MobiusError: the tensor does not have five axes.
    """
    if sample.ndim != 5:
        raise MobiusError(
            f"latents must be (batch, channels, frames, height, width), got {tuple(sample.shape)}."
            " Give a still image a frame axis of size 1: sample.unsqueeze(2)"
        )
    return sample.permute(0, 2, 1, 3, 4).flatten(0, 1)


def own_frames(
    split: Split, sample: Tensor, timestep: Timestep, conditions: Conditions
) -> tuple[Tensor, Timestep, Conditions]:
    """What a backbone takes for this rank's frames of a batch.

    Args:
        sample: (B, C, F, H, W).
        timestep, conditions: see `fold_conditions`.

    Returns:
        (N_r, C, H, W); the timestep, (N_r,) or a single number; and the conditions of N_r frames.
    """
    timestep, conditions = fold_conditions(timestep, conditions, sample.shape[2])
    if torch.is_tensor(timestep) and timestep.ndim > 0:
        timestep = split.own(timestep)
    return split.own(fold_frames(sample)), timestep, conditions.map(split.own)


def unfold_frames(frames: Tensor, num_frames: int) -> Tensor:
    """(B·F, C, H, W) → (B, C, F, H, W)."""
    return frames.unflatten(0, (-1, num_frames)).permute(0, 2, 1, 3, 4)


def fold_conditions(timestep: Timestep, conditions: Conditions, num_frames: int) -> tuple[Timestep, Conditions]:
    """Repeat a clip's conditions for each of its frames.

    Args:
        timestep: a number, or a tensor of shape (), (1,) or (B,).
        conditions: of B clips.

    Returns:
        The timestep, (B·F,) or a single number, and the conditions of B·F frames.
    """
    if torch.is_tensor(timestep) and timestep.ndim > 0:
        timestep = timestep.expand(len(conditions)).repeat_interleave(num_frames)
    return timestep, conditions.repeat_frames(num_frames)
