"""What a prediction depends on besides the noisy sample and the timestep, as named tensors.

Text encoders make them, the latent cache stores them, batches carry them, and models take what they know by name:
`text`, (…, L, D), for every backbone of today. Only the backbone gives the names a meaning.

Legend: B clips, F frames, L text tokens, D their width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

TEXT, POOLED = "text", "pooled"


@dataclass(frozen=True)
class Conditions:
    """Named tensors that belong to the same clips.

    Attributes:
        tensors: by name. For a batch each has B as its first axis; for one clip there is no such axis.
    """

    tensors: dict[str, Tensor]

    @classmethod
    def of_text(cls, text: Tensor) -> Conditions:
        """Text embeddings alone, (B, L, D) or (L, D)."""
        return cls({TEXT: text})

    @classmethod
    def stack(cls, clips: Sequence[Conditions]) -> Conditions:
        """A batch of clips that all have the same names and shapes."""
        return cls({name: torch.stack([clip[name] for clip in clips]) for name in clips[0].tensors})

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def __len__(self) -> int:
        """B."""
        return len(next(iter(self.tensors.values())))

    def to(self, device: torch.device | None = None, dtype: torch.dtype | None = None) -> Conditions:
        """On another device; the floating point tensors in another dtype."""
        return self._map(lambda tensor: tensor.to(device, dtype if tensor.is_floating_point() else None))

    def unsqueeze(self) -> Conditions:
        """A batch of this one clip."""
        return self._map(lambda tensor: tensor.unsqueeze(0))

    def repeat_frames(self, num_frames: int) -> Conditions:
        """Each clip's conditions once for every frame: B becomes B·F, the frames of one clip after the other."""
        return self._map(lambda tensor: tensor.repeat_interleave(num_frames, dim=0))

    def where(self, keep: Tensor, other: Conditions) -> Conditions:
        """These conditions where `keep`, (B,) bool, is true; those of the single clip `other` elsewhere."""
        mixed = {}
        for name, tensor in self.tensors.items():
            chosen = keep.to(tensor.device).view(-1, *[1] * (tensor.ndim - 1))
            mixed[name] = torch.where(chosen, tensor, other[name].to(tensor.device))
        return Conditions(mixed)

    def _map(self, change: Callable[[Tensor], Tensor]) -> Conditions:
        return Conditions({name: change(tensor) for name, tensor in self.tensors.items()})
