"""Writing of animated GIFs."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from mobius_train.media.pixels import CLIP_SIDE, enlarge_frames, to_images


def write_gif(frames: Tensor, path: Path, fps: float = 8.0) -> None:
    """Write an infinitely looping GIF with one palette of 256 colours for all frames.

    Frames are (F, 3, H, W) uint8. A frame equal to the previous one is stored as a longer duration. The format counts
    in hundredths of a second.
    """
    first, *rest = _indexed(frames)
    first.save(path, save_all=True, append_images=rest, duration=round(1000 / fps), loop=0, disposal=1)


def _indexed(frames: Tensor) -> list[Image.Image]:
    """Enlarged palette images with a shared palette; every pixel has its nearest colour.

    Pillow's palette lookup is approximate (5 dB worse on shaded clips, and white backgrounds turn grey), and dithering
    would flicker between frames.
    """
    # A quarter of a million pixels are enough to cover a clip's colours.
    step = max(1, math.isqrt(frames[:, 0].numel() // 2**18))
    strip = torch.cat(list(frames[..., ::step, ::step]), dim=1).unsqueeze(0)
    palette = to_images(strip)[0].quantize(256, method=Image.Quantize.MEDIANCUT, kmeans=1).getpalette() or []
    entries = torch.tensor(palette).float().view(-1, 3)

    red, green, blue = frames.cpu().long().unbind(1)
    codes, pixels = torch.unique(red << 16 | green << 8 | blue, return_inverse=True)
    colours = torch.stack([codes >> 16, codes >> 8 & 255, codes & 255], dim=1).float()
    nearest = torch.cat([torch.cdist(part, entries).argmin(1) for part in colours.split(65536)])
    indices = enlarge_frames(nearest.to(torch.uint8)[pixels], CLIP_SIDE)

    size = (indices.shape[2], indices.shape[1])
    pictures = [Image.frombytes("P", size, frame.contiguous().numpy().tobytes()) for frame in indices]
    for picture in pictures:
        picture.putpalette(palette)
    return pictures
