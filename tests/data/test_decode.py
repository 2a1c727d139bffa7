from __future__ import annotations

import io
import struct
import time
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from clip_files import animation, numbers, pictures, video
from PIL import Image

from mobius_train.data import decode as module
from mobius_train.data import videos
from mobius_train.data.decode import decode_clip
from mobius_train.data.headers import read_header
from mobius_train.data.limits import Limits
from mobius_train.data.pictures import on_white
from mobius_train.errors import MobiusError


@pytest.mark.parametrize("kind", ["GIF", "WEBP"])
@pytest.mark.parametrize(("asked", "expected"), [(1, [0]), (4, [0, 2, 5, 7]), (10, list(range(10)))])
def test_frames_of_an_animation_are_evenly_spaced(kind: str, asked: int, expected: list[int]) -> None:
    frames = decode_clip(animation(10, kind), f".{kind.lower()}", "clip", num_frames=asked, resolution=16)
    assert frames.shape == (asked, 3, 16, 16)
    assert frames.dtype == torch.uint8
    assert numbers(frames) == expected


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".webm"])
@pytest.mark.parametrize(("asked", "expected"), [(1, [0]), (4, [0, 2, 5, 7])])
def test_frames_of_a_video_are_evenly_spaced(suffix: str, asked: int, expected: list[int]) -> None:
    frames = decode_clip(video(10, suffix), suffix, "clip", num_frames=asked, resolution=16)
    assert numbers(frames) == expected


def test_the_frames_of_a_video_are_counted_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Six packets are announced where ten frames come: the choice is made again by ten."""
    monkeypatch.setattr(videos, "video_durations", lambda *_: [100.0] * 6)
    frames = decode_clip(video(10), ".mp4", "clip", num_frames=4, resolution=16)
    assert numbers(frames) == [0, 2, 5, 7]


def test_a_truncated_video_gives_an_error_or_all_its_frames() -> None:
    """What lies behind the last frame, the table for seeking, may be lost; a frame may not."""
    data = video(10, ".webm")
    refused = 0
    for length in range(0, len(data), 53):
        try:
            frames = decode_clip(data[:length], ".webm", "cut.webm", num_frames=10, resolution=16)
        except MobiusError:
            refused += 1
        else:
            assert numbers(frames) == list(range(10))
    assert refused > 0


def test_a_video_of_an_unknown_codec_is_named() -> None:
    data = video(3, ".webm")
    assert b"V_VP8" in data
    with pytest.raises(MobiusError, match=r"odd\.webm .*codec"):
        decode_clip(data.replace(b"V_VP8", b"V_ZZ8"), ".webm", "odd.webm", num_frames=3, resolution=16)


def test_a_playlist_under_the_name_of_a_video_opens_nothing(tmp_path: Path) -> None:
    (tmp_path / "secret.mp4").write_bytes(video(4))
    playlist = f"ffconcat version 1.0\nfile '{tmp_path}/secret.mp4'\n".encode()
    with pytest.raises(MobiusError, match=r"a\.mp4 .*unknown kind"):
        decode_clip(playlist, ".mp4", "a.mp4", num_frames=1, resolution=16)


def test_transparency_becomes_white() -> None:
    clear = Image.new("RGBA", (16, 16), (0, 0, 0, 0))
    buffer = io.BytesIO()
    clear.save(buffer, "PNG")
    assert decode_clip(buffer.getvalue(), ".png", "clip", num_frames=1, resolution=16).min() == 255


def test_sixteen_bits_keep_their_upper_byte_and_what_is_transparent_is_white() -> None:
    deep = Image.fromarray(np.array([[0, 257 * 100, 65535]], np.uint16))
    assert np.asarray(on_white(deep))[0, :, 0].tolist() == [0, 100, 255]
    glass = Image.fromarray(np.array([[[9, 9, 9, 255], [9, 9, 9, 0]]], np.uint8), "RGBA")
    assert np.asarray(on_white(glass)).tolist() == [[[9, 9, 9], [255, 255, 255]]]


def test_the_central_square_is_taken_and_resized() -> None:
    picture = Image.new("RGB", (48, 16), "black")
    picture.paste("white", (16, 0, 32, 16))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    assert decode_clip(buffer.getvalue(), ".png", "clip", num_frames=1, resolution=8).min() == 255


def test_a_clip_with_fewer_frames_than_asked_is_refused() -> None:
    with pytest.raises(MobiusError, match=r"dog\.gif has 3 frames.* 4 .*num_frames=3"):
        decode_clip(animation(3, "GIF"), ".gif", "dog.gif", num_frames=4, resolution=16)
    with pytest.raises(MobiusError, match=r"dog\.mp4 has 3 frames.* 4 .*num_frames=3"):
        decode_clip(video(3), ".mp4", "dog.mp4", num_frames=4, resolution=16)
    buffer = io.BytesIO()
    pictures(1)[0].save(buffer, "PNG")
    with pytest.raises(MobiusError, match=r"dog\.png is a still.* 2 .*num_frames=1"):
        decode_clip(buffer.getvalue(), ".png", "dog.png", num_frames=2, resolution=16)


def gif(width: int, height: int, frames: int) -> bytes:
    """A GIF of a few bytes a frame, each claiming the whole screen: black, by one LZW code run."""
    head = b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + bytes(6)
    frame = b"," + struct.pack("<HHHHB", 0, 0, width, height, 0) + b"\x02\x02\x4c\x01\x00"
    return head + frame * frames + b";"


def refused_quickly(data: bytes, suffix: str, match: str) -> None:
    tracemalloc.start()
    start = time.process_time()
    with pytest.raises(MobiusError, match=match):
        decode_clip(data, suffix, "bomb", num_frames=2, resolution=16)
    elapsed, (_, peak) = time.process_time() - start, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert elapsed < 2
    assert peak < 2**24


def test_large_frames_are_refused_before_they_are_decoded() -> None:
    bomb = gif(9000, 9000, 20)
    assert len(bomb) < 480
    refused_quickly(bomb, ".gif", r"bomb .* 9000x9000, 81000000 pixels; .* 16777216")


def test_many_frames_are_refused_before_they_are_counted_out() -> None:
    refused_quickly(gif(4000, 4000, 200_000), ".gif", r"bomb .* 68 or more frames .* 1073741824")


def test_a_frame_that_enlarges_the_screen_counts() -> None:
    small = bytearray(gif(9000, 9000, 2))
    small[6:10] = struct.pack("<HH", 10, 10)
    refused_quickly(bytes(small), ".gif", "9000x9000")


def test_a_large_webp_is_refused_before_its_canvas_is_made() -> None:
    bomb = bytearray(animation(2))
    assert bomb[12:16] == b"VP8X"
    bomb[24:30] = (16383).to_bytes(3, "little") * 2
    refused_quickly(bytes(bomb), ".webp", "16384x16384")


def test_a_large_png_is_refused_as_large() -> None:
    bomb = bytearray(animation(1, "PNG"))
    bomb[16:24] = struct.pack(">II", 60_000, 60_000)
    bomb[29:33] = struct.pack(">I", zlib.crc32(bomb[12:29]))
    refused_quickly(bytes(bomb), ".png", r"3600000000 pixels")


def test_a_large_video_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    film = video(3)
    monkeypatch.setattr(module, "VIDEO_LIMITS", Limits(max_pixels=32 * 32 * 3))
    assert len(decode_clip(film, ".mp4", "film", num_frames=3, resolution=16)) == 3
    for limits, match in (
        (Limits(max_pixels=32 * 32 * 3 - 1), "3 or more frames of 32x32"),
        (Limits(max_frames=2), "more than 2"),
        (Limits(max_frame_pixels=32 * 32 - 1), "frames of 32x32, 1024 pixels"),
    ):
        monkeypatch.setattr(module, "VIDEO_LIMITS", limits)
        refused_quickly(film, ".mp4", match)


def test_large_files_are_refused_unread() -> None:
    with pytest.raises(MobiusError, match=r"bomb\.gif .* 67108865 bytes; .* 67108864"):
        module.check_bytes(2**26 + 1, ".gif", "bomb.gif")
    module.check_bytes(2**26 + 1, ".mp4", "film.mp4")


@pytest.mark.parametrize("kind", ["GIF", "WEBP"])
def test_headers_agree_with_the_decoder(kind: str) -> None:
    data = animation(7, kind, (20, 12))
    header = read_header(data, Limits())
    assert (header.width, header.height, header.durations) == (20, 12, (40,) * 7)


@pytest.mark.parametrize("kind", ["GIF", "WEBP"])
def test_no_truncation_is_taken_for_the_whole_clip(kind: str) -> None:
    data = animation(5, kind)
    suffix = f".{kind.lower()}"
    assert numbers(decode_clip(data, suffix, "clip", num_frames=5, resolution=16)) == [0, 1, 2, 3, 4]
    # A GIF without its last byte, the trailer, still has all frames.
    for length in range(len(data) - (kind == "GIF")):
        with pytest.raises(MobiusError, match="clip"):
            decode_clip(data[:length], suffix, "clip", num_frames=5, resolution=16)


def test_other_kinds_are_never_decoded() -> None:
    with pytest.raises(MobiusError, match="is not a clip"):
        decode_clip(b"", ".pyd", "evil.pyd", num_frames=1, resolution=16)
    with pytest.raises(MobiusError, match="unknown kind"):
        decode_clip(b"%!PS-Adobe-3.0 EPSF-3.0\n", ".png", "evil.png", num_frames=1, resolution=16)
