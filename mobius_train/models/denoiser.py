"""What training and sampling need to know of a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor, nn

from mobius_train.conditions import Conditions
from mobius_train.models.backbone import Backbone
from mobius_train.models.frames import Timestep
from mobius_train.models.recompute import LayerMemory

# Names of `Denoiser.branches`, for plans and measurements.
SPATIAL, RING, TEMPORAL, HEAD = "spatial", "ring", "temporal layers", "fusion and head"


class Denoiser(Protocol):
    """A model that predicts noise or velocity on the latents of clips."""

    @property
    def trained(self) -> nn.Module:
        """What an engine wraps, and a checkpoint holds."""

    @property
    def frozen(self) -> nn.Module | None:
        """What stays outside of the engine and never gets a gradient; None where there is nothing such."""

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
        """The prediction, shaped as the sample but for its channels.

        Args:
            sample: (B, C, F, H, W) noisy latents.
            timestep: a number, or a tensor of shape () or (B,).
            conditions: of B clips.
            trained: the engine that wraps `self.trained`, called as that is; by default `self.trained`.
        """

    def with_trained(self, module: nn.Module, frozen: nn.Module | None = None) -> nn.Module:
        """The model to sample from and to save, with `module`, a copy of `trained`, in the place of that.

        Args:
            frozen: where there is a frozen part, a copy of it to take its place too.
        """

    def set_memory(self, memory: LayerMemory) -> None:
        """Choose what the trained layers keep for the backward pass."""

    def units(self) -> list[list[nn.Module]]:
        """The layers of `trained`: what an engine that shards it gathers at once."""

    def layers_to_compile(self) -> list[nn.Module]:
        """Modules of `trained` that torch.compile takes one by one; empty where none is worth it."""

    def branches(self) -> Mapping[str, Sequence[nn.Module]]:
        """Modules by branch, each with all that is inside it; a later branch takes modules out of an earlier one."""
