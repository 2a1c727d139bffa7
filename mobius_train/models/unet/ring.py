"""The ring: the trainable temporal branch beside a frozen 2D UNet.

Legend: h hidden state of the frozen spatial branch, t time state of the ring; SC, SA spatial convolution and
attention blocks; TC, TA temporal ones; ⊕ concatenation along channels. N = B·F frames, ordered clip by clip;
C channels, H, W latent size; w the ring's width.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, cast

import torch
from diffusers import ConfigMixin, ModelMixin, UNet2DConditionModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.activations import get_activation
from diffusers.models.downsampling import Downsample2D
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

from mobius_train.models.backbone import Feature, LayerShape
from mobius_train.models.recompute import LayerMemory, TreatedUnits
from mobius_train.models.trained_tail import config_of_copies, empty_blocks
from mobius_train.models.unet.backbone import Layer, UNetBackbone
from mobius_train.models.unet.layers import (
    LAYOUT_FIELDS,
    Layout,
    bytes_per_flop,
    read_layout,
    ring_groups,
    scaled_channels,
    scaled_layout,
    split_layout,
    tail_bytes_per_flop,
)
from mobius_train.models.unet.serial_layer import Temporal, serial_layer
from mobius_train.models.unet.temporal import TemporalAttention, TemporalBlock, TemporalConv, transformer_in
from mobius_train.models.units import layer_units
from mobius_train.ring_shape import PAPER, RingShape
from mobius_train.sequence.split import WHOLE, Grid, Split

HEAD_FIELDS = ("out_channels", "act_fn", "norm_num_groups", "norm_eps", "conv_out_kernel")


class Ring(ModelMixin, ConfigMixin):
    """The time states t, their fusion with h, and the output head.

        t_0     = transformer_in(h_0)
        t_{i+1} = SA(SC(h_i)) + TA(SC(h_i) + TC(t_i))          (Mobius, Eq. 9)
        t_{i+1} = SC(h_i) + TC(t_i)                            in layers without attention
        f       = Conv1x1(h ⊕ t)                                (Eq. 6)
        output  = conv_out(act(norm(f)))

    Like h, t has its own bridges (Eq. 5), downsamplers and upsamplers. The weights of TC, TA, transformer_in and the
    samplers have the names of UNet3DConditionModel.

    At width w = 1, the paper's, t has as many channels as h. At another width it has w times as many, and SC(h_i),
    SA(SC(h_i)) and h_0 enter through learned 1x1 convolutions.

    At fusion depth K = 0, the paper's, the fusion comes after the last layer. At another depth it comes before the last
    K up blocks of the UNet, the tail: the ring ends there, and the frozen tail runs on f, in the graph. With temporal
    layers in the tail, which start as the identity, each of its layers is TA(SA(TC(SC(·)))) as in a serial model
    (Eq. 7). At width 0 there is no ring, and f = h. A trained tail consists of copies of these blocks.

    The configuration entries up to `conv_out_kernel` have the same meaning as in UNet2DConditionModel; for the others
    see RingShape. `trained_tail` is the configuration of the UNet whose blocks are copied; None: the frozen ones run.

    Raises:
        MobiusError: the shape does not fit the blocks, channels, heads and groups of the UNet.

    Attributes:
        memory: how the layers store activations for the backward pass.
        host_bytes: bytes that the last forward pass offloaded to host memory.
    """

    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self,
        out_channels: int,
        down_block_types: tuple[str, ...],
        mid_block_type: str | None,
        up_block_types: tuple[str, ...],
        block_out_channels: tuple[int, ...],
        layers_per_block: int | tuple[int, ...],
        attention_head_dim: int | tuple[int, ...],
        downsample_padding: int,
        act_fn: str,
        norm_num_groups: int,
        norm_eps: float,
        conv_out_kernel: int,
        width: float = 1.0,
        fusion_depth: int = 0,
        tail_temporal_layers: bool = False,
        trained_tail: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.shape = RingShape(width, fusion_depth, tail_temporal_layers, trained_tail is not None)
        of_unet = read_layout(self.config)
        self._layers = of_unet.layers()
        before, behind = split_layout(of_unet, fusion_depth)
        tail = []
        if tail_temporal_layers:
            tail = [TemporalBlock(shapes, norm_num_groups, bridged=False) for shapes in behind]
            for block in tail:
                block.zero_outputs()
        self._behind = [layer for shapes in behind for layer in shapes]
        self._transformer_blocks = [1] * len(self._behind)
        self._costs: list[float] = []
        if width:
            layout, _ = split_layout(scaled_layout(self.config, width), fusion_depth)
            self._costs += map(bytes_per_flop, layout.layers())
            self._add_states(before, layout, tail)
        else:
            self.up_blocks = nn.ModuleList(tail)
        self.tail: nn.ModuleList | None = None
        if trained_tail is not None:
            copied = UNet2DConditionModel.from_config
            self.tail = empty_blocks(lambda: UNetBackbone(copied(trained_tail)).behind(fusion_depth))

        first = block_out_channels[0]
        self.conv_norm_out = nn.GroupNorm(norm_num_groups, first, eps=norm_eps)
        self.conv_act = get_activation(act_fn)
        self.conv_out = nn.Conv2d(first, out_channels, conv_out_kernel, padding=(conv_out_kernel - 1) // 2)
        self.set_memory(LayerMemory())
        self.host_bytes = 0

    def _add_states(self, of_h: Layout, of_t: Layout, tail: list[TemporalBlock]) -> None:
        """Add the layers that compute t, and the fusion."""
        groups = ring_groups(self.config, self.shape.ring_width)
        sizes = scaled_channels(self.config, self.shape.ring_width)
        self.transformer_in = transformer_in(sizes[0], of_t.in_heads, groups)
        down = [RingBlock(shapes, groups) for shapes in of_t.down]
        for block, channels in zip(down[:-1], sizes, strict=False):
            sampler = Downsample2D(channels, use_conv=True, padding=self.config.downsample_padding, name="op")
            block.downsamplers.append(sampler)
        up = [RingBlock(shapes, groups) for shapes in of_t.up]
        # Only the last block of the UNet has no upsampler.
        for block, channels in zip(up, reversed(sizes[1:]), strict=False):
            block.upsamplers.append(Upsample2D(channels, use_conv=True))
        self.down_blocks = nn.ModuleList(down)
        self.mid_block = RingBlock(of_t.mid, groups)
        self.up_blocks = nn.ModuleList([*up, *tail])
        # One for h_0, then one for each layer.
        self.entries: nn.ModuleList | None = None
        if self.shape.ring_width != 1:
            self.entries = nn.ModuleList([Entry(self.config.block_out_channels[0], sizes[0], attention=False)])
            for wide, narrow in zip(of_h.layers(), of_t.layers(), strict=True):
                self.entries.append(Entry(wide.channels, narrow.channels, attention=wide.heads is not None))
        channels = of_h.layers()[-1].channels
        self.fusion = nn.Conv2d(channels + of_t.layers()[-1].channels, channels, kernel_size=1)
        # [I | 0] without bias: a new ring predicts the same as the 2D UNet.
        nn.init.dirac_(self.fusion.weight)
        nn.init.zeros_(cast(nn.Parameter, self.fusion.bias))

    def _split(self) -> int:
        """Number of up blocks in front of the tail."""
        return len(self.up_blocks) - (self.shape.fusion_depth if self.shape.tail_temporal_layers else 0)

    @property
    def dtype(self) -> torch.dtype:
        """The compute dtype: that of the head, which belongs to no unit of a sharded model."""
        return self.conv_out.weight.dtype

    def set_memory(self, memory: LayerMemory) -> None:
        """Set how the layers store activations for the backward pass."""
        self.memory = memory
        shape = self.shape
        tail = (
            tail_bytes_per_flop(layer, shape.tail_temporal_layers, shape.trained_tail, blocks)
            for layer, blocks in zip(self._behind, self._transformer_blocks, strict=True)
        )
        treatments = memory.treatments([*self._costs, *tail])
        # Without a ring nothing enters it.
        self.treatments = treatments if shape.ring_width else treatments[1:]

    def set_transformer_blocks(self, of_up_blocks: list[list[int]]) -> None:
        """Set what `set_memory` has to know of the tail's spatial layers.

        It is not in the ring's configuration, because the ring's weights do not depend on it.

        Args:
            of_up_blocks: see `transformer_blocks`.
        """
        tail = of_up_blocks[len(of_up_blocks) - self.shape.fusion_depth :]
        self._transformer_blocks = [count for block in tail for count in block]
        self.set_memory(self.memory)

    def layers(self) -> list[LayerShape]:
        """The layers of the ring's UNet."""
        return self._layers

    def units(self) -> list[list[nn.Module]]:
        """The (TC, TA) pairs and the samplers."""
        return layer_units(self)

    def layers_to_compile(self) -> list[nn.Module]:
        """Every TC and TA."""
        return [m for m in self.modules() if isinstance(m, TemporalConv | TemporalAttention)]

    def head_modules(self) -> list[nn.Module]:
        """The fusion with h and the output head."""
        head = [self.conv_norm_out, self.conv_act, self.conv_out]
        return [self.fusion, *head] if self.shape.ring_width else head

    @property
    def gradient_checkpointing(self) -> bool:
        """diffusers' switch: recompute every layer."""
        return self.memory.gradient_checkpointing

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, enable: bool) -> None:
        self.set_memory(LayerMemory(gradient_checkpointing=enable))

    @classmethod
    def from_unet2d(cls, unet: UNet2DConditionModel, shape: RingShape = PAPER) -> Ring:
        """A new ring for `unet`, in float32.

        The output head and a trained tail start as copies of the UNet's, and so do the samplers at width 1, because t
        resembles h in scale and meaning. The fusion starts as the identity on h, the temporal layers of the tail as the
        identity, and the other layers at random.

        Raises:
            MobiusError: the shape does not fit the UNet.
        """
        names = (*LAYOUT_FIELDS, *HEAD_FIELDS, "downsample_padding")
        ring = cls(
            **{name: unet.config[name] for name in names},
            width=shape.ring_width,
            fusion_depth=shape.fusion_depth,
            tail_temporal_layers=shape.tail_temporal_layers,
            trained_tail=config_of_copies(unet.config) if shape.trained_tail else None,
        )
        if ring.tail is not None:
            ring.tail.load_state_dict(nn.ModuleList(UNetBackbone(unet).behind(shape.fusion_depth)).state_dict())
        state = unet.state_dict()
        copied = {
            name: state[name]
            for name in ring.state_dict()
            if name.startswith(("conv_norm_out.", "conv_out."))
            or (shape.ring_width == 1 and "samplers." in name and not name.startswith("tail."))
        }
        ring.load_state_dict(copied, strict=False)
        return ring

    def forward(
        self,
        features: Iterable[Feature],
        num_frames: int,
        tail: Callable[[Tensor, Layer, Iterable[nn.Module] | None], Tensor] | None = None,
        split: Split = WHOLE,
    ) -> Tensor:
        """Run in step with the spatial branch, consuming its features one at a time.

        With a sequence group, t holds this rank's positions of all frames, (N, C, Q_r, 1) instead of (N, C, H, W), and
        features, tail and head this rank's frames, N_r instead of N.

        Args:
            features: h_0, then one feature for each layer in front of the fusion, without a graph; and with a
                `fusion_depth` the input of the tail.
            num_frames: F.
            tail: see `UNetBackbone.split`; required with a `fusion_depth`.
            split: how the ranks of a sequence group share the frames.

        Returns:
            (N, out_channels, H, W).
        """
        entering = 1 + len(self._layers) - len(self._behind) if self.shape.ring_width else 0
        stream, units = _Stream(features, entering, self.dtype, split), TreatedUnits(self.treatments)
        state = self._states(stream, units, num_frames, split) if self.shape.ring_width else None
        hidden = stream.last()
        if tail is None:
            prediction = units.run(self._head, hidden, state)
        else:
            hidden = self._fuse(hidden, state)
            if self.tail is not None:
                hidden = hidden.to(self.dtype)
            hidden = tail(hidden, self._tail_layer(units, num_frames, split), self.tail)
            prediction = units.run(self._head, hidden.to(self.dtype), None)
        self.host_bytes = units.host_bytes
        return prediction

    def _states(self, stream: _Stream, units: TreatedUnits, num_frames: int, split: Split) -> Tensor:
        """The last time state, of this rank's frames."""
        entries = self._entries_in_order()
        state = units.run(self._enter, next(entries), stream.take().hidden, num_frames)
        grid = stream.grid
        bridges, grids = [state], [grid]
        for block in cast(Sequence[RingBlock], self.down_blocks):
            for conv, attention in block.layers():
                state = _layer(units, next(entries), conv, attention, state, None, stream.take(), num_frames)
                bridges.append(state)
                grids.append(grid)
            for downsampler in block.downsamplers:
                state, grid = _sampled(downsampler, state, grid, split)
                bridges.append(state)
                grids.append(grid)
        for conv, attention in self.mid_block.layers():
            state = _layer(units, next(entries), conv, attention, state, None, stream.take(), num_frames)
        for block in cast(Sequence[RingBlock], self.up_blocks[: self._split()]):
            for conv, attention in block.layers():
                grids.pop()
                state = _layer(units, next(entries), conv, attention, state, bridges.pop(), stream.take(), num_frames)
            for upsampler in block.upsamplers:
                state, grid = _sampled(upsampler, state, grid, split, grids[-1])
        return split.frames(state, grid)

    def _tail_layer(self, units: TreatedUnits, num_frames: int, split: Split) -> Layer:
        """Computes one layer of the tail, each with its own temporal layers."""
        temporal: Iterator[Any] = itertools.repeat((None, None))
        if self.shape.tail_temporal_layers:
            blocks = cast(Sequence[TemporalBlock], self.up_blocks[self._split() :])
            temporal = itertools.chain.from_iterable(block.layers() for block in blocks)

        def run(conv: nn.Module | None, attention: nn.Module | None, *args: Any) -> Tensor:
            return serial_layer(self._cast(conv), self._cast(attention), num_frames, split, *args).hidden

        return lambda *args: Feature(units.run(run, *next(temporal), *args))

    def _cast(self, temporal: nn.Module | None) -> Temporal | None:
        """The layer in the ring's dtype, between spatial layers of another dtype."""
        if temporal is None:
            return None
        return lambda hidden, num_frames: temporal(hidden.to(self.dtype), num_frames).to(hidden.dtype)

    def _entries_in_order(self) -> Iterator[Entry | None]:
        return itertools.repeat(None) if self.entries is None else iter(cast(Sequence[Entry], self.entries))

    def _enter(self, entry: Entry | None, hidden: Tensor, num_frames: int) -> Tensor:
        hidden = hidden.to(self.dtype)
        return self.transformer_in(hidden if entry is None else entry.convolution(hidden), num_frames)

    def _fuse(self, hidden: Tensor, state: Tensor | None) -> Tensor:
        return hidden if state is None else self.fusion(torch.cat([hidden, state], dim=1))

    def _head(self, hidden: Tensor, state: Tensor | None) -> Tensor:
        return self.conv_out(self.conv_act(self.conv_norm_out(self._fuse(hidden, state))))


def _layer(
    units: TreatedUnits,
    entry: Entry | None,
    temporal_conv: nn.Module,
    temporal_attention: nn.Module | None,
    state: Tensor,
    bridge: Tensor | None,
    feature: Feature,
    num_frames: int,
) -> Tensor:
    """t_{i+1} (Eq. 9); a bridge is concatenated to t_i along the channels."""

    def temporal(state: Tensor, bridge: Tensor | None, convolution: Tensor) -> Tensor:
        if bridge is not None:
            state = torch.cat([state, bridge], dim=1)
        if entry is not None:
            convolution = entry.convolution(convolution)
        state = convolution + temporal_conv(state, num_frames)
        return state if temporal_attention is None else temporal_attention(state, num_frames)

    state = units.run(temporal, state, bridge, feature.convolution)
    if feature.attention is None:
        return state
    # Added outside the recomputed function, so SA(SC(h)) is not kept for the backward pass at width 1.
    return (feature.attention if entry is None else entry.attention(feature.attention)) + state


def _sampled(sampler: nn.Module, state: Tensor, grid: Grid, split: Split, *size: Sequence[int]) -> tuple[Tensor, Grid]:
    """t at another level, and that level's latent size. A sampler takes neighbouring positions of each frame."""
    sampled = sampler(split.frames(state, grid), *size)
    return split.positions(sampled), (sampled.shape[-2], sampled.shape[-1])


class Entry(nn.Module):
    """The 1x1 convolutions through which the features of a layer enter a ring of another width."""

    def __init__(self, channels: int, of_ring: int, attention: bool) -> None:
        super().__init__()
        self.convolution = _Projection(channels, of_ring, kernel_size=1)
        if attention:
            self.attention = _Projection(channels, of_ring, kernel_size=1)


class _Projection(nn.Conv2d):
    """Takes features of a narrower dtype than the ring's."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.to(self.weight.dtype))


class RingBlock(TemporalBlock):
    """The ring's layers for one block of the 2D UNet, with its own sampler if that block has one."""

    def __init__(self, shapes: list[LayerShape], norm_num_groups: int) -> None:
        super().__init__(shapes, norm_num_groups, bridged=True)
        self.downsamplers = nn.ModuleList()
        self.upsamplers = nn.ModuleList()


class _Stream:
    """The spatial features, one at a time, in the ring's dtype or a narrower dtype that a sum with t widens.

    It keeps only the last hidden state, which `Walk` holds for its next layer anyway. With a sequence group the feature
    after the one that it gives is on its way already.

    Args:
        entering: how many features enter the ring.

    Attributes:
        grid: (H, W) of the first feature.
    """

    hidden: Tensor
    grid: Grid

    def __init__(self, features: Iterable[Feature], entering: int, dtype: torch.dtype, split: Split) -> None:
        self._features = iter(features)
        self._dtype, self._split = dtype, split
        self._left = entering
        self._waiting: deque[list[Callable[[], Tensor]]] = deque()

    def take(self) -> Feature:
        """The next feature, of this rank's positions."""
        while self._left and len(self._waiting) <= self._split.lookahead:
            self._waiting.append(self._started())
            self._left -= 1
        return Feature(*[finish() for finish in self._waiting.popleft()])

    def last(self) -> Tensor:
        """The hidden state of the last feature, of this rank's frames."""
        for convolution, attention in self._features:
            self.hidden = self._fitted(convolution if attention is None else attention)
            del convolution, attention
        return self.hidden

    def _started(self) -> list[Callable[[], Tensor]]:
        convolution, attention = next(self._features)
        fitted = [self._fitted(part) for part in (convolution, attention) if part is not None]
        if not hasattr(self, "hidden"):
            self.grid = (convolution.shape[-2], convolution.shape[-1])
        self.hidden = fitted[-1]
        return [self._split.positions_ahead(part) for part in fitted]

    def _fitted(self, tensor: Tensor) -> Tensor:
        # A copy widened here would stay in memory until the backward pass of a recomputed layer.
        narrower = tensor.itemsize < self._dtype.itemsize
        return tensor if narrower or torch.is_autocast_enabled(tensor.device.type) else tensor.to(self._dtype)
