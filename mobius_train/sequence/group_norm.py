"""Group normalization of a tensor whose positions are shared by the ranks of a sequence group."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from mobius_train.sequence.group import SequenceGroup


class SharedGroupNorm(nn.GroupNorm):
    """GroupNorm with the statistics of all ranks of its group; without a group, an ordinary one."""

    sequence: SequenceGroup | None = None

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, …), of which each rank of the group has other positions."""
        if self.sequence is None:
            return super().forward(input)
        normalized = _Normalize.apply(input, self.weight, self.bias, self.num_groups, self.eps, self.sequence)
        return cast(Tensor, normalized)


def share_norms(module: nn.Module, sequence: SequenceGroup | None) -> None:
    """Set the sequence group of every SharedGroupNorm in a module."""
    for inner in module.modules():
        if isinstance(inner, SharedGroupNorm):
            inner.sequence = sequence


class _Normalize(torch.autograd.Function):
    """y = x̂ · weight + bias, x̂ = (x - μ) / σ, over the channels of a group and the positions of all ranks.

    Forward merges the mean μ_r and the sum of squared deviations M_r of each rank's n_r elements (Chan et al. 1979):

        μ = Σ n_r μ_r / n        σ² = (Σ M_r + n_r (μ_r - μ)²) / n + eps

    Backward, with g the gradient times weight, sums over all ranks too:

        dx = (g - Σ g / n - x̂ Σ g x̂ / n) / σ

    The gradients of weight and bias are those of this rank's positions.
    """

    @staticmethod
    def forward(
        context: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, sequence: SequenceGroup
    ) -> Tensor:
        grouped = _grouped(x, groups)
        variance, mean = torch.var_mean(grouped, dim=-1, correction=0)
        count = torch.full_like(mean, grouped.shape[-1])
        means, squares, counts = sequence.gather(torch.stack([mean, variance * count, count])).unbind(1)
        total = counts.sum(0)
        mean = (counts * means).sum(0) / total
        variance = (squares + counts * (means - mean).square()).sum(0) / total
        inverse = (variance + eps).rsqrt()
        context.save_for_backward(x, weight, mean, inverse, total)
        context.groups, context.sequence = groups, sequence
        normalized = ((grouped - mean[..., None]) * inverse[..., None]).view(x.shape)
        return torch.addcmul(_by_channel(bias, x), normalized, _by_channel(weight, x)).to(x.dtype)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Any:
        x, weight, mean, inverse, total = context.saved_tensors
        grouped = (_grouped(x, context.groups) - mean[..., None]) * inverse[..., None]
        of_output = gradient.to(grouped.dtype)
        g = _grouped(of_output * _by_channel(weight, x), context.groups)
        sums = torch.stack([g.sum(-1), (g * grouped).sum(-1)])
        of_sum, of_product = context.sequence.reduce(sums) / total
        of_x = (g - of_sum[..., None] - grouped * of_product[..., None]) * inverse[..., None]
        others = [axis for axis in range(x.ndim) if axis != 1]
        of_weight = (of_output * grouped.view(x.shape)).sum(others).to(weight.dtype)
        of_bias = of_output.sum(others).to(weight.dtype)
        return of_x.view(x.shape).to(x.dtype), of_weight, of_bias, None, None, None


def _grouped(x: Tensor, groups: int) -> Tensor:
    """(B, C, …) → (B, groups, elements of a group), at least float32."""
    wide = x if x.dtype == torch.float64 else x.float()
    return wide.reshape(len(x), groups, -1)


def _by_channel(vector: Tensor, x: Tensor) -> Tensor:
    """(C,) → (C, 1, …), to be used with (B, C, …)."""
    wide = vector if x.dtype == torch.float64 else vector.float()
    return wide.view(-1, *[1] * (x.ndim - 2))
