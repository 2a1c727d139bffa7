"""What the pipeline gives back.

Legend: B prompts, C latent channels, F frames, h, w latent size, H, W pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from diffusers.utils import BaseOutput
from PIL import Image
from torch import Tensor

OUTPUT_TYPES = ("np", "pil", "pt", "uint8", "latent")


@dataclass
class TextToVideoPipelineOutput(BaseOutput):
    """frames, by output_type: np (B, F, H, W, 3) in [0, 1]; pt (B, F, 3, H, W) in [0, 1]; pil, a list of B
    lists of F images; uint8 (B, F, 3, H, W); latent (B, C, F, h, w)."""

    frames: Tensor | np.ndarray | list[list[Image.Image]]


def convert_frames(frames: Tensor, output_type: str) -> Any:
    """uint8 (B, F, 3, H, W) to what TextToVideoPipelineOutput says of output_type."""
    if output_type == "uint8":
        return frames
    if output_type == "pt":
        return frames.float() / 255
    channels_last = frames.movedim(2, -1).contiguous().numpy()
    if output_type == "np":
        return channels_last.astype(np.float32) / 255
    return [[Image.fromarray(frame) for frame in clip] for clip in channels_last]
