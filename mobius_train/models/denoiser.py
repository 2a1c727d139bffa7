"""The interface of a model for training and sampling."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor, nn

from mobius_train.conditions import Conditions
from mobius_train.models.backbone import Backbone, Timestep
from mobius_train.models.recompute import LayerMemory
from mobius_train.sequence.group import SequenceGroup

# Names of `Denoiser.branches`, for plans and measurements.
SPATIAL, RING, TEMPORAL, HEAD = "spatial", "ring", "temporal layers", "fusion and head"


class Denoiser(Protocol):
    """A model that predicts noise or velocity from the latents of clips."""

    @property
    def trained(self) -> nn.Module:
        """The module that an engine wraps and a checkpoint contains."""

    @property
    def frozen(self) -> nn.Module | None:
        """The module outside the engine that never gets a gradient; None if there is none."""

    def frozen_in_graph(self) -> list[nn.Module]:
        """Modules of `frozen` through which gradients flow: those behind the fusion."""

    @property
    def image_model(self) -> nn.Module:
        """The text-to-image model inside."""

    @property
    def backbone(self) -> Backbone:
        """`image_model` as a stream of features."""

    def predict(
        self,
        sample: Tensor,
        timestep: Timestep,
        conditions: Conditions,
        trained: Callable[..., Any] | None = None,
    ) -> Tensor:
        """Predict from noisy latents. The result has the shape of the sample, up to the channels.

        Args:
            sample: (B, C, F, H, W) noisy latents.
            timestep: a number, or a tensor of shape () or (B,).
            conditions: of B clips.
            trained: the engine that wraps `self.trained`, with the same call signature; by default `self.trained`.
        """

    def with_trained(self, module: nn.Module, frozen: nn.Module | None = None) -> nn.Module:
        """The model for sampling and saving, with `module`, a copy of `trained`, in place of `trained`.

        Args:
            frozen: a copy of the frozen part, which replaces it; None keeps the frozen part.
        """

    def set_memory(self, memory: LayerMemory) -> None:
        """Set how the trained layers store activations for the backward pass."""

    @property
    def sequence(self) -> SequenceGroup | None:
        """The ranks that share every batch; None if this rank has its own."""

    def set_sequence(self, sequence: SequenceGroup | None) -> None:
        """Set the ranks that share every batch, which all of them pass to `predict`; None for this rank alone."""

    def units(self) -> list[list[nn.Module]]:
        """The layers of `trained`. An engine that shards it gathers one unit at a time."""

    def layers_to_compile(self) -> list[nn.Module]:
        """Modules of `trained` to compile separately; empty if compilation does not pay."""

    def branches(self) -> Mapping[str, Sequence[nn.Module]]:
        """Modules of each branch, including their submodules. A module in two branches belongs to the later one."""


def branch_of_modules(denoiser: Denoiser) -> dict[nn.Module, str]:
    """The branch of every module in `denoiser.branches()`."""
    branches = denoiser.branches().items()
    return {inner: name for name, modules in branches for module in modules for inner in module.modules()}
