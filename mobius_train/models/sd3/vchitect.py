"""Vchitect's parallel block (Vchitect-2.0, arXiv 2501.08453): two attentions beside the joint attention of SD3's block.

    spatial   A = attention over the S + L tokens of a frame:      q, k, v = [W_q x ; W_q^c c], …
    temporal  T = attention over the F frames of each token:       q, k, v = [W'_q x ; W_q^c c], …, q and k rotated by
              the frame's number; T = 0 for a single frame
    cross     X = attention of all F·(S + L) tokens of a clip,     q = [W''_q x ; W_q^c c], to the L text tokens of its
              frame 0: k = W_k^c c, v = W_v^c c
    out_x = W_o (scale·A + W_X X)_x + W_T T_x                      out_c = W_o^c (scale·A + W_X X)_c + W_T^c T_c

The seven projections with a prime, T or X are new, with the names of the released checkpoint; the others are SD3's.
W_X, W_T and W_T^c start at zero. The text's queries, keys and values are shared by the three attentions.

Legend: B clips, F frames, N = B·F frames, ordered clip by clip; S image tokens of a frame, L text tokens, P = S + L; D
width; x (N, S, D) and c (N, L, D) the image state and the text state after AdaLN.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple, Self

import torch
from diffusers import ConfigMixin, ModelMixin, SD3Transformer2DModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from mobius_train.errors import MobiusError
from mobius_train.models.attention import AttentionBackend, JointProcessor, attend
from mobius_train.models.rotary import rotate_by_frame
from mobius_train.sequence.split import WHOLE, Split

# Base of the rotation's frequencies, as released.
THETA = 1e6


class Projected(NamedTuple):
    """Query, key and value of the text tokens, each (N, L, heads, size)."""

    query: Tensor
    key: Tensor
    value: Tensor


class Added(NamedTuple):
    """What the two branches add to a block's attention."""

    cross: Tensor
    """W_X X, (N, P, D): enters SD3's output projections together with A."""
    image: Tensor | None
    """W_T T_x, (N, S, D); None for single frames."""
    text: Tensor | None
    """W_T^c T_c, (N, L, D); None for single frames, and in the last block, whose text output is not used."""


class VchitectBranches(nn.Module):
    """The temporal branch and the cross branch of one block.

    Args:
        channels: D.
        heads: attention heads, which divide D.
        last: the block is SD3's last one. It has no W_T^c, which could not change the prediction.
        spatial_scale: factor of A.
    """

    def __init__(self, channels: int, heads: int, last: bool, spatial_scale: float) -> None:
        super().__init__()
        linear = partial(nn.Linear, channels, channels)
        self.heads, self.spatial_scale = heads, spatial_scale
        self.to_q_temp, self.to_k_temp, self.to_v_temp, self.to_q_cross = linear(), linear(), linear(), linear()
        self.to_out_temporal, self.to_out_context = linear(), linear()
        self.to_add_out_temporal = None if last else linear()
        for output in (self.to_out_temporal, self.to_out_context, self.to_add_out_temporal):
            if output is not None:
                nn.init.zeros_(output.weight)
                nn.init.zeros_(output.bias)

    def forward(
        self, image: Tensor, text: Projected, num_frames: int, backend: AttentionBackend, split: Split = WHOLE
    ) -> Added:
        """x (N, S, D) and the projected text of N frames → what the branches add.

        With a sequence group, both belong to this rank's frames, N_r.
        """
        cross = self.to_out_context(self._cross(image, text, num_frames, backend, split))
        if num_frames == 1:
            return Added(cross, None, None)
        temporal = self._temporal(image, text, num_frames, backend, split)
        of_image, of_text = temporal.split([image.shape[1], text.query.shape[1]], dim=1)
        context = None if self.to_add_out_temporal is None else self.to_add_out_temporal(of_text)
        return Added(cross, self.to_out_temporal(of_image), context)

    def _cross(
        self, image: Tensor, text: Projected, num_frames: int, backend: AttentionBackend, split: Split
    ) -> Tensor:
        """X, (N, P, D)."""
        query = self._joined(self.to_q_cross, image, text.query)
        # The text of each clip's own frame 0. The released code takes that of the first clip for the whole batch.
        key, value = (split.first_frames(each, num_frames) for each in (text.key, text.value))
        if split.group is None:
            clips = query.unflatten(0, (-1, num_frames)).flatten(1, 2)
            return attend(backend, clips, key, value).reshape(query.shape).flatten(-2)
        # A rank's frames are no whole clips.
        of_frames = (split.own(each.repeat_interleave(num_frames, 0)) for each in (key, value))
        return attend(backend, query, *of_frames).flatten(-2)

    def _temporal(
        self, image: Tensor, text: Projected, num_frames: int, backend: AttentionBackend, split: Split
    ) -> Tensor:
        """T, (N, P, D)."""
        projections = (self.to_q_temp, self.to_k_temp, self.to_v_temp)
        joined = [self._joined(project, image, own) for project, own in zip(projections, text, strict=True)]
        tokens = joined[0].shape[1]
        states = [split.token_positions(each.flatten(-2)) for each in joined]
        # (N, P, D) → (B·P, F, heads, size)
        query, key, value = (
            each.unflatten(-1, (self.heads, -1)).unflatten(0, (-1, num_frames)).transpose(1, 2).flatten(0, 1)
            for each in states
        )
        result = attend(backend, rotate_by_frame(query, THETA), rotate_by_frame(key, THETA), value)
        places = result.unflatten(0, (-1, states[0].shape[1]))
        return split.token_frames(places.transpose(1, 2).flatten(0, 1).flatten(-2), tokens)

    def _joined(self, project: nn.Module, image: Tensor, of_text: Tensor) -> Tensor:
        """The image's projection and the text's, (N, P, heads, size)."""
        return torch.cat([project(image).unflatten(-1, (self.heads, -1)), of_text], dim=1)


class VchitectLayers(ModelMixin, ConfigMixin):
    """The branches of all blocks.

    Args:
        num_layers, num_attention_heads, attention_head_dim: as in the configuration of SD3Transformer2DModel.
        spatial_scale: factor of A. 1.1 in the released model; only 1 starts as SD3.
    """

    @register_to_config
    def __init__(
        self, num_layers: int, num_attention_heads: int, attention_head_dim: int, spatial_scale: float = 1.0
    ) -> None:
        super().__init__()
        channels = num_attention_heads * attention_head_dim
        self.blocks = nn.ModuleList(
            [
                VchitectBranches(channels, num_attention_heads, index == num_layers - 1, spatial_scale)
                for index in range(num_layers)
            ]
        )

    @classmethod
    def of(cls, transformer: SD3Transformer2DModel, spatial_scale: float = 1.0) -> Self:
        """New branches for `transformer`, in float32.

        Raises:
            MobiusError: Vchitect's block is not defined for this transformer.
        """
        check_vchitect(transformer)
        return cls(**_shape(transformer), spatial_scale=spatial_scale)

    def check_fit(self, transformer: SD3Transformer2DModel) -> None:
        """
        Raises:
            MobiusError: these are the branches of another transformer.
        """
        check_vchitect(transformer)
        differing = [
            f"{name} is {self.config[name]} here, {value} there"
            for name, value in _shape(transformer).items()
            if self.config[name] != value
        ]
        if differing:
            raise MobiusError(
                f"these branches do not fit this {type(transformer).__name__}: {', '.join(differing)}. Make new ones"
                " from the image model"
            )


SHAPE = ("num_layers", "num_attention_heads", "attention_head_dim")


def _shape(transformer: SD3Transformer2DModel) -> dict[str, int]:
    return {name: transformer.config[name] for name in SHAPE}


def check_vchitect(transformer: SD3Transformer2DModel) -> None:
    """Reject transformers for which Vchitect's block is not defined.

    Raises:
        MobiusError: lists every unsupported configuration entry.
    """
    config, problems = transformer.config, []
    if config.qk_norm is not None:
        problems.append(f"qk_norm={config.qk_norm!r}: the block's attentions share keys that are not normalised")
    if config.dual_attention_layers:
        problems.append(f"dual_attention_layers={config.dual_attention_layers}: the block has one spatial attention")
    if config.attention_head_dim % 2:
        problems.append(f"attention_head_dim={config.attention_head_dim}: frames rotate pairs of channels")
    if problems:
        raise MobiusError(
            f"this {type(transformer).__name__} cannot have Vchitect's block:\n  - "
            + "\n  - ".join(problems)
            + "\nUse mode=parallel, or a transformer as that of Stable Diffusion 3 medium"
        )


class VchitectProcessor(JointProcessor):
    """Attention processor of an SD3 block: joint attention, and the branches that a call brings.

    A call without branches is the image model's. Since each call brings its branches, the transformer keeps its weights
    and their names, and several models can share it.
    """

    def __call__(  # type: ignore[override]
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: None = None,
        branches: Mapping[Attention, VchitectBranches] | None = None,
        num_frames: int = 1,
        split: Split = WHOLE,
    ) -> Any:
        """x (N, S, D) and c (N, L, D) → the outputs of both, of the same shapes.

        Args:
            branches: those of each block, by the block's attention.
            num_frames: F.
            split: how the ranks of a sequence group share the frames.
        """
        if branches is None:
            return super().__call__(attn, hidden_states, encoder_hidden_states)
        image, context = hidden_states, encoder_hidden_states
        projections = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
        text = Projected(*(project(context).unflatten(-1, (attn.heads, -1)) for project in projections))
        own = self.projected(attn, image, image)
        joint = attend(self.backend, *(torch.cat(pair, dim=1) for pair in zip(own, text, strict=True))).flatten(-2)
        branch = branches[attn]
        added = branch(image, text, num_frames, self.backend, split)
        joint = torch.add(added.cross, joint, alpha=branch.spatial_scale)
        of_image, of_text = joint.split([image.shape[1], context.shape[1]], dim=1)
        of_image = self.output(attn, of_image.unflatten(-1, (attn.heads, -1)))
        if not attn.context_pre_only:
            of_text = attn.to_add_out(of_text)
        if added.image is not None:
            of_image = of_image + added.image
        if added.text is not None:
            of_text = of_text + added.text
        return of_image, of_text
