"""diffusers' PixArtTransformer2DModel as a backbone: PixArt-α (arXiv 2310.00426) and PixArt-Σ (arXiv 2403.04692).

The image tokens attend to the text in every block, and no block changes the text.

Legend: N = B·F frames, S image tokens of a frame, L text tokens, D width, p patch size, C latent channels.
"""

from __future__ import annotations

from typing import Any

from diffusers import PixArtTransformer2DModel
from torch import Tensor, nn

from mobius_train.conditions import MASK, SIZE_NUMBERS, SIZES, TEXT, Conditions
from mobius_train.models.pixart.check import check_pixart
from mobius_train.models.tokens.backbone import TokenBackbone
from mobius_train.models.tokens.grid import token_grid
from mobius_train.models.tokens.state import Tokens, TokenShape, unpatchify


def output_patches(part: Any, hidden: Tensor, time: Tensor) -> Tensor:
    """Last tokens (N, S, D) and time (N, D) → patches, (N, S, p·p·channels).

    Args:
        part: a model or a ring, with `norm_out`, `scale_shift_table` and `proj_out`.
    """
    shift, scale = (part.scale_shift_table[None] + time[:, None]).chunk(2, dim=1)
    return part.proj_out(part.norm_out(hidden) * (1 + scale) + shift)


def added_cond_kwargs(conditions: Conditions) -> dict[str, Tensor | None]:
    """diffusers' argument for the size of the picture. Its values are float32, since bfloat16 rounds sizes."""
    if SIZES not in conditions.tensors:
        return {"resolution": None, "aspect_ratio": None}
    size = conditions[SIZES][:, -2:].float()
    return {"resolution": size, "aspect_ratio": size[:, :1] / size[:, 1:]}


class PixArtBackbone(TokenBackbone):
    """See TokenBackbone. Of a prediction with a variance, the variance is dropped, as in diffusers' pipelines.

    Raises:
        MobiusError: it is another transformer, or its configuration is not supported.
    """

    def __init__(self, model: PixArtTransformer2DModel) -> None:
        check_pixart(model)
        shape = TokenShape(model.inner_dim, int(model.config.num_attention_heads))
        super().__init__(model, model.transformer_blocks, shape)

    @property
    def condition_widths(self) -> dict[str, int]:
        config = self.model.config
        widths = {TEXT: int(config.caption_channels or config.cross_attention_dim), MASK: 0}
        return widths | ({SIZES: SIZE_NUMBERS} if self.model.use_additional_conditions else {})

    def enter(self, sample: Tensor, timesteps: Tensor, conditions: Conditions) -> Tokens:
        grid = token_grid(self.model.config, *sample.shape[-2:])
        hidden, text, project = self.model.pos_embed(sample), conditions[TEXT], self.model.caption_projection
        of_blocks, time = self.model.adaln_single(
            timesteps, added_cond_kwargs(conditions), batch_size=len(sample), hidden_dtype=hidden.dtype
        )
        # The bias that the transformer itself makes of a mask.
        bias = (1 - conditions[MASK].to(hidden.dtype)) * -10000.0
        return Tokens(
            hidden=hidden.contiguous(),
            text=text if project is None else project(text),
            time=time,
            grid=grid,
            bias=bias.unsqueeze(1),
            of_blocks=of_blocks,
        )

    def step(self, block: nn.Module, state: Tokens) -> Tokens:
        hidden = block(
            state.hidden,
            encoder_hidden_states=state.text,
            encoder_attention_mask=state.bias,
            timestep=state.of_blocks,
        )
        return state._replace(hidden=hidden)

    def head(self, hidden: Tokens) -> Tensor:
        patches = output_patches(self.model, hidden.hidden, hidden.time)
        return unpatchify(patches, hidden.grid, self.patch_size)[:, : self.latent_channels]
