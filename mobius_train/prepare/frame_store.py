"""Frames between two passes: FFV1 in Matroska, lossless, shown by any player, and the same bytes each time."""

from __future__ import annotations

import io

import av
import numpy as np

from mobius_train.prepare.candidate import Frames

RATE = 10  # of the file; a clip's own rate is in its record
FORMAT = "bgr0"  # 8-bit RGB without subsampling


def pack(frames: Frames) -> bytes:
    """(F, H, W, 3) to the bytes of a file."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="matroska", container_options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream("ffv1", rate=RATE)
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], FORMAT
        stream.codec_context.flags |= av.codec.context.Flags.bitexact
        stream.thread_count = 1
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
    return buffer.getvalue()


def unpack(data: bytes) -> Frames:
    """The frames that `pack` was given, bit for bit."""
    with av.open(io.BytesIO(data), format="matroska") as container:
        container.streams.video[0].codec_context.thread_count = 1
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
