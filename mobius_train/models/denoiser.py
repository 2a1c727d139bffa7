"""What training and sampling need to know of a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor, nn

from mobius_train.models.frames import Timestep


class Denoiser(Protocol):
    """A model that predicts noise or velocity on the latents of clips."""

    @property
    def trained(self) -> nn.Module:
        """What an engine wraps, and a checkpoint holds."""

    @property
    def frozen(self) -> nn.Module | None:
        """What stays outside of the engine and never gets a gradient; None where there is nothing such."""

    def predict(
        self,
        sample: Tensor,
        timestep: Timestep,
        encoder_hidden_states: Tensor,
        trained: Callable[..., Any] | None = None,
    ) -> Tensor:
        """The prediction, shaped as the sample but for its channels.

        Args:
            sample: (B, C, F, H, W) noisy latents.
            timestep: a number, or a tensor of shape () or (B,).
            encoder_hidden_states: (B, L, D) text embeddings.
            trained: the engine that wraps `self.trained`, called as that is; by default `self.trained`.
        """

    def with_trained(self, module: nn.Module, frozen: nn.Module | None = None) -> nn.Module:
        """The model to sample from and to save, with `module`, a copy of `trained`, in the place of that.

        Args:
            frozen: where there is a frozen part, a copy of it to take its place too.
        """
