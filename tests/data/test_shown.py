"""Files are decoded as viewers show them, by training and preparation alike."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image, ImageCms

from mobius_train.data.colour import HLG, PQ, to_srgb
from mobius_train.data.decode import decode_clip, shape_of
from mobius_train.data.entry import Entry
from mobius_train.data.limits import Limits, Undecodable
from mobius_train.data.orientation import turn_of_matrix
from mobius_train.data.timing import evenly_spaced
from mobius_train.data.videos import video_size
from mobius_train.media.video import encode_video
from mobius_train.prepare.candidate import Candidate
from mobius_train.prepare.stages.decode import Decode

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def quarters(width: int = 96, height: int = 64) -> np.ndarray:
    """Red, green above blue, black."""
    frame = np.zeros((height, width, 3), np.uint8)
    frame[: height // 2, : width // 2] = RED
    frame[: height // 2, width // 2 :] = GREEN
    frame[height // 2 :, : width // 2] = BLUE
    return frame


def film(
    frames: Sequence[np.ndarray],
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    container: str = "mp4",
    *,
    options: dict[str, str] | None = None,
    setup: Callable[[Any], None] = lambda stream: None,
    times: Sequence[int] | None = None,
    layout: str = "rgb24",
) -> bytes:
    """times: start of each frame in ms; by default 8 frames a second."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as output:
        stream: Any = output.add_stream(codec, rate=8 if times is None else 1000)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt, stream.options = pix_fmt, options or {}
        setup(stream)
        for number, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format=layout)
            if layout != pix_fmt:
                frame = frame.reformat(format=pix_fmt)
            if times is not None:
                frame.pts, frame.time_base = times[number], Fraction(1, 1000)
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return buffer.getvalue()


def with_matrix(data: bytes, a: int, b: int, c: int, d: int) -> bytes:
    """The .mp4 with this display matrix in its track header."""
    at = data.index(b"tkhd")
    at += 8 + (32 if data[at + 4] else 20) + 16
    one = 1 << 16
    return data[:at] + struct.pack(">9i", a * one, b * one, 0, c * one, d * one, 0, 0, 0, 1 << 30) + data[at + 36 :]


def trained(data: bytes, suffix: str, frames: int = 1) -> np.ndarray:
    """(F, H, W, 3) at the size that buckets are chosen by."""
    shape = shape_of(data, suffix, "clip")
    size = (shape.width, shape.height)
    return decode_clip(data, suffix, "clip", num_frames=frames, resolution=size).permute(0, 2, 3, 1).numpy()


def prepared(data: bytes, suffix: str, tmp_path: Path) -> Candidate:
    path = tmp_path / f"clip{suffix}"
    path.write_bytes(data)
    place = Entry("clip", (), path, 0, len(data), suffix, str(path))
    clip = Candidate("clip", str(path), "clip", place=place)
    Decode(name="decode", more_frames_than=0).process(clip)
    return clip


def corners(frame: np.ndarray) -> list[tuple[int, ...]]:
    """The colours of the corners, rounded to 0 or 255: top left, top right, bottom left, bottom right."""
    height, width = frame.shape[:2]
    places = [(y, x) for y in (3, height - 4) for x in (3, width - 4)]
    return [tuple(255 * (frame[place] > 127).astype(int)) for place in places]


UPRIGHT = corners(quarters())


# The stored quarters are R G / B K. What each EXIF orientation, or matrix, makes of them, by ImageOps.exif_transpose.
@pytest.mark.parametrize(
    ("orientation", "matrix", "shown"),
    [
        (1, (1, 0, 0, 1), "RGBK"),
        (2, (-1, 0, 0, 1), "GRKB"),
        (3, (-1, 0, 0, -1), "KBGR"),
        (4, (1, 0, 0, -1), "BKRG"),
        (5, (0, 1, 1, 0), "RBGK"),
        (6, (0, 1, -1, 0), "BRKG"),
        (7, (0, -1, -1, 0), "KGBR"),
        (8, (0, -1, 1, 0), "GKRB"),
    ],
)
def test_turned_files_are_shown_upright(
    tmp_path: Path, orientation: int, matrix: tuple[int, int, int, int], shown: str
) -> None:
    colours = {"R": RED, "G": GREEN, "B": BLUE, "K": (0, 0, 0)}
    expected = [colours[letter] for letter in shown]
    size = (64, 96) if orientation > 4 else (96, 64)
    exif = Image.Exif()
    exif[0x0112] = orientation
    files = {".mp4": with_matrix(film([quarters()] * 8), *matrix)}
    for kind, suffix in (("JPEG", ".jpg"), ("PNG", ".png"), ("WEBP", ".webp")):
        buffer = io.BytesIO()
        Image.fromarray(quarters()).save(buffer, kind, exif=exif)
        files[suffix] = buffer.getvalue()
    for suffix, data in files.items():
        shape = shape_of(data, suffix, "clip")
        assert (shape.width, shape.height) == size, suffix
        assert corners(trained(data, suffix)[0]) == expected, suffix
        assert corners(prepared(data, suffix, tmp_path).pixels[0]) == expected, suffix


def test_a_matrix_of_another_angle_is_refused() -> None:
    assert turn_of_matrix([0, 65530, 0, -65530, 3, 0, 0, 0, 1 << 30]) == (True, True, False)
    assert turn_of_matrix([0] * 9) == (False, False, False)
    with pytest.raises(Undecodable, match="odd angle"):
        turn_of_matrix([46341, 46341, 0, -46341, 46341, 0, 0, 0, 1 << 30])


@pytest.mark.parametrize(("aspect", "size"), [((2, 1), (96, 64)), ((1, 2), (48, 128)), ((1, 1), (48, 64))])
def test_a_circle_stays_a_circle(tmp_path: Path, aspect: tuple[int, int], size: tuple[int, int]) -> None:
    """Pixels that are not square: one side is enlarged."""
    width = aspect[0] / aspect[1]
    y, x = np.mgrid[:64, :48]
    circle = ((x - 24) * width) ** 2 + (y - 32) ** 2 < (20 * min(1, width)) ** 2
    frame = np.repeat(255 * circle[..., None].astype(np.uint8), 3, axis=2)

    def setup(stream: Any) -> None:
        stream.codec_context.sample_aspect_ratio = Fraction(*aspect)

    data = film([frame] * 8, setup=setup)
    shape = shape_of(data, ".mp4", "clip")
    assert (shape.width, shape.height) == size
    for pixels in (trained(data, ".mp4")[0], prepared(data, ".mp4", tmp_path).pixels[0]):
        bright = pixels[..., 0] > 127
        assert abs(int(bright.any(0).sum()) - int(bright.any(1).sum())) <= 3


@pytest.mark.parametrize(
    ("codec", "pix_fmt", "container", "suffix", "options"),
    [
        ("qtrle", "argb", "mov", ".mov", {}),
        ("prores_ks", "yuva444p10le", "mov", ".mov", {}),
        ("png", "rgba", "mov", ".mov", {}),
        ("ffv1", "yuva420p", "matroska", ".mkv", {}),
        ("libvpx-vp9", "yuva420p", "webm", ".webm", {"auto-alt-ref": "0", "crf": "10", "b": "0"}),
        ("libvpx", "yuva420p", "webm", ".webm", {"auto-alt-ref": "0"}),
    ],
)
def test_transparent_parts_of_videos_are_white(
    tmp_path: Path, codec: str, pix_fmt: str, container: str, suffix: str, options: dict[str, str]
) -> None:
    frame = np.zeros((64, 64, 4), np.uint8)
    frame[16:48, 16:48] = (*RED, 255)
    data = film([frame] * 8, codec, pix_fmt, container, options=options, layout="rgba")
    frames = [*trained(data, suffix, 2), *prepared(data, suffix, tmp_path).pixels]
    assert len(frames) == 10
    for pixels in frames:
        assert corners(pixels) == [WHITE] * 4
        assert corners(pixels[16:48, 16:48]) == [RED] * 4


@pytest.mark.parametrize(
    ("codec", "pix_fmt"), [("ffv1", "yuv420p10le"), ("ffv1", "gray16le"), ("ffv1", "gbrp16le"), ("ffv1", "yuv444p12le")]
)
def test_deep_videos_keep_their_brightness(tmp_path: Path, codec: str, pix_fmt: str) -> None:
    data = film([np.full((64, 64, 3), 180, np.uint8)] * 8, codec, pix_fmt, "matroska")
    for pixels in (trained(data, ".mkv")[0], prepared(data, ".mkv", tmp_path).pixels[0]):
        assert pixels.mean() == pytest.approx(180, abs=2)


@pytest.mark.parametrize("codec", ["libvpx", "libvpx-vp9"])
def test_a_video_with_alpha_is_turned_and_its_colours_are_named(tmp_path: Path, codec: str) -> None:
    pixels = np.dstack([quarters(), np.full((64, 96), 255, np.uint8)])

    def setup(stream: Any) -> None:
        stream.set_display_rotation(90)
        stream.metadata["alpha_mode"] = "1"

    data = film([pixels] * 2, codec, "yuva420p", "webm", options={"auto-alt-ref": "0"}, setup=setup, layout="rgba")
    plain = film([quarters()] * 2, codec, "yuv420p", "webm", setup=lambda stream: stream.set_display_rotation(90))
    assert trained(data, ".webm").shape == (1, 96, 64, 3)
    assert corners(trained(data, ".webm")[0]) == corners(trained(plain, ".webm")[0])


@pytest.mark.parametrize("container", ["avi", "mov", "matroska"])
@pytest.mark.parametrize(("orientation", "first"), [(1, RED), (3, (0, 0, 0)), (6, BLUE), (8, GREEN)])
def test_an_mjpeg_with_exif_is_turned(tmp_path: Path, container: str, orientation: int, first: tuple[int, ...]) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    jpeg, buffer = io.BytesIO(), io.BytesIO()
    Image.fromarray(quarters()).save(jpeg, "JPEG", quality=95, exif=exif)
    with av.open(buffer, "w", format=container) as output:
        stream: Any = output.add_stream("mjpeg", rate=8)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuvj420p"
        for number in range(2):
            packet = av.Packet(jpeg.getvalue())
            packet.pts = packet.dts = number
            packet.time_base, packet.stream = Fraction(1, 8), stream
            output.mux(packet)
    suffix = {"avi": ".avi", "mov": ".mov", "matroska": ".mkv"}[container]
    shown = prepared(buffer.getvalue(), suffix, tmp_path)
    assert any("side data" in note for note in shown.notes)
    assert corners(trained(buffer.getvalue(), suffix)[0])[0] == first


def test_the_fourth_byte_of_windows_pictures_is_no_alpha() -> None:
    pixels = np.dstack([quarters(), np.zeros((64, 96), np.uint8)])
    data = film([pixels] * 2, "rawvideo", "bgra", "avi", layout="rgba")
    assert corners(trained(data, ".avi")[0]) == [RED, GREEN, BLUE, (0, 0, 0)]


@pytest.mark.parametrize(("depth", "colour", "clear"), [(1, 0, 0), (2, 0, 1), (4, 0, 1), (8, 0, 85), (16, 2, 0x1234)])
def test_the_transparent_colour_of_a_png_is_white(depth: int, colour: int, clear: int) -> None:
    if colour == 2:
        value = pixel = struct.pack(">HHH", clear, clear, clear)
    else:
        value, pixel = struct.pack(">H", clear), b""
    row = pixel * 16 or bytes([sum(clear << shift for shift in range(0, 8, depth))]) * (16 * depth // 8)
    header = struct.pack(">IIBBBBB", 16, 16, depth, colour, 0, 0, 0)
    start, end = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress((b"\0" + row) * 16))
    data = start + chunk(b"tRNS", value) + end + chunk(b"IEND", b"")
    assert trained(data, ".png").min() == 255
    # The control: without the chunk the pixels have their colour.
    assert trained(start + end + chunk(b"IEND", b""), ".png").max() < 255


def test_a_clean_aperture_is_named(tmp_path: Path) -> None:
    plain = film([quarters()] * 2)
    box = struct.pack(">I4sIIIIiIiI", 40, b"clap", 64, 1, 48, 1, 0, 1, 0, 1)
    # At the end of the boxes moov, trak, mdia, minf, stbl, stsd and avc1, which grow by it.
    place, names, lengths = 0, (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"stsd", b"avc1"), []
    for name in names:
        place = plain.index(name, place)
        lengths.append(place - 4)
    end = lengths[-1] + struct.unpack_from(">I", plain, lengths[-1])[0]
    data = bytearray(plain[:end] + box + plain[end:])
    for at in lengths:
        struct.pack_into(">I", data, at, struct.unpack_from(">I", data, at)[0] + len(box))
    for clip, named in ((bytes(data), True), (plain, False)):
        shown = prepared(clip, ".mp4", tmp_path)
        assert any("clap" in note for note in shown.notes) == named


def test_colours_that_are_not_converted_are_named(tmp_path: Path) -> None:
    def transfer(number: int) -> Callable[[Any], None]:
        def setup(stream: Any) -> None:
            stream.codec_context.color_trc = number

        return setup

    for number, named in ((8, True), (5, True), (1, False)):
        notes = prepared(film([quarters()] * 2, setup=transfer(number)), ".mp4", tmp_path).notes
        assert any("transfer characteristics" in note for note in notes) == named
    header = struct.pack(">IIBBBBB", 16, 16, 8, 0, 0, 0, 0)
    for gamma, named in ((100000, True), (45455, False)):
        data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"gAMA", struct.pack(">I", gamma))
        data += chunk(b"IDAT", zlib.compress(bytes(17 * 16))) + chunk(b"IEND", b"")
        assert any("gamma" in note for note in prepared(data, ".png", tmp_path).notes) == named


def chunk(name: bytes, contents: bytes) -> bytes:
    return struct.pack(">I", len(contents)) + name + contents + struct.pack(">I", zlib.crc32(name + contents))


def test_dark_sixteen_bit_pictures_stay_dark() -> None:
    """Values up to 255 of 65535 are black; taken for 8 bits, they would span all of it."""
    buffer = io.BytesIO()
    Image.fromarray(np.full((16, 16), 200, np.uint16)).save(buffer, "PNG")
    assert trained(buffer.getvalue(), ".png").max() == 0
    clear = buffer.getvalue()
    at = clear.index(b"IDAT") - 4
    clear = clear[:at] + chunk(b"tRNS", struct.pack(">H", 200)) + clear[at:]
    assert trained(clear, ".png").min() == 255


def apng(default: Any, frames: Sequence[np.ndarray], **options: Any) -> bytes:
    first, *rest = [Image.fromarray(frame) for frame in frames]
    buffer = io.BytesIO()
    if default is None:
        first.save(buffer, "PNG", save_all=True, append_images=rest, duration=100, **options)
    else:
        Image.fromarray(default).save(
            buffer, "PNG", save_all=True, default_image=True, append_images=[first, *rest], duration=100, **options
        )
    return buffer.getvalue()


def test_the_hidden_picture_of_an_apng_is_not_a_frame(tmp_path: Path) -> None:
    frames = []
    for number in range(4):
        frame = np.zeros((16, 16, 4), np.uint8)
        frame[4 * number : 4 * number + 4] = (*RED, 255)
        frames.append(frame)
    hidden = np.full((16, 16, 4), (0, 0, 255, 255), np.uint8)
    data = apng(hidden, frames, blend=1, disposal=1)
    assert shape_of(data, ".png", "clip").num_frames == 4
    clip = prepared(data, ".png", tmp_path)
    assert clip.notes == ["hidden picture: the one before the animation is left out"]
    for pixels in (trained(data, ".png", 4), clip.pixels):
        assert len(pixels) == 4
        for number, frame in enumerate(pixels):
            rows = [tuple(frame[4 * row + 1, 5]) for row in range(4)]
            assert rows == [RED if row == number else WHITE for row in range(4)]
    control = apng(None, frames, blend=1, disposal=1)
    assert shape_of(control, ".png", "clip").num_frames == 4
    assert prepared(control, ".png", tmp_path).notes == []


@pytest.mark.parametrize("disposal", [0, 1, 2, 3])
def test_what_a_gif_does_not_cover_is_white(tmp_path: Path, disposal: int) -> None:
    """Frames that cover a part of the canvas, with a background colour (blue) that browsers ignore."""
    palette = bytes([*BLUE, *RED, *GREEN, 0, 0, 0])
    data = b"GIF89a" + struct.pack("<HHBBB", 16, 16, 0x81, 0, 0) + palette
    for left, colour in ((0, RED), (8, GREEN)):
        buffer = io.BytesIO()
        Image.new("P", (8, 8)).save(buffer, "GIF")
        alone = buffer.getvalue()
        pixels = alone[alone.index(b"\x2c" + struct.pack("<HHHH", 0, 0, 8, 8)) + 10 : -1]
        data += b"\x21\xf9\x04" + bytes([disposal << 2, 10, 0, 0, 0])
        data += b"\x2c" + struct.pack("<HHHHB", left, 0, 8, 8, 0x80) + bytes([*colour, *colour]) + pixels
    data += b";"
    kept = disposal in (0, 1)
    for first, second in (trained(data, ".gif", 2), prepared(data, ".gif", tmp_path).pixels):
        assert [tuple(first[y, x]) for y, x in ((3, 3), (3, 12), (12, 3))] == [RED, WHITE, WHITE]
        assert [tuple(second[y, x]) for y, x in ((3, 3), (3, 12), (12, 3))] == [RED if kept else WHITE, GREEN, WHITE]


@pytest.mark.parametrize("alpha", [0, 0x10])
@pytest.mark.parametrize("disposal", [0, 1])
def test_what_a_webp_does_not_cover_is_white(tmp_path: Path, alpha: int, disposal: int) -> None:
    """With and without the flag that it has alpha, and with a background colour (blue) that browsers ignore."""

    def part(name: bytes, contents: bytes) -> bytes:
        return name + struct.pack("<I", len(contents)) + contents + bytes(len(contents) % 2)

    def uint24(*numbers: int) -> bytes:
        return b"".join(number.to_bytes(3, "little") for number in numbers)

    parts = part(b"VP8X", bytes([0b10 | alpha, 0, 0, 0]) + uint24(15, 15)) + part(
        b"ANIM", bytes([255, 0, 0, 255, 0, 0])
    )
    for left, colour in ((0, RED), (8, GREEN)):
        buffer = io.BytesIO()
        Image.new("RGB", (8, 8), colour).save(buffer, "WEBP", lossless=True)
        head = uint24(left // 2, 0, 7, 7, 100) + bytes([disposal])
        parts += part(b"ANMF", head + buffer.getvalue()[12:])
    data = b"RIFF" + struct.pack("<I", len(parts) + 4) + b"WEBP" + parts
    for first, second in (trained(data, ".webp", 2), prepared(data, ".webp", tmp_path).pixels):
        assert [tuple(first[y, x]) for y, x in ((3, 3), (3, 12), (12, 3))] == [RED, WHITE, WHITE]
        assert [tuple(second[y, x]) for y, x in ((3, 3), (3, 12), (12, 3))] == [
            WHITE if disposal else RED,
            GREEN,
            WHITE,
        ]


@pytest.mark.parametrize("transfer", [PQ, HLG])
def test_hdr_is_tone_mapped(tmp_path: Path, transfer: int) -> None:
    """ITU-R BT.2408: the reference white of 203 cd/m2 has the code 58% in PQ, 75% in HLG."""
    white = 0.58 if transfer == PQ else 0.75
    codes = (np.array([[[0] * 3, [white] * 3, [1.0] * 3, [white / 2] * 3]]) * 65535).astype(np.uint16)
    black, reference, peak, grey = to_srgb(codes, transfer, 9)[0].astype(int)
    assert black.max() == 0
    assert 210 < reference.min() < 250
    assert peak.min() >= 254
    assert 20 < grey.min() < 130
    assert np.ptp(reference) <= 1

    def setup(stream: Any) -> None:
        stream.codec_context.color_trc, stream.codec_context.color_primaries = transfer, 9
        stream.codec_context.colorspace = 9

    frame = np.full((64, 64, 3), round(255 * white), np.uint8)
    data = film([frame] * 8, "libx264", "yuv420p10le", setup=setup)
    clip = prepared(data, ".mp4", tmp_path)
    assert clip.notes == ["HDR or wide gamut: converted to sRGB"]
    for pixels in (trained(data, ".mp4")[0], clip.pixels[0]):
        assert pixels.mean() == pytest.approx(reference.mean(), abs=4)


def test_colour_profiles_are_applied() -> None:
    """A profile with red and green exchanged, made from sRGB's; sRGB itself changes nothing."""
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    swapped = srgb.replace(b"rXYZ", b"tXYZ", 1).replace(b"gXYZ", b"rXYZ", 1).replace(b"tXYZ", b"gXYZ", 1)
    swapped = swapped.replace("sRGB".encode("utf-16-be"), "oRGB".encode("utf-16-be"))
    for profile, colour in ((srgb, RED), (swapped, GREEN)):
        buffer = io.BytesIO()
        Image.new("RGB", (16, 16), RED).save(buffer, "PNG", icc_profile=profile)
        assert corners(trained(buffer.getvalue(), ".png")[0]) == [colour] * 4


def test_frames_are_taken_evenly_over_time(tmp_path: Path) -> None:
    """The first picture stays for 3 s of 3.28 s; by number it would be one of four."""
    pictures = [np.full((64, 64, 3), RED, np.uint8)]
    pictures += [np.full((64, 64, 3), (0, 30 * number, 200), np.uint8) for number in range(7)]
    buffer = io.BytesIO()
    images = [Image.fromarray(picture) for picture in pictures]
    durations = [3000] + [40] * 7
    images[0].save(buffer, "GIF", save_all=True, append_images=images[1:], duration=durations)
    webp = io.BytesIO()
    images[0].save(webp, "WEBP", save_all=True, append_images=images[1:], duration=durations)
    video = film(pictures, times=[0] + [3000 + 40 * number for number in range(7)])
    for suffix, data in ((".gif", buffer.getvalue()), (".webp", webp.getvalue()), (".mp4", video)):
        frames = trained(data, suffix, 4)
        assert [corners(frame)[0] == RED for frame in frames] == [True] * 4, suffix
        assert [corners(frame)[0] == RED for frame in trained(data, suffix, 8)] == [True] * 8, suffix


@pytest.mark.parametrize(
    ("durations", "count", "expected"),
    [
        ([40] * 10, 4, [0, 2, 5, 7]),
        ([33, 34, 33, 33, 34, 33, 33], 3, [0, 2, 4]),  # the rounding of a container is no variable rate
        ([300, 100, 100, 100], 4, [0, 0, 1, 2]),
        ([100, 100, 100, 300], 4, [0, 1, 3, 3]),
        ([0, 100, 100], 2, [1, 2]),
        ([0, 0], 2, [0, 1]),
    ],
)
def test_even_spacing(durations: list[float], count: int, expected: list[int]) -> None:
    assert evenly_spaced(durations, count) == expected


def test_a_cover_picture_is_not_the_video(tmp_path: Path) -> None:
    """A container whose first stream is a cover picture, as music and podcast tools write them."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as output:
        cover: Any = output.add_stream("png", rate=1)
        cover.width, cover.height, cover.pix_fmt = 32, 32, "rgb24"
        cover.disposition = av.stream.Disposition.attached_pic
        stream: Any = output.add_stream("libx264", rate=8)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        output.mux(cover.encode(av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")))
        for _ in range(8):
            output.mux(stream.encode(av.VideoFrame.from_ndarray(quarters(), format="rgb24")))
        output.mux(cover.encode(None))
        output.mux(stream.encode(None))
    data = buffer.getvalue()
    assert shape_of(data, ".mp4", "clip") == (8, 96, 64)
    assert corners(trained(data, ".mp4")[0]) == UPRIGHT


def test_limits_hold_for_the_size_as_shown() -> None:
    def setup(stream: Any) -> None:
        stream.codec_context.sample_aspect_ratio = Fraction(2, 1)

    data = film([quarters()] * 4, setup=setup)
    assert video_size(data, "mov", Limits(max_frame_pixels=192 * 64)) == (192, 64)
    with pytest.raises(Undecodable, match=r"192x64"):
        video_size(data, "mov", Limits(max_frame_pixels=192 * 64 - 1))


@pytest.mark.parametrize(("width", "height", "matrix"), [(1280, 720, "ITU709"), (640, 480, "ITU601")])
def test_the_matrix_of_untagged_videos_is_guessed_as_players_do(width: int, height: int, matrix: str) -> None:
    """ITU-R BT.709 for HD, BT.601 below; with the other one, this green would be off by 20."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="matroska") as output:
        stream: Any = output.add_stream("ffv1", rate=8)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv444p"
        pixels = np.full((height, width, 3), (30, 200, 60), np.uint8)
        frame = av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(format="yuv444p", dst_colorspace=matrix)
        frame.colorspace = 2  # unspecified
        output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    shown = decode_clip(buffer.getvalue(), ".mkv", "clip", num_frames=1, resolution=16)[0, :, 8, 8]
    assert shown.tolist() == pytest.approx([30, 200, 60], abs=3)


@pytest.mark.parametrize("codec", ["libx264", "mpeg4"])
@pytest.mark.parametrize("size", [(1280, 720), (64, 64)])
def test_written_videos_are_read_with_the_same_colours(codec: str, size: tuple[int, int]) -> None:
    """The matrix is stated in the file; below HD, a guess would be another one."""
    frames = np.full((3, size[1], size[0], 3), (30, 200, 60), np.uint8)
    data = encode_video(frames, container="mp4", codec=codec, pixel_format="yuv420p", fps=8, options={})
    shown = decode_clip(data, ".mp4", "clip", num_frames=1, resolution=16)[0, :, 8, 8]
    assert shown.tolist() == pytest.approx([30, 200, 60], abs=4)


def test_training_names_the_first_clip_of_each_oddity(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("mobius_train.data.decode._noted", set())
    plain = film([quarters()] * 4)
    interlaced = film([quarters()] * 4, options={"x264-params": "interlaced=1"})
    for name, data in (("plain.mp4", plain), ("first.mp4", interlaced), ("second.mp4", interlaced)):
        decode_clip(data, ".mp4", name, num_frames=2, resolution=16)
    (message,) = [record.getMessage() for record in caplog.records]
    assert "first.mp4: interlaced" in message
