"""Frames of videos as players show them: upright, with square pixels, in sRGB, on white."""

from __future__ import annotations

import io
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from itertools import pairwise
from typing import Any, TypeVar

import av
import numpy as np
from av.sidedata.sidedata import Type as SideData
from av.video.reformatter import Colorspace
from PIL import Image

from mobius_train.data.colour import needs_conversion, to_srgb
from mobius_train.data.limits import Limits, Undecodable
from mobius_train.data.orientation import UPRIGHT, Turn, turn_of_matrix
from mobius_train.data.pictures import on_white
from mobius_train.data.timing import frame_rate

MAX_LOST = 0.1  # largest share of a video's frames that may fail to decode
UNSPECIFIED = 2  # a property of ITU-T H.273 that the file does not state
# FFmpeg's own decoders ignore the alpha channel of these codecs in WebM.
ALPHA_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}
ODD_SIDE_DATA = {SideData.STEREO3D: "stereo 3D: shown as stored", SideData.SPHERICAL: "360 degrees: shown as stored"}

T = TypeVar("T")


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
        for frame in _decoded(container, stream):
            return _turn(frame).size(*_square_size(frame.width, frame.height, stream.sample_aspect_ratio))
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
        notes: dict[str, None] = {}
        kept: list[T] = []
        times: list[float] = []
        with open_video(data, demuxer, limits) as (container, stream):
            for number, frame in enumerate(_decoded(container, stream)):
                limits.check(frame.width, frame.height, 1)
                if number >= limits.max_frames:
                    raise Undecodable("too many frames", f"more than {limits.max_frames}")
                times.append(frame.time if frame.time is not None else number / float(stream.average_rate or 25))
                if number in repeats:
                    notes |= dict.fromkeys(_notes(frame))
                    kept += [finish(_shown(frame, stream.sample_aspect_ratio))] * repeats[number]
                if numbers == [0]:
                    return kept, list(notes)
        if not times:
            raise Undecodable("no picture", "no frame can be decoded")
        if len(times) < (1 - MAX_LOST) * packets:
            raise Undecodable("damaged", f"only {len(times)} of {packets} frames can be decoded")
        if len(times) == len(durations):
            return kept, list(notes)
        durations = _durations(sorted(times))


def _decoded(container: Any, stream: Any) -> Iterator[Any]:
    name = stream.codec_context.name
    if stream.metadata.get("alpha_mode") != "1" or name not in ALPHA_DECODERS:
        yield from container.decode(stream)
        return
    decoder = av.CodecContext.create(ALPHA_DECODERS[name], "r")
    decoder.thread_count = 1
    for packet in container.demux(stream):
        yield from decoder.decode(packet)


def _notes(frame: Any) -> list[str]:
    notes = [note for kind, note in ODD_SIDE_DATA.items() if _side_data(frame, kind) is not None]
    if needs_conversion(frame.color_trc, frame.color_primaries):
        notes.append("HDR or wide gamut: converted to sRGB")
    if frame.interlaced_frame:
        notes.append("interlaced: shown as stored")
    return notes


def _side_data(frame: Any, kind: SideData) -> bytes | None:
    try:
        return bytes(frame.side_data[kind])
    except KeyError:
        return None


def _turn(frame: Any) -> Turn:
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


def _shown(frame: Any, aspect: Fraction | None) -> Image.Image:
    deep = needs_conversion(frame.color_trc, frame.color_primaries)
    alpha = frame.format.has_palette or any(component.is_alpha for component in frame.format.components)
    # The matrix of videos that do not state it: ITU-R BT.709 for HD, as in players, BT.601 below.
    guessed = frame.colorspace == UNSPECIFIED and not frame.format.is_rgb and (frame.width > 1024 or frame.height > 576)
    form = ("rgba64le" if alpha else "rgb48le") if deep else ("rgba" if alpha else "rgb24")
    pixels = frame.reformat(format=form, src_colorspace=Colorspace.ITU709 if guessed else None, threads=1).to_ndarray()
    if deep:
        colours = to_srgb(np.ascontiguousarray(pixels[..., :3]), frame.color_trc, frame.color_primaries)
        pixels = np.dstack([colours, (pixels[..., 3] >> 8).astype(np.uint8)]) if alpha else colours
    image = on_white(Image.fromarray(pixels))
    size = _square_size(frame.width, frame.height, aspect)
    if image.size != size:
        image = image.resize(size, Image.Resampling.LANCZOS)
    return _turn(frame).apply(image)
