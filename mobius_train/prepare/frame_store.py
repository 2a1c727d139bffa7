"""Storage of frames between two passes: FFV1 in Matroska, which is lossless, playable and deterministic."""

from __future__ import annotations

import io

import av
import numpy as np

from mobius_train.media.video import encode_video
from mobius_train.prepare.candidate import Frames

RATE = 10  # frame rate of the file; the clip's own rate is in its record
FORMAT = "bgr0"  # 8-bit RGB without subsampling


def pack(frames: Frames) -> bytes:
    """Encode frames (F, H, W, 3) to the bytes of a file."""
    return encode_video(frames, container="matroska", codec="ffv1", pixel_format=FORMAT, fps=RATE, options={})


def unpack(data: bytes) -> Frames:
    """Decode the output of `pack` to bit-identical frames."""
    with av.open(io.BytesIO(data), format="matroska") as container:
        container.streams.video[0].codec_context.thread_count = 1
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
