"""The parallel model of any backbone: an unmodified, frozen text-to-image model with a trainable ring beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from inspect import signature
from typing import Any, ClassVar, Protocol, Self, cast

from diffusers.models.unets.unet_3d_condition import UNet3DConditionOutput
from torch import Tensor, nn

from mobius_train.conditions import Conditions
from mobius_train.errors import MobiusError
from mobius_train.models.added_conditions import check_conditions, given_conditions
from mobius_train.models.ahead import computed
from mobius_train.models.backbone import (
    Backbone,
    DivisibleBackbone,
    Tail,
    Timestep,
    own_frames,
    unfold_frames,
    without_graph,
)
from mobius_train.models.composite import Composite
from mobius_train.models.denoiser import HEAD, RING, SPATIAL
from mobius_train.models.recompute import LayerMemory
from mobius_train.ring_shape import RingShape
from mobius_train.sequence.group import SequenceGroup
from mobius_train.sequence.group_norm import share_norms
from mobius_train.sequence.split import Split


class RingModule(Protocol):
    """The interface of a ring, an nn.Module called as `ring(features, num_frames=F)`."""

    def __call__(self, features: Iterable[Any], num_frames: int, tail: Tail = ..., split: Split = ...) -> Tensor:
        """Predict this rank's frames from the frozen model's features.

        Args:
            features: without a graph. See `Backbone.features`, or `Backbone.split` if there is a `fusion_depth`.
            tail: the blocks behind the fusion; given if there is a `fusion_depth`.
            split: how the ranks of a sequence group share the frames; given only with such a group. Optional: without
                this argument a ring cannot be shared.

        Returns:
            (N_r, C, H, W).
        """

    def layers(self) -> Sequence[tuple[Any, ...]]:
        """The shapes of the layers of the ring's backbone."""

    @property
    def shape(self) -> RingShape:
        """The ring's width, and where it is fused with the frozen model."""

    def set_memory(self, memory: LayerMemory) -> None:
        """See Denoiser."""

    def units(self) -> list[list[nn.Module]]:
        """See Denoiser."""

    def layers_to_compile(self) -> list[nn.Module]:
        """See Denoiser."""

    def head_modules(self) -> list[nn.Module]:
        """The fusion with h and the output head."""


class ParallelModel(Composite):
    """Text-to-video denoiser with temporal layers in parallel to the spatial layers (Mobius, arXiv 2407.06617).

    A subclass sets the classes of its parts, and passes its backbone to the constructor.

    Raises:
        MobiusError: the ring belongs to another backbone.

    Attributes:
        spatial: the unmodified text-to-image model: frozen, always in evaluation mode. It is in no graph, except the
            blocks behind the fusion.
        ring: the trained branch.
    """

    image_part: ClassVar = "spatial"
    _supports_gradient_checkpointing = True

    def __init__(self, spatial: nn.Module, ring: nn.Module, backbone: Backbone) -> None:
        super().__init__()
        if cast(RingModule, ring).layers() != backbone.layers():
            raise MobiusError(
                f"this ring does not fit this {type(spatial).__name__}: their layers differ in number or shape."
                f" Make a new ring from the image model with {type(self).__name__}"
            )
        self.spatial = spatial.requires_grad_(False).eval()
        self.ring = ring
        self.backbone = backbone
        self.sequence: SequenceGroup | None = None
        self.register_backbone_config(cast(Any, spatial).config)

    @property
    def trained(self) -> nn.Module:
        return self.ring

    @property
    def frozen(self) -> nn.Module:
        return self.spatial

    @property
    def image_model(self) -> nn.Module:
        return self.spatial

    @property
    def ring_shape(self) -> RingShape:
        return cast(RingModule, self.ring).shape

    def frozen_in_graph(self) -> list[nn.Module]:
        shape = self.ring_shape
        # Trained copies of these blocks belong to the ring.
        return self._divisible().behind(shape.fusion_depth) if shape.fusion_depth and not shape.trained_tail else []

    def _divisible(self) -> DivisibleBackbone:
        # A ring refuses a fusion depth that its backbone does not support.
        return cast(DivisibleBackbone, self.backbone)

    def train(self, mode: bool = True) -> Self:
        """Set the ring's mode; the spatial branch stays in evaluation mode."""
        super().train(mode)
        self.spatial.eval()
        return self

    def predict(
        self,
        sample: Tensor,
        timestep: Timestep,
        conditions: Conditions,
        trained: Callable[..., Any] | None = None,
    ) -> Tensor:
        """See Denoiser. `trained` has the ring's call signature.

        Raises:
            MobiusError: a condition is missing, or has another shape.
        """
        return self.begin(sample, timestep, conditions)(trained)

    def begin(
        self, sample: Tensor, timestep: Timestep, conditions: Conditions, ahead: bool = False
    ) -> Callable[[Callable[..., Any] | None], Tensor]:
        """Begin a prediction with the frozen branch. The result ends it: it takes `trained`; call it once.

        Args:
            ahead: compute all features now. Otherwise the ring asks for one at a time.

        Raises:
            MobiusError: a condition is missing, or has another shape.
        """
        check_conditions(conditions, self.backbone.condition_widths, len(sample))
        clips, _, num_frames, *_ = sample.shape
        split = Split(self.sequence, clips * num_frames)
        frames = own_frames(split, sample, timestep, conditions)
        behind: dict[str, Any] = {} if self.sequence is None else {"split": split}
        if self.ring_shape.fusion_depth:
            features, behind["tail"] = self._divisible().split(*frames, self.ring_shape.fusion_depth)
        else:
            features = self.backbone.features(*frames)
        stream = without_graph(features)
        if ahead:
            stream = computed(stream, only_last=not self.ring_shape.ring_width)

        def end(trained: Callable[..., Any] | None) -> Tensor:
            ring = self.ring if trained is None else trained
            return unfold_frames(split.whole(ring(stream, num_frames=num_frames, **behind)), num_frames)

        return end

    def with_trained(self, module: nn.Module, frozen: nn.Module | None = None) -> Self:
        """See Denoiser. The result shares the spatial branch unless `frozen` is given."""
        kind: Any = type(self)
        model = cast(Self, kind(frozen or self.spatial, module))
        model.set_sequence(self.sequence)
        return model

    def set_memory(self, memory: LayerMemory) -> None:
        cast(RingModule, self.ring).set_memory(memory)

    def set_sequence(self, sequence: SequenceGroup | None) -> None:
        """See Denoiser. The frozen model runs by frames, the ring by positions.

        Raises:
            MobiusError: the ring does not support it.
        """
        if sequence is not None and "split" not in signature(self.ring.forward).parameters:
            raise MobiusError(
                f"{type(self.ring).__name__} cannot be shared by ranks: its forward has no argument `split`. Use"
                " sequence_parallel_size=1"
            )
        self.sequence = sequence
        share_norms(self.ring, sequence)

    def units(self) -> list[list[nn.Module]]:
        return cast(RingModule, self.ring).units()

    def layers_to_compile(self) -> list[nn.Module]:
        return cast(RingModule, self.ring).layers_to_compile()

    def branches(self) -> Mapping[str, Sequence[nn.Module]]:
        return {SPATIAL: [self.spatial], RING: [self.ring], HEAD: cast(RingModule, self.ring).head_modules()}

    def forward(
        self,
        sample: Tensor,
        timestep: Timestep,
        encoder_hidden_states: Tensor,
        return_dict: bool = True,
        *,
        added_cond_kwargs: Mapping[str, Tensor] | None = None,
        encoder_attention_mask: Tensor | None = None,
    ) -> UNet3DConditionOutput | tuple[Tensor]:
        """As UNet3DConditionModel: (B, C, F, H, W), () or (B,), (B, L, D) → `.sample` (B, C, F, H, W).

        `added_cond_kwargs` are those of UNet2DConditionModel, and so is `encoder_attention_mask`, (B, L); see
        `given_conditions`.
        """
        conditions = given_conditions(encoder_hidden_states, added_cond_kwargs, encoder_attention_mask)
        prediction = self.predict(sample, timestep, conditions)
        return UNet3DConditionOutput(sample=prediction) if return_dict else (prediction,)
