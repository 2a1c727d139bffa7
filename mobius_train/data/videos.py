"""Frames of videos as players show them: upright, with square pixels, in sRGB, on white."""

from __future__ import annotations

import io
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from itertools import pairwise
from typing import Any, NamedTuple, TypeVar

import av
import numpy as np
from av.sidedata.sidedata import Type as SideData
from av.video.reformatter import Colorspace
from PIL import Image

from mobius_train.data.colour import colour_notes, needs_conversion, to_srgb
from mobius_train.data.limits import Limits, Undecodable
from mobius_train.data.orientation import OF_EXIF, UPRIGHT, Turn, turn_of_matrix
from mobius_train.data.pictures import on_white
from mobius_train.data.timing import frame_rate

MAX_LOST = 0.1  # largest share of a video's frames that may fail to decode
UNSPECIFIED = 2  # a property of ITU-T H.273 that the file does not state
# FFmpeg's own decoders ignore the alpha channel of these codecs in WebM.
ALPHA_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}
ODD_SIDE_DATA = {SideData.STEREO3D: "stereo 3D: shown as stored", SideData.SPHERICAL: "360 degrees: shown as stored"}

# The length and the name of the box in which an MP4 names the part of its frames to show (ISO/IEC 14496-12, 12.1.4).
CLEAN_APERTURE = struct.pack(">I", 40) + b"clap"
# Turns by the degrees that FFmpeg reports, counterclockwise.
TURNS = {0: OF_EXIF[1], 90: OF_EXIF[8], -90: OF_EXIF[6], 180: OF_EXIF[3], -180: OF_EXIF[3]}

T = TypeVar("T")


class _Decoded(NamedTuple):
    """A frame, and the frame with its properties: its own, or that of FFmpeg's own decoder. opaque: its fourth channel
    is no alpha."""

    frame: Any
    properties: Any
    opaque: bool = False


@contextmanager
def open_video(data: bytes, demuxer: str, limits: Limits) -> Iterator[tuple[Any, Any]]:
    """Open the container and its first video stream that is not a cover picture.

    Raises:
        Undecodable: the declared size exceeds the limits, or no stream can be decoded.
        DAMAGED: the data are damaged.
    """
    with av.open(io.BytesIO(data), format=demuxer) as container:
        films = [s for s in container.streams.video if not s.disposition & av.stream.Disposition.attached_pic]
        if not films:
            raise Undecodable("no picture", f"{len(container.streams)} other streams")
        stream = films[0]
        if stream.codec_context is None:
            raise Undecodable("no picture", "unknown codec")
        stream.codec_context.thread_count = 1  # parallelism comes from processes, one file each
        width, height = stream.codec_context.width, stream.codec_context.height
        limits.check(width, height, 1)
        limits.check(*_square_size(width, height, stream.sample_aspect_ratio), 1)
        yield container, stream


def video_durations(data: bytes, demuxer: str, limits: Limits) -> list[float]:
    """Durations of a video's frames in ms, from the container only; raises as `open_video`."""
    packets: list[tuple[float, float]] = []  # start and stated duration in s
    with open_video(data, demuxer, limits) as (container, stream):
        step = 1 / float(stream.average_rate or 25)
        for packet in container.demux(stream):
            if packet.size and not packet.is_discard:
                start = len(packets) * step if packet.pts is None else float(packet.pts * packet.time_base)
                packets.append((start, float((packet.duration or 0) * packet.time_base)))
                if len(packets) > limits.max_frames:
                    raise Undecodable("too many frames", f"more than {limits.max_frames}")
    packets.sort()
    return _durations([start for start, _ in packets], 1000 * packets[-1][1]) if packets else []


def _durations(times: list[float], last: float = 0.0) -> list[float]:
    """Durations in ms of frames that start at `times`, in s.

    Args:
        last: of the last frame, as stated. Containers do not store it reliably, so it counts only if it is longer than
            the median.
    """
    durations = [1000 * (after - before) for before, after in pairwise(times)]
    return [*durations, max(last, 1000 / frame_rate(durations))]


def video_size(data: bytes, demuxer: str, limits: Limits) -> tuple[int, int]:
    """Width and height as shown, from the first frame; raises as `video_frames`."""
    with open_video(data, demuxer, limits) as (container, stream):
        for decoded in _decoded(container, stream):
            width, height = decoded.frame.width, decoded.frame.height
            return _turn(decoded.properties).size(*_square_size(width, height, stream.sample_aspect_ratio))
    raise Undecodable("no picture", "no frame can be decoded")


def video_frames(
    data: bytes,
    demuxer: str,
    limits: Limits,
    choose: Callable[[list[float]], list[int]],
    finish: Callable[[Image.Image], T],
) -> tuple[list[T], list[str]]:
    """Decode the chosen frames of a video.

    Args:
        choose: takes the durations of all frames (ms), returns frame numbers in ascending order. It is called again if
            the container did not tell the frames that there are.
        finish: what to keep of a frame, an RGB image as it is shown.

    Returns:
        The finished frames, and notes on what is odd about the video.

    Raises:
        Undecodable: a frame exceeds the limits, too many frames are lost, or there is none.
        DAMAGED: the data are damaged.
    """
    durations = video_durations(data, demuxer, limits)
    packets = len(durations)
    if not packets:
        raise Undecodable("no picture", "it has no video frame")
    while True:
        numbers = choose(durations)
        repeats = Counter(numbers)
        notes = dict.fromkeys(["clean aperture (MP4 clap): shown whole"] if CLEAN_APERTURE in data else [])
        kept: list[T] = []
        times: list[float] = []
        with open_video(data, demuxer, limits) as (container, stream):
            for number, decoded in enumerate(_decoded(container, stream)):
                frame = decoded.frame
                limits.check(frame.width, frame.height, 1)
                if number >= limits.max_frames:
                    raise Undecodable("too many frames", f"more than {limits.max_frames}")
                times.append(frame.time if frame.time is not None else number / float(stream.average_rate or 25))
                if number in repeats:
                    notes |= dict.fromkeys(_notes(decoded, stream))
                    kept += [finish(_shown(decoded, stream.sample_aspect_ratio))] * repeats[number]
                if numbers == [0]:
                    return kept, list(notes)
        if not times:
            raise Undecodable("no picture", "no frame can be decoded")
        if len(times) < (1 - MAX_LOST) * packets:
            raise Undecodable("damaged", f"only {len(times)} of {packets} frames can be decoded")
        if len(times) == len(durations):
            return kept, list(notes)
        durations = _durations(sorted(times))


def _decoded(container: Any, stream: Any) -> Iterator[_Decoded]:
    codec = stream.codec_context
    if stream.metadata.get("alpha_mode") != "1" or codec.name not in ALPHA_DECODERS:
        # Of 32 bits a pixel, Windows' uncompressed pictures (BI_RGB) leave 8 undefined.
        opaque = codec.name == "rawvideo" and container.format.name == "avi" and not any(codec.codec_tag.encode())
        for frame in container.decode(stream):
            yield _Decoded(frame, frame, opaque)
        return
    decoder = av.CodecContext.create(ALPHA_DECODERS[codec.name], "r")
    decoder.thread_count = 1
    properties = None
    for packet in container.demux(stream):
        # The container's rotation and colours reach FFmpeg's own decoder alone.
        properties = properties or next(iter(codec.decode(packet)), None)
        for frame in decoder.decode(packet):
            yield _Decoded(frame, properties or frame)


def _notes(decoded: _Decoded, stream: Any) -> list[str]:
    frame = decoded.properties
    notes = [note for kind, note in ODD_SIDE_DATA.items() if _side_data(frame, kind) is not None]
    notes += colour_notes(frame.color_trc, frame.color_primaries)
    if frame.interlaced_frame:
        notes.append("interlaced: shown as stored")
    if _side_data_is_unknown(frame):
        notes.append("side data of a kind that PyAV does not know: turned as FFmpeg reports, a mirroring is not seen")
    if stream.metadata.get("alpha_mode") == "1" and stream.codec_context.name not in ALPHA_DECODERS:
        notes.append("alpha channel that FFmpeg does not decode: shown opaque")
    return notes


def _side_data_is_unknown(frame: Any) -> bool:
    """PyAV refuses all side data of a frame if one is of a kind that its FFmpeg has and it does not."""
    try:
        _ = frame.side_data
    except ValueError:
        return True
    return False


def _side_data(frame: Any, kind: SideData) -> bytes | None:
    try:
        return bytes(frame.side_data[kind])
    except (KeyError, ValueError):
        return None


def _turn(frame: Any) -> Turn:
    """
    Raises:
        Undecodable: the frame is rotated by an angle that is no multiple of 90 degrees.
    """
    if _side_data_is_unknown(frame):
        if frame.rotation not in TURNS:
            raise Undecodable("odd angle", f"{frame.rotation} degrees")
        return TURNS[frame.rotation]
    matrix = _side_data(frame, SideData.DISPLAYMATRIX)
    return UPRIGHT if matrix is None else turn_of_matrix(struct.unpack("=9i", matrix[:36]))


def _square_size(width: int, height: int, aspect: Fraction | None) -> tuple[int, int]:
    """The size with square pixels: one side is enlarged, none is reduced.

    Args:
        aspect: width over height of a pixel; None or 0 if the file does not state it.
    """
    if not aspect or aspect < 0:
        return width, height
    return (round(width * aspect), height) if aspect > 1 else (width, round(height / aspect))


def _shown(decoded: _Decoded, aspect: Fraction | None) -> Image.Image:
    frame, properties = decoded.frame, decoded.properties
    transfer, primaries = properties.color_trc, properties.color_primaries
    deep = needs_conversion(transfer, primaries)
    alpha = frame.format.has_palette or any(component.is_alpha for component in frame.format.components)
    alpha = alpha and not decoded.opaque
    # The matrix of videos that do not state it: ITU-R BT.709 for HD, as in players, BT.601 below.
    guessed = (
        properties.colorspace == UNSPECIFIED and not frame.format.is_rgb and (frame.width > 1024 or frame.height > 576)
    )
    form = ("rgba64le" if alpha else "rgb48le") if deep else ("rgba" if alpha else "rgb24")
    pixels = frame.reformat(format=form, src_colorspace=Colorspace.ITU709 if guessed else None, threads=1).to_ndarray()
    if deep:
        colours = to_srgb(np.ascontiguousarray(pixels[..., :3]), transfer, primaries)
        pixels = np.dstack([colours, (pixels[..., 3] >> 8).astype(np.uint8)]) if alpha else colours
    image = on_white(Image.fromarray(pixels))
    size = _square_size(frame.width, frame.height, aspect)
    if image.size != size:
        image = image.resize(size, Image.Resampling.LANCZOS)
    return _turn(properties).apply(image)
