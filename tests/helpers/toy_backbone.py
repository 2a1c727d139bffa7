"""A backbone of a few convolutions with its ring: all that a new kind of image model has to bring.

In the package this would be a folder of mobius_train/models/ and one line of families.py.

Legend: N = B·F frames, the frames of a clip one after the other; C channels, H, W latent size.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import ClassVar, cast

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from mobius_train.conditions import TEXT, Conditions
from mobius_train.errors import MobiusError
from mobius_train.models.backbone import Feature, LayerShape, Timestep
from mobius_train.models.family import Family
from mobius_train.models.image_denoiser import ImageDenoiser
from mobius_train.models.parallel_model import ParallelModel
from mobius_train.models.recompute import LayerMemory, TreatedUnits
from mobius_train.ring_shape import PAPER, RingShape

__all__ = ["TOY", "ModelMixin", "ParallelToy", "ToyImageModel", "ToyRing"]


class ToyLayer(nn.Module):
    """A convolution of the state, the text and the timestep, with a residual."""

    def __init__(self, width: int, text_width: int) -> None:
        super().__init__()
        self.norm, self.conv = nn.GroupNorm(4, width), nn.Conv2d(width, width, 3, padding=1)
        self.text, self.time = nn.Linear(text_width, width), nn.Linear(1, width)

    def forward(self, hidden: Tensor, time: Tensor, text: Tensor) -> Tensor:
        given = (self.text(text).mean(1) + self.time(time))[:, :, None, None]
        return hidden + self.conv(torch.nn.functional.silu(self.norm(hidden + given)))


class ToyImageModel(ModelMixin, ConfigMixin):
    """A text-to-image model without resampling."""

    @register_to_config
    def __init__(self, in_channels: int = 4, width: int = 16, depth: int = 3, text_width: int = 384) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(in_channels, width, 3, padding=1)
        self.layers = nn.ModuleList([ToyLayer(width, text_width) for _ in range(depth)])
        self.conv_out = nn.Conv2d(width, in_channels, 3, padding=1)

    def states(self, sample: Tensor, timestep: Timestep, text: Tensor) -> Iterator[Tensor]:
        """h_0, h_1, …"""
        hidden = self.conv_in(sample)
        yield hidden
        time = torch.as_tensor(timestep, device=sample.device).expand(len(sample)).to(sample)[:, None] / 1000
        for layer in self.layers:
            hidden = layer(hidden, time, text)
            yield hidden

    def forward(
        self, sample: Tensor, timestep: Timestep, encoder_hidden_states: Tensor, return_dict: bool = False
    ) -> tuple[Tensor]:
        *_, hidden = self.states(sample, timestep, encoder_hidden_states)
        return (self.conv_out(hidden),)


class ToyBackbone:
    """See Backbone."""

    def __init__(self, model: ToyImageModel) -> None:
        self.model = model

    @property
    def latent_channels(self) -> int:
        return int(self.model.config.in_channels)

    @property
    def condition_widths(self) -> dict[str, int]:
        return {TEXT: int(self.model.config.text_width)}

    def layers(self) -> list[LayerShape]:
        width = int(self.model.config.width)
        return [LayerShape(width, width, None)] * int(self.model.config.depth)

    def features(self, sample: Tensor, timestep: Timestep, conditions: Conditions) -> Iterator[Feature]:
        dtype = self.model.dtype
        return map(Feature, self.model.states(sample.to(dtype), timestep, conditions[TEXT].to(dtype)))

    def head(self, hidden: Tensor) -> Tensor:
        return self.model.conv_out(hidden)

    def units(self) -> list[list[nn.Module]]:
        return [[layer] for layer in self.model.layers]


class ToyRing(ModelMixin, ConfigMixin):
    """t_{i+1} = h_{i+1} + TC(t_i) with TC over frames; the output is conv_out(Conv1x1(h ⊕ t))."""

    @register_to_config
    def __init__(self, in_channels: int, width: int, depth: int) -> None:
        super().__init__()
        self.temporal = nn.ModuleList([nn.Conv3d(width, width, (3, 1, 1), padding=(1, 0, 0)) for _ in range(depth)])
        self.fusion = nn.Conv2d(2 * width, width, 1)
        nn.init.dirac_(self.fusion.weight)
        nn.init.zeros_(cast(nn.Parameter, self.fusion.bias))
        self.conv_out = nn.Conv2d(width, in_channels, 3, padding=1)
        self.set_memory(LayerMemory())

    shape = PAPER

    @classmethod
    def of(cls, model: ToyImageModel, shape: RingShape) -> ToyRing:
        if shape != PAPER:
            raise MobiusError(f"{shape}: a toy ring has {PAPER}")
        ring = cls(**{name: model.config[name] for name in ("in_channels", "width", "depth")})
        ring.conv_out.load_state_dict(model.conv_out.state_dict())
        return ring

    def layers(self) -> list[LayerShape]:
        return [LayerShape(self.config.width, self.config.width, None)] * self.config.depth

    def set_memory(self, memory: LayerMemory) -> None:
        self.treatments = memory.treatments([1.0] * self.config.depth)

    def layers_to_compile(self) -> list[nn.Module]:
        return list(self.temporal)

    def head_modules(self) -> list[nn.Module]:
        return [self.fusion, self.conv_out]

    def units(self) -> list[list[nn.Module]]:
        return [[layer] for layer in self.temporal]

    def forward(self, features: Iterable[Feature], num_frames: int) -> Tensor:
        stream, units = iter(features), TreatedUnits(self.treatments)
        state = units.run(lambda hidden: hidden.to(self.dtype), next(stream).hidden)
        for layer, feature in zip(self.temporal, stream, strict=True):
            hidden = feature.hidden.to(self.dtype)
            state = units.run(self._layer, layer, state, hidden, num_frames)
        return units.run(self._head, hidden, state)

    def _layer(self, layer: nn.Module, state: Tensor, hidden: Tensor, num_frames: int) -> Tensor:
        clips = state.unflatten(0, (-1, num_frames)).transpose(1, 2)
        return hidden + layer(clips).transpose(1, 2).flatten(0, 1)

    def _head(self, hidden: Tensor, state: Tensor) -> Tensor:
        return self.conv_out(self.fusion(torch.cat([hidden, state], dim=1)))


class ParallelToy(ParallelModel):
    """See ParallelModel."""

    parts: ClassVar = {"spatial": ToyImageModel, "ring": ToyRing}

    def __init__(self, spatial: ToyImageModel, ring: ToyRing) -> None:
        super().__init__(spatial, ring, ToyBackbone(spatial))


TOY = Family(
    part="toy",
    image_model=ToyImageModel,
    image_denoiser=lambda model: ImageDenoiser(model, ToyBackbone(model), [model.conv_out]),
    parallel=ParallelToy,
    new_parallel=lambda model, shape: ParallelToy(model, ToyRing.of(model, shape)),
)
