"""A clip as a sample of a shard: an animated WebP or an H.264 video, and a .json that says what it shows."""

from __future__ import annotations

import hashlib
import io
import json
from fractions import Fraction
from typing import Any

import av
import numpy as np
from PIL import Image

from mobius_train.prepare.candidate import Candidate, Dropped, Frames
from mobius_train.prepare.webp import encode_webp
from mobius_train.prepare.recipe import OutputConfig

STAGE = "encode"


def split(group: str, output: OutputConfig) -> str:
    """`train` or `heldout`: by the group's hash, so that it follows from nothing but its name."""
    digest = hashlib.sha256(f"{output.seed}:{group}".encode()).digest()
    return "heldout" if int.from_bytes(digest[:8], "big") < output.heldout * 2**64 else "train"


def sample(clip: Candidate, output: OutputConfig) -> dict[str, Any]:
    """What webdataset's writer takes.

    Raises:
        Dropped: the clip has no caption, or H.264 can't have its size.
    """
    captions = {language: words for language, words in clip.captions.items() if words.strip()}
    if not captions:
        raise Dropped("no caption")
    frames, fps = clip.pixels, clip.fps or 1.0
    if output.format == "webp":
        images = [Image.fromarray(frame) for frame in frames]
        data = encode_webp(images, max(1, round(1000 / fps)), output.quality)
    else:
        if frames.shape[1] % 2 or frames.shape[2] % 2:
            raise Dropped("odd size", f"{frames.shape[2]}x{frames.shape[1]}: H.264 wants even ones; add buckets")
        data = _h264(frames, fps, output.crf)
    description = {
        "caption": captions,
        "num_frames": len(frames),
        "fps": round(fps, 4),
        "width": frames.shape[2],
        "height": frames.shape[1],
        "source": clip.origin,
        "labels": clip.labels,
    }
    return {"__key__": clip.key, "json": json.dumps(description, ensure_ascii=False).encode(), output.format: data}


def _h264(frames: Frames, fps: float, crf: int) -> bytes:
    """One thread, and nothing of time or version in the header: the same frames give the same bytes."""
    buffer = io.BytesIO()
    options = {"fflags": "+bitexact", "movflags": "faststart"}
    with av.open(buffer, "w", format="mp4", container_options=options) as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000))
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        stream.options = {"crf": str(crf), "threads": "1"}
        stream.codec_context.flags |= av.codec.context.Flags.bitexact
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
    return buffer.getvalue()
