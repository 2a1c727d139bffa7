"""Limits on what a file may cost, checked before its pixels are decoded."""

from __future__ import annotations

from pydantic import Field

from mobius_train.config_sections import Section


class Undecodable(Exception):
    """A file that yields no frames. reason: a short text shared by many files. detail: this file's numbers."""

    def __init__(self, reason: str, detail: object = "") -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, str(detail)


class Limits(Section):
    """Checked against the headers before decoding, and again against the decoded frames."""

    max_file_bytes: int = Field(2**30, ge=1)
    max_frame_pixels: int = Field(2**24, ge=1, description="width x height: 4096 x 4096")
    max_frames: int = Field(2**18, ge=1, description="frames in the file")
    max_pixels: int = Field(2**30, ge=1, description="in all frames of an animation, or all kept frames of a video")

    def check_bytes(self, size: int) -> None:
        """
        Raises:
            Undecodable: the file is too large.
        """
        if size > self.max_file_bytes:
            raise Undecodable("too large", f"{size} bytes; the limit is {self.max_file_bytes}")

    def check(self, width: int, height: int, frames: int) -> None:
        """
        Raises:
            Undecodable: a frame, the number of frames, or their total number of pixels is too large.
        """
        pixels = width * height
        if pixels > self.max_frame_pixels:
            limit = self.max_frame_pixels
            raise Undecodable("too large", f"frames of {width}x{height}, {pixels} pixels; the limit is {limit}")
        if frames > self.max_frames:
            raise Undecodable("too many frames", f"{frames} or more; the limit is {self.max_frames}")
        if pixels * frames > self.max_pixels:
            counted = f"{frames} or more frames of {width}x{height}, {pixels * frames} pixels"
            raise Undecodable("too large", f"{counted}; the limit is {self.max_pixels}")
