"""What a prediction depends on besides the noisy sample and the timestep, as named tensors.

Text encoders make them, the latent cache stores them, batches carry them, and models take what they know by name:

    text     (…, L, D), every backbone
    pooled   (…, P), one vector for the whole caption: Stable Diffusion XL and 3
    sizes    (…, 6), pixels: height and width of the original, top and left of the crop, height and width: XL, PixArt
    mask     (…, L), bool, true for the text's tokens and false for padding: PixArt

Only the backbone gives the names a meaning.

Legend: B clips, F frames, L text tokens, D their width, P width of the pooled text.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

TEXT, POOLED, SIZES, MASK = "text", "pooled", "sizes", "mask"
# Numbers in `sizes`.
SIZE_NUMBERS = 6


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

    @classmethod
    def of_size(cls, height: int, width: int, names: Container[str]) -> Conditions:
        """The conditions of one clip of this size in pixels that are among `names`: `sizes`, or none.

        The original has the clip's own size and nothing is cropped. diffusers' pipelines sample with the same values,
        and clips do not keep the size that they had in their file.
        """
        sizes = torch.tensor([height, width, 0, 0, height, width])
        return cls({SIZES: sizes} if SIZES in names else {})

    def __or__(self, other: Conditions) -> Conditions:
        """These and further conditions of the same clips."""
        return Conditions(self.tensors | other.tensors)

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def __len__(self) -> int:
        """B."""
        return len(next(iter(self.tensors.values())))

    def to(self, device: torch.device | None = None, dtype: torch.dtype | None = None) -> Conditions:
        """On another device; the floating point tensors in another dtype."""
        return self.map(lambda tensor: tensor.to(device, dtype if tensor.is_floating_point() else None))

    def unsqueeze(self) -> Conditions:
        """A batch of this one clip."""
        return self.map(lambda tensor: tensor.unsqueeze(0))

    def repeat_frames(self, num_frames: int) -> Conditions:
        """Each clip's conditions once for every frame: B becomes B·F, the frames of one clip after the other."""
        return self.map(lambda tensor: tensor.repeat_interleave(num_frames, dim=0))

    def where(self, keep: Tensor, other: Conditions) -> Conditions:
        """These conditions where `keep`, (B,) bool, is true; those of the single clip `other` elsewhere.

        Conditions that `other` does not have, such as the sizes of the empty caption, stay.
        """
        mixed = {}
        for name, replacement in other.tensors.items():
            tensor = self[name]
            chosen = keep.to(tensor.device).view(-1, *[1] * (tensor.ndim - 1))
            mixed[name] = torch.where(chosen, tensor, replacement.to(tensor.device))
        return Conditions(self.tensors | mixed)

    def map(self, change: Callable[[Tensor], Tensor]) -> Conditions:
        """With a function of each tensor in its place."""
        return Conditions({name: change(tensor) for name, tensor in self.tensors.items()})
