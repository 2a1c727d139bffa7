"""The report as one HTML file: the figures, and clips with theirs. It needs no server and no other file."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from torch import Tensor
from torch.nn.functional import interpolate

from mobius_train.evaluate.clips import Clips
from mobius_train.evaluate.report import ClipResult, Report
from mobius_train.evaluate.summary import rows
from mobius_train.evenly import evenly
from mobius_train.files import replace_file
from mobius_train.media.pixels import enlarge_frames, to_images
from mobius_train.prepare.webp import encode_webp

SMALLEST, LARGEST = 128, 256  # pixels of a clip's shorter and longer side on the page
QUALITY = 80  # of WebP


class _Shown(NamedTuple):
    result: ClipResult
    picture: str


def write_page(report: Report, clips: Clips, path: Path, most: int = 48) -> None:
    """Write the page with at most `most` clips, spread evenly from the best to the worst order.

    Args:
        clips: those of the report, which are decoded again.

    Raises:
        MobiusError: a clip cannot be decoded.
        OSError: the page cannot be written.
    """
    numbers = {entry.key: number for number, entry in enumerate(clips.entries)}
    shown = [
        _Shown(result, _data_uri(clips.read(numbers[result.key]).frames, result.fps))
        for result in evenly(sorted(report.clips, key=_order), most)
    ]
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    names = [name for name, result in report.dimensions.items() if result.value is not None]
    page = environment.get_template("page.html.jinja").render(
        report=report, rows=list(rows(report)), shown=shown, names=names
    )
    replace_file(path, page)


def _order(result: ClipResult) -> float:
    return result.values.get("order", float("inf"))


def _data_uri(frames: Tensor, fps: float) -> str:
    """Frames (F, 3, H, W) as an animated WebP."""
    frames = enlarge_frames(frames, SMALLEST)
    longest = max(frames.shape[-2:])
    if longest > LARGEST:
        size = [max(1, round(side * LARGEST / longest)) for side in frames.shape[-2:]]
        frames = interpolate(frames, size, mode="bilinear", antialias=True)
    data = encode_webp(to_images(frames), round(1000 / fps), QUALITY)
    return f"data:image/webp;base64,{base64.b64encode(data).decode()}"
