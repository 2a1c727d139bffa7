"""The ring: the trainable temporal branch beside a frozen transformer.

Legend: N = B·F frames, ordered clip by clip; S image tokens of a frame, D width of the backbone, w the ring's width;
x image tokens and c text tokens of the frozen backbone, x_i those before block i; d the difference that the ring adds.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, NamedTuple, Self, cast

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from mobius_train.errors import MobiusError
from mobius_train.models.backbone import Tail
from mobius_train.models.recompute import LayerMemory, TreatedUnits
from mobius_train.models.tokens.backbone import TokenBackbone
from mobius_train.models.tokens.layers import Clip, Modulation, TokenLayer, bytes_per_flop, tail_bytes_per_flop
from mobius_train.models.tokens.state import Tokens, TokenShape, unpatchify
from mobius_train.models.trained_tail import config_of_copies, empty_blocks, parameters_to_buffers
from mobius_train.ring_shape import RingShape
from mobius_train.sequence.split import WHOLE, Split

# The default of `ring_every`: half of the cost of a layer behind every block.
EVERY = 2


class TokenRing(ModelMixin, ConfigMixin):
    """The difference d, its fusion with x, and the output head.

        d_0     = 0
        d_{i+1} = d_i + Δ_i(x_{i+1} + d_i)        behind every k-th block and the last one; else d_{i+1} = d_i
        output  = head(x_L + W d_L)

    The residual stream x of a transformer grows from block to block, so the ring holds what it adds to x, not a stream
    of its own: a sum over all x_i would count every block many times. `tokens/layers.py` has Δ. W starts as 0, so a new
    ring predicts what the transformer predicts.

    At width w = 1 d has as many channels as x. At another width it has w times as many, and each layer takes d_i plus a
    learned projection of x_{i+1}.

    At fusion depth K = 0 the fusion comes after the last block. At another depth it comes before the last K blocks,
    the tail: these frozen blocks run on x_{L-K} + W d, in the graph. With temporal layers in the tail each block runs
    on x + Δ(x), which starts as the identity. A trained tail consists of copies of these blocks. At width 0 there is no
    ring.

    A subclass has the output head of its family.

    Args:
        num_layers: L, blocks of the transformer.
        channels: D.
        heads: attention heads of a block.
        out_channels: channels of the prediction.
        patch_size: latents along a side of a token.
        ring_width, ring_every, fusion_depth, tail_temporal_layers, context_latents: see RingShape.
        trained_tail: the configuration of the transformer whose blocks are copied; None: the frozen ones run.

    Raises:
        MobiusError: the shape does not fit the blocks, channels and heads of the transformer.

    Attributes:
        memory: how the layers store activations for the backward pass.
        host_bytes: bytes that the last forward pass offloaded to host memory.
    """

    _supports_gradient_checkpointing = True
    # The first parts of the names of the head's weights, as in the family's transformer; `proj_out` is one of them.
    HEAD: ClassVar[tuple[str, ...]]

    @register_to_config
    def __init__(
        self,
        num_layers: int,
        channels: int,
        heads: int,
        out_channels: int,
        patch_size: int,
        ring_width: float = 1.0,
        ring_every: int | None = EVERY,
        fusion_depth: int = 0,
        tail_temporal_layers: bool = False,
        context_latents: int = 0,
        trained_tail: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        trains_tail = trained_tail is not None
        self.shape = RingShape(ring_width, fusion_depth, tail_temporal_layers, trains_tail, ring_every, context_latents)
        _check(self.shape, num_layers)
        front = num_layers - fusion_depth
        self._layers = [TokenShape(channels, heads)] * num_layers
        # The numbers of the blocks with a layer of the ring behind them.
        self._places = [n for n in range(1, front + 1) if n % ring_every == 0 or n == front] if ring_every else []
        self._costs = []
        if ring_width:
            width, ring_heads = _scaled(channels, heads, ring_width)
            self.modulation = Modulation(channels, width)
            self.blocks = nn.ModuleList(
                [TokenLayer(width, ring_heads, channels, context_latents, ring_width != 1) for _ in self._places]
            )
            self.fusion = nn.Linear(width, channels, bias=False)
            nn.init.zeros_(self.fusion.weight)
            self._costs += [bytes_per_flop(width)] * len(self._places)
        self._costs += [tail_bytes_per_flop(channels, tail_temporal_layers, trains_tail)] * fusion_depth
        if tail_temporal_layers:
            self.tail_modulation = Modulation(channels, channels)
            tail = [TokenLayer(channels, heads, channels, context_latents, False) for _ in range(fusion_depth)]
            for layer in tail:
                layer.zero_outputs()
            self.tail_blocks = nn.ModuleList(tail)
        self.tail: nn.ModuleList | None = None
        if trained_tail is not None:
            self.tail = empty_blocks(lambda: self.backbone_of(trained_tail).behind(fusion_depth))
            for block in self.tail:
                for module in self.without_effect(block):
                    parameters_to_buffers(module)
        self.add_head()
        self.set_memory(LayerMemory())
        self.host_bytes = 0

    @abstractmethod
    def add_head(self) -> None:
        """Add the modules and parameters of the output head, from `config`, with the names of `HEAD`."""

    @classmethod
    @abstractmethod
    def backbone_of(cls, config: Mapping[str, Any]) -> TokenBackbone:
        """A new transformer with this configuration."""

    def without_effect(self, block: nn.Module) -> list[nn.Module]:
        """Modules of a block whose results change no prediction. They are not trained."""
        return []

    @abstractmethod
    def output_patches(self, hidden: Tensor, time: Tensor) -> Tensor:
        """Last tokens (N, S, D), and (N, D) → patches of the prediction, (N, S, patch·patch·channels)."""

    @classmethod
    def beside(cls, backbone: TokenBackbone, shape: RingShape) -> Self:
        """A new ring for a backbone, in float32; the head and a trained tail are copies of the backbone's.

        Raises:
            MobiusError: the shape does not fit the backbone.
        """
        blocks = len(backbone.layers())
        every = min(EVERY, max(blocks - shape.fusion_depth, 1)) if shape.ring_every is None else shape.ring_every
        ring = cls(
            num_layers=blocks,
            channels=backbone.shape.channels,
            heads=backbone.shape.heads,
            out_channels=backbone.latent_channels,
            patch_size=backbone.patch_size,
            ring_width=shape.ring_width,
            ring_every=every if shape.ring_width else None,
            fusion_depth=shape.fusion_depth,
            tail_temporal_layers=shape.tail_temporal_layers,
            context_latents=shape.context_latents,
            trained_tail=config_of_copies(backbone.model.config) if shape.trained_tail else None,
        )
        ring.load_state_dict(cls.head_of(backbone.model), strict=False)
        if ring.tail is not None:
            ring.tail.load_state_dict(nn.ModuleList(backbone.behind(shape.fusion_depth)).state_dict())
        return ring

    @classmethod
    def head_of(cls, model: Any) -> dict[str, Tensor]:
        """The weights of a transformer's output head for the ring's, by name."""
        return {name: tensor for name, tensor in model.state_dict().items() if name.split(".")[0] in cls.HEAD}

    @property
    def dtype(self) -> torch.dtype:
        """The compute dtype: that of the head, which belongs to no unit of a sharded model."""
        return cast(Any, self).proj_out.weight.dtype

    def set_memory(self, memory: LayerMemory) -> None:
        """Set how the layers store activations for the backward pass."""
        self.memory = memory
        self.treatments = memory.treatments(self._costs)

    def layers(self) -> list[TokenShape]:
        """The blocks of the ring's backbone."""
        return self._layers

    def units(self) -> list[list[nn.Module]]:
        """One for each layer, and for each trained block of the tail."""
        return [[module] for module in (*self.layers_to_compile(), *(self.tail or ()))]

    def layers_to_compile(self) -> list[nn.Module]:
        """The layers of the ring and of the tail."""
        return [module for module in self.modules() if isinstance(module, TokenLayer)]

    def head_modules(self) -> list[nn.Module]:
        """The fusion with x and the output head."""
        return [module for name, module in self.named_children() if name in ("fusion", *self.HEAD)]

    def forward(
        self, features: Iterable[Tokens], num_frames: int, tail: Tail | None = None, split: Split = WHOLE
    ) -> Tensor:
        """Run in step with the backbone, consuming its features one at a time.

        With a sequence group, d holds this rank's tokens of all frames, (N, S_r, w·D) instead of (N, S, w·D), and
        features, tail and head this rank's frames, N_r instead of N.

        Args:
            features: the first state, then one for each block in front of the fusion, without a graph; and with a
                `fusion_depth` the input of the tail.
            num_frames: F.
            tail: see `TokenBackbone.split`; required with a `fusion_depth`.
            split: how the ranks of a sequence group share the frames.

        Returns:
            (N, out_channels, H, W).
        """
        stream, units = iter(features), TreatedUnits(self.treatments)
        state = next(stream)
        bias = None if state.bias is None else split.first_frames(state.bias, num_frames).to(self.dtype)
        clip = Clip(num_frames, state.grid, bias, split.group)
        modulation, of_tail = units.run(self._enter, split.whole(state.time))
        difference: Tensor | None = None
        behind = dict(zip(self._places, cast(Iterable[TokenLayer], getattr(self, "blocks", ())), strict=True))
        entering: deque[_Entering] = deque()
        for number, state in enumerate(stream, start=1):
            if number in behind:
                text = split.first_frames(state.text, num_frames)
                # Without a name of its own: a name would keep it until the next layer.
                entering.append(_Entering(behind[number], split.token_positions_ahead(state.hidden), text))
                del text
            # With a sequence group the next tokens are on their way while a layer computes.
            if len(entering) > split.lookahead:
                difference = self._add(units, entering.popleft(), difference, modulation, clip)
        while entering:
            difference = self._add(units, entering.popleft(), difference, modulation, clip)
        if difference is not None:
            difference = split.token_frames(difference.to(self.dtype), state.hidden.shape[1])
        hidden = self._fuse(state.hidden, difference)
        if tail is not None:
            state = tail(hidden, self._tail_layer(units, of_tail, clip, split), self.tail)
            hidden = state.hidden.to(self.dtype)
        prediction = units.run(self._head, hidden, state.time, state.grid)
        self.host_bytes = units.host_bytes
        return prediction

    def _enter(self, time: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """The modulation of the ring's layers and of the tail's."""
        parts = (getattr(self, name, None) for name in ("modulation", "tail_modulation"))
        first, second = (None if part is None else part(time.to(self.dtype)) for part in parts)
        return first, second

    def _add(
        self,
        units: TreatedUnits,
        entering: _Entering,
        difference: Tensor | None,
        modulation: Tensor | None,
        clip: Clip,
    ) -> Tensor:
        """d_{i+1} = d_i + Δ_i(x_{i+1} + d_i)."""
        dtype, layer, hidden = self.dtype, entering.layer, entering.hidden()
        if difference is None:
            # In float32: d adds up small increments, and is not saved for the backward pass.
            difference = hidden.new_zeros((*hidden.shape[:2], self.fusion.in_features), dtype=torch.float32)
        text = entering.text.to(dtype)
        if layer.entry is None:
            # Summed outside of the unit: a recomputed layer keeps one state, not two.
            return difference + units.run(layer, (difference + hidden).to(dtype), None, text, modulation, clip)
        return difference + units.run(layer, difference.to(dtype), hidden.to(dtype), text, modulation, clip)

    def _fuse(self, hidden: Tensor, difference: Tensor | None) -> Tensor:
        hidden = hidden.to(self.dtype)
        return hidden if difference is None else hidden + self.fusion(difference)

    def _tail_layer(
        self, units: TreatedUnits, modulation: Tensor | None, clip: Clip, split: Split
    ) -> Callable[[Callable[[Tokens], Tokens], Tokens], Tokens]:
        """Computes one block of the tail, each with its own temporal layer."""
        temporal = iter(cast(Iterable[TokenLayer], getattr(self, "tail_blocks", ())))

        def run(block: Callable[[Tokens], Tokens], layer: TokenLayer | None, state: Tokens) -> Tokens:
            if layer is not None:
                hidden = split.token_positions(state.hidden.to(self.dtype))
                text = split.first_frames(state.text, clip.num_frames).to(self.dtype)
                change = split.token_frames(layer(hidden, None, text, modulation, clip), state.hidden.shape[1])
                state = state._replace(hidden=state.hidden + change.to(state.hidden.dtype))
            return block(state)

        return lambda block, state: units.run(run, block, next(temporal, None), state)

    def _head(self, hidden: Tensor, time: Tensor, grid: tuple[int, int]) -> Tensor:
        return unpatchify(self.output_patches(hidden, time.to(self.dtype)), grid, int(self.config.patch_size))


class _Entering(NamedTuple):
    """What enters a layer of the ring."""

    layer: TokenLayer
    hidden: Callable[[], Tensor]
    """Waits for the backbone's tokens, (N, S, D)."""
    text: Tensor
    """Of each clip's first frame, (B, L, D)."""


def _check(shape: RingShape, blocks: int) -> None:
    most = blocks - 1 if shape.ring_width else blocks
    if not 0 <= shape.fusion_depth <= most:
        raise MobiusError(
            f"fusion_depth={shape.fusion_depth}: this transformer has {blocks} blocks. Depths that fit: 0 to {most}"
        )
    front = blocks - shape.fusion_depth
    if shape.ring_every is not None and not 1 <= shape.ring_every <= front:
        raise MobiusError(
            f"ring_every={shape.ring_every}: this transformer has {front} blocks in front of the fusion. Choose 1 to"
            f" {front}"
        )
    if shape.context_latents < 0:
        raise MobiusError(f"context_latents={shape.context_latents} must be 0 or more")


def _scaled(channels: int, heads: int, width: float) -> tuple[int, int]:
    """Channels and heads of a ring of this width, whose heads have the backbone's size.

    Raises:
        MobiusError: they are no whole numbers.
    """
    found = heads * width
    if not 0 < found == int(found):
        fitting = [f"{w:g}" for w in (2, 1.5, 1, 0.75, 0.5, 0.25, 0.125) if heads * w == int(heads * w)]
        raise MobiusError(
            f"ring_width={width:g}: {heads} heads times the width are no whole number. Widths that fit this"
            f" transformer: {', '.join(fitting)}"
        )
    return int(found) * (channels // heads), int(found)
