"""diffusers' SD3Transformer2DModel as a backbone: Stable Diffusion 3 and 3.5.

Legend: N = B·F frames, S image tokens of a frame, D width, p patch size, C latent channels.
"""

from __future__ import annotations

from typing import Any

from diffusers import SD3Transformer2DModel
from torch import Tensor, nn

from mobius_train.conditions import POOLED, TEXT, Conditions
from mobius_train.models.sd3.check import check_sd3
from mobius_train.models.tokens.backbone import TokenBackbone
from mobius_train.models.tokens.grid import token_grid
from mobius_train.models.tokens.state import Tokens, TokenShape, unpatchify


def output_patches(part: Any, hidden: Tensor, time: Tensor) -> Tensor:
    """Last tokens (N, S, D) and time (N, D) → patches (N, S, p·p·C).

    Args:
        part: a model or a ring, with `norm_out` and `proj_out`.
    """
    return part.proj_out(part.norm_out(hidden, time))


class SD3Backbone(TokenBackbone):
    """See TokenBackbone.

    Raises:
        MobiusError: it is another transformer, or its configuration is not supported.
    """

    def __init__(self, model: SD3Transformer2DModel) -> None:
        check_sd3(model)
        shape = TokenShape(model.inner_dim, int(model.config.num_attention_heads))
        super().__init__(model, model.transformer_blocks, shape)

    @property
    def condition_widths(self) -> dict[str, int]:
        config = self.model.config
        return {TEXT: int(config.joint_attention_dim), POOLED: int(config.pooled_projection_dim)}

    def enter(self, sample: Tensor, timesteps: Tensor, conditions: Conditions) -> Tokens:
        grid = token_grid(self.model.config, *sample.shape[-2:])
        return Tokens(
            hidden=self.model.pos_embed(sample).contiguous(),
            text=self.model.context_embedder(conditions[TEXT]),
            time=self.model.time_text_embed(timesteps, conditions[POOLED]),
            grid=grid,
        )

    def step(self, block: nn.Module, state: Tokens) -> Tokens:
        text, hidden = block(hidden_states=state.hidden, encoder_hidden_states=state.text, temb=state.time)
        # The last block computes no text.
        return state._replace(hidden=hidden, text=state.text if text is None else text)

    def head(self, hidden: Tokens) -> Tensor:
        patches = output_patches(self.model, hidden.hidden, hidden.time)
        return unpatchify(patches, hidden.grid, self.patch_size)
