"""Encoding of video with PyAV."""

from __future__ import annotations

import io
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from av.video.reformatter import Colorspace
from numpy.typing import NDArray
from torch import Tensor

from mobius_train.media.pixels import CLIP_SIDE, enlarge_frames, to_arrays

BT709 = 1  # in ITU-T H.273, of matrix, primaries and transfer


def encode_video(
    frames: NDArray[np.uint8],
    *,
    container: str,
    codec: str,
    pixel_format: str,
    fps: float,
    options: Mapping[str, str],
) -> bytes:
    """Encode a video file; equal frames give equal bytes on machines of the same kind.

    Args:
        frames: (F, H, W, 3) RGB.
        container, codec, pixel_format: FFmpeg's names.
        options: codec options.

    Raises:
        av.error.FFmpegError: the codec does not support this size or pixel format.
    """
    buffer = io.BytesIO()
    # bitexact omits time and version from the header. The codec's decisions depend on the number of threads.
    with av.open(buffer, "w", format=container, container_options={"fflags": "+bitexact"}) as output:
        stream: Any = output.add_stream(codec, rate=Fraction(fps).limit_denominator(1000), options=dict(options))
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], pixel_format
        stream.codec_context.flags |= av.codec.context.Flags.bitexact
        stream.codec_context.thread_count = 1
        if not av.VideoFormat(pixel_format).is_rgb:
            # Stated, since players guess the matrix of other files by their size.
            stream.codec_context.colorspace = stream.codec_context.color_primaries = BT709
            stream.codec_context.color_trc = BT709
        for pixels in frames:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            output.mux(stream.encode(frame.reformat(format=pixel_format, dst_colorspace=Colorspace.ITU709, threads=1)))
        output.mux(stream.encode(None))
    return buffer.getvalue()


def write_mp4(frames: Tensor, path: Path, fps: float = 8.0) -> None:
    """Write H.264 (MPEG-4 Part 2 if PyAV lacks libx264) in yuv420p, which every player supports.

    Frames are (F, 3, H, W) uint8. Odd sizes repeat the last row or column, since yuv420p needs even sizes.
    """
    frames = enlarge_frames(frames, CLIP_SIDE)
    height, width = (size + size % 2 for size in frames.shape[-2:])
    rows = torch.arange(height).clamp(max=frames.shape[-2] - 1)
    columns = torch.arange(width).clamp(max=frames.shape[-1] - 1)
    h264 = "libx264" in av.codecs_available
    data = encode_video(
        to_arrays(frames[..., rows, :][..., columns]),
        container="mp4",
        codec="libx264" if h264 else "mpeg4",
        pixel_format="yuv420p",
        fps=fps,
        options={"crf": "16"} if h264 else {"qscale": "2"},
    )
    path.write_bytes(data)
