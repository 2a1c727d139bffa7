"""The kinds of clip files: their suffixes, and their detection from the content."""

from __future__ import annotations

from mobius_train.data.limits import Undecodable

# Suffixes of each kind. Videos have the name of their FFmpeg demuxer.
PICTURE_ENDINGS = {
    "gif": (".gif",),
    "webp": (".webp",),
    "png": (".png", ".apng"),
    "jpeg": (".jpg", ".jpeg"),
}
VIDEO_ENDINGS = {
    "mov": (".mp4", ".m4v", ".mov"),
    "matroska": (".webm", ".mkv"),
    "avi": (".avi",),
}
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
ENDINGS = PICTURE_ENDINGS | VIDEO_ENDINGS
VIDEO_SUFFIXES = tuple(suffix for suffixes in VIDEO_ENDINGS.values() for suffix in suffixes)
CLIP_SUFFIXES = tuple(suffix for suffixes in ENDINGS.values() for suffix in suffixes)


def kind_of(data: bytes) -> str:
    """The kind of a file, from its first bytes.

    The name does not matter, and nothing else is tried: with FFmpeg's own guessing, a playlist that is named like a
    video could open other files.

    Raises:
        Undecodable: it is none of `ENDINGS`.
    """
    if data[:6] in (b"GIF87a", b"GIF89a"):
        return "gif"
    if data[:4] == b"RIFF":
        if data[8:12] == b"WEBP":
            return "webp"
        if data[8:12] == b"AVI ":
            return "avi"
    if data[:8] == PNG_SIGNATURE:
        return "png"
    if data[:3] == b"\xff\xd8\xff":
        return "jpeg"
    if data[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip"):
        return "mov"
    if data[:4] == b"\x1a\x45\xdf\xa3":
        return "matroska"
    raise Undecodable("unknown kind", f"it starts with {data[:8]!r}")
