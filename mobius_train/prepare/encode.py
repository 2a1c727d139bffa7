"""Encoding of a clip as a sample: an animated WebP or an H.264 video, and a .json with its description."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from PIL import Image

from mobius_train.data.shards import MARK
from mobius_train.media.video import encode_video
from mobius_train.prepare.candidate import Candidate, Dropped
from mobius_train.prepare.recipe import OutputConfig
from mobius_train.prepare.webp import encode_webp

STAGE = "encode"


def split_of(group: str, output: OutputConfig) -> str:
    """The split of a group, "train" or "heldout". It depends only on the hash of the group's name and the seed."""
    digest = hashlib.sha256(f"{output.seed}:{group}".encode()).digest()
    return "heldout" if int.from_bytes(digest[:8], "big") < output.heldout * 2**64 else "train"


def encode_sample(clip: Candidate, output: OutputConfig) -> dict[str, Any]:
    """The sample for webdataset's writer.

    Raises:
        Dropped: the clip has no caption, or H.264 does not support its size.
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
            raise Dropped("odd size", f"{frames.shape[2]}x{frames.shape[1]}: H.264 needs even sizes; add buckets")
        data = encode_video(
            frames, container="mp4", codec="libx264", pixel_format="yuv420p", fps=fps, options={"crf": str(output.crf)}
        )
    description = {
        **MARK,
        "caption": captions,
        "num_frames": len(frames),
        "fps": round(fps, 4),
        "width": frames.shape[2],
        "height": frames.shape[1],
        "source": clip.origin,
        "labels": clip.labels,
    }
    return {"__key__": clip.key, "json": json.dumps(description, ensure_ascii=False).encode(), output.format: data}
