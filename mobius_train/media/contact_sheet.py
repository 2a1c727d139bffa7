"""A contact sheet: one picture with the frames of several clips."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from mobius_train.media.fonts import caption_length, draw_caption
from mobius_train.media.pixels import enlarge_frames, to_images

SHEET_SIDE = 112  # pixels; smaller frames are enlarged to at least this
SHEET_COLUMNS = 8
FONT_SIZE = 14


def contact_sheet(clips: Sequence[Tensor], captions: Sequence[str], path: Path) -> None:
    """Write one PNG in which every clip is a strip of frames under its caption.

    Clips are (F, 3, H, W) uint8 of any sizes. A strip shows at most SHEET_COLUMNS evenly spaced frames; short strips
    share a row. For the font see `draw_caption`.
    """
    strips = [_strip(frames, caption) for frames, caption in zip(clips, captions, strict=True)]
    if not strips:
        raise ValueError("a contact sheet needs at least one clip")
    gap = 8
    widest = max(SHEET_COLUMNS * SHEET_SIDE, *(strip.width for strip in strips))
    lines: list[list[Image.Image]] = [[]]
    for strip in strips:
        if lines[-1] and sum(other.width + gap for other in lines[-1]) + strip.width > widest:
            lines.append([])
        lines[-1].append(strip)
    width = max(sum(strip.width + gap for strip in line) for line in lines) + gap
    height = sum(max(strip.height for strip in line) + gap for line in lines) + gap
    sheet = Image.new("RGB", (width, height), "white")
    y = gap
    for line in lines:
        x, tallest = gap, max(strip.height for strip in line)
        for strip in line:
            sheet.paste(strip, (x, y + tallest - strip.height))
            x += strip.width + gap
        y += tallest + gap
    sheet.save(path)


def _strip(frames: Tensor, caption: str) -> Image.Image:
    """The frames next to each other, with the caption above."""
    shown = torch.linspace(0, len(frames) - 1, min(len(frames), SHEET_COLUMNS)).round().long()
    images = to_images(enlarge_frames(frames[shown], SHEET_SIDE))
    gap = 2
    width = len(images) * (images[0].width + gap) - gap
    text = _wrapped(caption, width)
    text_height = 18 * len(text) + 4
    strip = Image.new("RGB", (width, text_height + images[0].height), "white")
    for number, line in enumerate(text):
        draw_caption(strip, (0, 18 * number), line, FONT_SIZE)
    for number, image in enumerate(images):
        strip.paste(image, (number * (image.width + gap), text_height))
    return strip


def _wrapped(caption: str, width: int, most: int = 3) -> list[str]:
    """Wrap a caption to the width, in at most `most` lines; long words and scripts without spaces break anywhere."""
    lines = [""]
    for word in re.findall(r"\S+", caption):
        candidate = f"{lines[-1]} {word}".strip()
        if caption_length(candidate, FONT_SIZE) <= width:
            lines[-1] = candidate
            continue
        lines.append("")
        for character in word:
            if lines[-1] and caption_length(lines[-1] + character, FONT_SIZE) > width:
                lines.append("")
            lines[-1] += character
    lines = [line for line in lines if line]
    if len(lines) <= most:
        return lines
    last = lines[most - 1]
    while last and caption_length(last + "...", FONT_SIZE) > width:
        last = last[:-1]
    return [*lines[: most - 1], last + "..."]
