"""A transformer over tokens as a backbone: its forward pass as a stream of states.

A family says how the states begin, what a block computes, and how a prediction follows from the last state. All else is
here.

Legend: N = B·F frames, ordered clip by clip; C latent channels, H, W latent size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mobius_train.conditions import Conditions
from mobius_train.models.backbone import Tail, Timestep
from mobius_train.models.tokens.state import Tokens, TokenShape

# Runs one block behind the fusion, for a ring: the block, and its state → the next state.
RunBlock = Callable[[Callable[[Tokens], Tokens], Tokens], Tokens]


class TokenBackbone(ABC):
    """See DivisibleBackbone. The transformer is not modified.

    Args:
        model: with diffusers' configuration entries `in_channels`, `out_channels`, `patch_size`.
        blocks: in forward order, all of the same shape.
        shape: of each block.
    """

    def __init__(self, model: Any, blocks: nn.ModuleList, shape: TokenShape) -> None:
        self.model = model
        self.shape = shape
        self._blocks = list(blocks)

    @property
    @abstractmethod
    def condition_widths(self) -> Mapping[str, int]:
        """See Backbone."""

    @abstractmethod
    def enter(self, sample: Tensor, timesteps: Tensor, conditions: Conditions) -> Tokens:
        """The first state.

        Args:
            sample: (N, C, H, W) in the model's dtype.
            timesteps: (N,).
            conditions: of N frames, in the model's dtype.

        Raises:
            MobiusError: the transformer has no tokens for this size; see `token_grid`.
        """

    @abstractmethod
    def step(self, block: nn.Module, state: Tokens) -> Tokens:
        """What a block computes. It calls the block as a whole."""

    @abstractmethod
    def head(self, hidden: Tokens) -> Tensor:
        """The last state → prediction, (N, C, H, W)."""

    @property
    def latent_channels(self) -> int:
        return int(self.model.config.in_channels)

    @property
    def patch_size(self) -> int:
        """Latents along a side of a token."""
        return int(self.model.config.patch_size)

    def layers(self) -> list[TokenShape]:
        return [self.shape] * len(self._blocks)

    def features(self, sample: Tensor, timestep: Timestep, conditions: Conditions) -> Iterator[Tokens]:
        state = self._enter(sample, timestep, conditions)
        yield state
        for block in self._blocks:
            state = self.step(block, state)
            yield state

    def split(
        self, sample: Tensor, timestep: Timestep, conditions: Conditions, depth: int
    ) -> tuple[Iterator[Tokens], Tail]:
        """See DivisibleBackbone.

        The tail takes the fused tokens, (N, S, D), a RunBlock, and copies of its blocks to run in their place, or None.
        It returns Tokens.
        """
        last: list[Tokens] = []

        def front() -> Iterator[Tokens]:
            state = self._enter(sample, timestep, conditions)
            yield state
            for block in self._blocks[:-depth]:
                state = self.step(block, state)
                yield state
            last.append(state)
            yield state

        def tail(hidden: Tensor, run: RunBlock, copies: Iterable[nn.Module] | None = None) -> Tokens:
            dtype = self.model.dtype if copies is None else hidden.dtype
            state = last.pop()._replace(hidden=hidden).to(dtype)
            for block in self.behind(depth) if copies is None else copies:
                state = run(partial(self.step, block), state)
            return state

        return front(), tail

    def behind(self, depth: int) -> list[nn.Module]:
        return self._blocks[-depth:]

    def units(self) -> list[list[nn.Module]]:
        return [[block] for block in self._blocks]

    def _enter(self, sample: Tensor, timestep: Timestep, conditions: Conditions) -> Tokens:
        timesteps = torch.as_tensor(timestep, device=sample.device).expand(len(sample))
        dtype = self.model.dtype
        return self.enter(sample.to(dtype), timesteps, conditions.to(dtype=dtype))
