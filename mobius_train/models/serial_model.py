"""What the serial models of all backbones share: the whole model is trained, or its temporal part."""

from __future__ import annotations

from typing import Self

from torch import nn

from mobius_train.models.composite import Composite
from mobius_train.sequence.group import SequenceGroup
from mobius_train.sequence.group_norm import share_norms


class SerialModel(Composite):
    """A text-to-video denoiser with temporal layers inside the image model, so that all of it is in the graph.

    The subclass sets the classes of its parts, computes the prediction, and implements the rest of Denoiser.
    """

    sequence: SequenceGroup | None = None

    @property
    def image_model(self) -> nn.Module:
        return self.get_submodule(self.image_part)

    @property
    def trained(self) -> nn.Module:
        return self

    @property
    def frozen(self) -> None:
        return None

    def frozen_in_graph(self) -> list[nn.Module]:
        return []

    def layers_to_compile(self) -> list[nn.Module]:
        return []

    def with_trained(self, module: nn.Module, frozen: nn.Module | None = None) -> nn.Module:
        """See Denoiser."""
        return module

    def set_sequence(self, sequence: SequenceGroup | None) -> None:
        """See Denoiser. Spatial layers run by frames, temporal layers by positions."""
        self.sequence = sequence
        share_norms(self, sequence)

    def train(self, mode: bool = True) -> Self:
        """As for any module, but a frozen image model stays in evaluation mode: dropout there would change it."""
        super().train(mode)
        if not any(parameter.requires_grad for parameter in self.image_model.parameters()):
            self.image_model.eval()
        return self
