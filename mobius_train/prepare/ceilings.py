"""What one file may cost. A few hundred bytes can claim gigabytes of pixels."""

from __future__ import annotations

from pydantic import Field

from mobius_train.config import Section
from mobius_train.prepare.candidate import Dropped


class Limits(Section):
    """Checked on what the headers say before a pixel is decoded, and again on what comes out."""

    max_file_bytes: int = Field(2**30, ge=1)
    max_frame_pixels: int = Field(2**24, ge=1, description="width x height: 4096 x 4096")
    max_frames: int = Field(2**18, ge=1, description="of the file")
    max_pixels: int = Field(2**30, ge=1, description="of all frames of an animation, and of all frames kept of a video")

    def check_bytes(self, size: int) -> None:
        """
        Raises:
            Dropped: the file is too large, or empty.
        """
        if size == 0:
            raise Dropped("empty")
        if size > self.max_file_bytes:
            raise Dropped("too large", f"{size} bytes")

    def check(self, width: int, height: int, frames: int) -> None:
        """
        Raises:
            Dropped: so many frames of this size are too many pixels.
        """
        if width * height > self.max_frame_pixels:
            raise Dropped("too large", f"frames of {width}x{height}")
        if frames > self.max_frames:
            raise Dropped("too many frames", frames)
        if width * height * frames > self.max_pixels:
            raise Dropped("too large", f"{frames} frames of {width}x{height}")
