"""Copies of a trained module for evaluation while an engine trains the module itself."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from mobius_train.tasks.task import Weights


class Inference:
    """Creates unsharded copies of a trained module with given weights, for evaluation.

    An engine may have sharded the live module. The template contains the structure without memory. Copies share the
    live frozen weights unless the engine has sharded them.
    """

    def __init__(self, trained: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self._live = {name: p for name, p in trained.named_parameters() if not p.requires_grad}
        # The frozen weights before the engine changes them, in host memory.
        self._before = {name: parameter.detach() for name, parameter in self._live.items()}
        memo: dict[int, Any] = {
            id(tensor): nn.Parameter(tensor.detach().to("meta"), requires_grad=False) for tensor in trained.parameters()
        }
        self._template = copy.deepcopy(trained, memo)

    def model(self, weights: Weights) -> nn.Module:
        """A copy of the module with `weights` (trained parameters by name), in the inference dtype and eval mode."""
        module = copy.deepcopy(self._template)
        state = {name: tensor.to(self.device, self.dtype) for name, tensor in weights.items()}
        frozen = {name: self._frozen(name) for name in self._live}
        saved = module.state_dict().keys()
        # Constants, such as the positions of a transformer's patches; no training changes them.
        buffers = {name: self._cast(buffer) for name, buffer in module.named_buffers() if name in saved}
        module.load_state_dict({**buffers, **frozen, **state}, assign=True, strict=True)
        return module.eval().requires_grad_(False)

    def _cast(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, self.dtype if tensor.is_floating_point() else None)

    def _frozen(self, name: str) -> Tensor:
        live = self._live[name]
        # ZeRO-3 frees them between uses, sometimes even small ones.
        if live.device == self.device and live.dtype == self.dtype and not hasattr(live, "ds_id"):
            self._before.pop(name, None)
            return live.detach()
        return self._before[name].to(self.device, self.dtype)
