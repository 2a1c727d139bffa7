"""The moments of Adam as float32 tensors, to be saved and restored, whichever Adam it is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

MOMENTS = ("exp_avg", "exp_avg_sq")

# Where bitsandbytes keeps a moment: codes of 8 bits, what they stand for, and the largest value of each block.
QUANTIZED = {"exp_avg": ("state1", "qmap1", "absmax1"), "exp_avg_sq": ("state2", "qmap2", "absmax2")}
BLOCK = 256
# Blocks that are converted at once, so that no float32 copy of the whole moment lies on the GPU.
BLOCKS_AT_ONCE = 2**16


class AdamState:
    """Live tensors where the moments are float32; else copies in host memory, as long as this object lives.

    Another number of ranks has other blocks, so 8-bit moments are not saved as they are. What is restored is quantized
    again, which changes some of the codes.
    """

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        self._copies: dict[tuple[Tensor, str], Tensor] = {}

    def moment(self, parameter: Tensor, name: str) -> Tensor:
        """One of MOMENTS of a tensor that Adam steps, of its shape; zero before the first step."""
        state = self._state(parameter)
        if name in state:
            return state[name]
        codes, _, _ = QUANTIZED[name]
        if state[codes].dtype == torch.float32:
            # Small ones stay so.
            return state[codes]
        if (parameter, name) not in self._copies:
            self._copies[parameter, name] = _dequantized(*(state[key] for key in QUANTIZED[name]))
        return self._copies[parameter, name]

    def step(self, parameter: Tensor) -> int:
        """How often Adam has stepped it."""
        return int(self._state(parameter)["step"])

    def commit(self, parameter: Tensor, step: int) -> None:
        """Take over what was written into its moments, and how often it was stepped."""
        state = self._state(parameter)
        if isinstance(state["step"], Tensor):
            state["step"].fill_(step)
        else:
            state["step"] = step
        for name in MOMENTS:
            if (parameter, name) in self._copies:
                _quantize(self._copies[parameter, name], *(state[key] for key in QUANTIZED[name]))

    def _state(self, parameter: Tensor) -> dict[str, Any]:
        """Made by the optimizer at its first step, and so would it be then."""
        optimizer = self._optimizer
        state: dict[str, Any] = optimizer.state[parameter]
        if not state and isinstance(optimizer, torch.optim.AdamW):
            state["step"] = torch.zeros((), device=parameter.device if optimizer.defaults["fused"] else None)
            state |= {moment: torch.zeros_like(parameter) for moment in MOMENTS}
        elif not state:
            # At stage 3 DeepSpeed has it in its group while it steps it only.
            group = optimizer.param_groups[0]
            group["params"], there = [parameter], group["params"]
            optimizer.init_state(group, parameter, 0, 0)
            group["params"] = there
        return optimizer.state[parameter]


def _dequantized(codes: Tensor, meanings: Tensor, largest: Tensor) -> Tensor:
    from bitsandbytes.functional import dequantize_blockwise

    copy = torch.empty(codes.shape, dtype=torch.float32)
    for elements, blocks in _ranges(codes.numel()):
        some = codes.view(-1)[elements]
        copy.view(-1)[elements] = dequantize_blockwise(
            some, absmax=largest[blocks], code=meanings, blocksize=BLOCK
        ).cpu()
    return copy


def _quantize(copy: Tensor, codes: Tensor, meanings: Tensor, largest: Tensor) -> None:
    from bitsandbytes.functional import quantize_blockwise

    for elements, blocks in _ranges(codes.numel()):
        some = copy.view(-1)[elements].to(codes.device)
        quantized, state = quantize_blockwise(some, code=meanings, blocksize=BLOCK)
        codes.view(-1)[elements] = quantized
        largest[blocks] = state.absmax


def _ranges(size: int) -> Iterator[tuple[slice, slice]]:
    """Of elements and of their blocks."""
    for start in range(0, size, BLOCK * BLOCKS_AT_ONCE):
        end = min(size, start + BLOCK * BLOCKS_AT_ONCE)
        yield slice(start, end), slice(start // BLOCK, -(-end // BLOCK))
