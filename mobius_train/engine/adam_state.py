"""Adam's moments as float32 tensors for saving and restoring, for every supported Adam."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

MOMENTS = ("exp_avg", "exp_avg_sq")

# bitsandbytes' state keys of a moment: 8-bit codes, the values of the codes, the largest value of each block.
QUANTIZED = {"exp_avg": ("state1", "qmap1", "absmax1"), "exp_avg_sq": ("state2", "qmap2", "absmax2")}
BLOCK = 256
# Blocks per conversion. It bounds the float32 copy on the GPU.
BLOCKS_AT_ONCE = 2**16


class AdamState:
    """Access to Adam's moments as float32 tensors.

    Float32 moments are returned as live tensors. 8-bit moments are copied to host memory, for the lifetime of this
    object. They are not saved in 8 bits, because their blocks depend on the number of ranks. Restoring quantizes them
    again, which changes some codes.
    """

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        self._copies: dict[tuple[Tensor, str], Tensor] = {}

    def moment(self, parameter: Tensor, name: str) -> Tensor:
        """Return one of MOMENTS of a tensor that Adam steps, in the tensor's shape; zero before the first step."""
        state = self._state(parameter)
        if name in state:
            return state[name]
        codes, _, _ = QUANTIZED[name]
        if state[codes].dtype == torch.float32:
            # bitsandbytes keeps small tensors in float32.
            return state[codes]
        if (parameter, name) not in self._copies:
            self._copies[parameter, name] = _dequantized(*(state[key] for key in QUANTIZED[name]))
        return self._copies[parameter, name]

    def step(self, parameter: Tensor) -> int:
        """Number of Adam steps of the parameter."""
        return int(self._state(parameter)["step"])

    def commit(self, parameter: Tensor, step: int) -> None:
        """Store the values written to the parameter's moments, and set its step count."""
        state = self._state(parameter)
        if isinstance(state["step"], Tensor):
            state["step"].fill_(step)
        else:
            state["step"] = step
        for name in MOMENTS:
            if (parameter, name) in self._copies:
                _quantize(self._copies[parameter, name], *(state[key] for key in QUANTIZED[name]))

    def _state(self, parameter: Tensor) -> dict[str, Any]:
        """Return the optimizer's state of a parameter; before the first step, create it as that step would."""
        optimizer = self._optimizer
        state: dict[str, Any] = optimizer.state[parameter]
        if not state and isinstance(optimizer, torch.optim.AdamW):
            state["step"] = torch.zeros((), device=parameter.device if optimizer.defaults["fused"] else None)
            state |= {moment: torch.zeros_like(parameter) for moment in MOMENTS}
        elif not state:
            # At stage 3 DeepSpeed puts a parameter into its group only while stepping it.
            group = optimizer.param_groups[0]
            group["params"], original = [parameter], group["params"]
            optimizer.init_state(group, parameter, 0, 0)
            group["params"] = original
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
    """Yield slices of the elements, each with the slice of its blocks."""
    for start in range(0, size, BLOCK * BLOCKS_AT_ONCE):
        end = min(size, start + BLOCK * BLOCKS_AT_ONCE)
        yield slice(start, end), slice(start // BLOCK, -(-end // BLOCK))
