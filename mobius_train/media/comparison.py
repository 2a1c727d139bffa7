"""One animated picture that shows the clips of several prompts in labelled rows: data, before training, after it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from mobius_train.media.fonts import caption_length, draw_caption
from mobius_train.media.gif import write_gif
from mobius_train.media.pixels import enlarge_frames

CELL_SIDE = 96  # pixels; smaller frames are enlarged to at least this
COLUMNS = 8
GAP = 6
LABEL_WIDTH = 64
CAPTION_HEIGHT = 20
FONT_SIZE = 13


def write_comparison(
    rows: Mapping[str, Sequence[Tensor | None]], captions: Sequence[str], path: Path, fps: float = 8.0
) -> None:
    """Write a GIF with a column for each caption and a row for each label. After COLUMNS captions the rows repeat.

    Args:
        rows: clips by label, one for each caption: (F, 3, H, W) uint8, of one size; None leaves the cell white.
    """
    clips = [clip for row in rows.values() for clip in row if clip is not None]
    num_frames = max(len(clip) for clip in clips)
    cell = enlarge_frames(clips[0], CELL_SIDE).shape[-2:]
    blocks = []
    for start in range(0, len(captions), COLUMNS):
        part = slice(start, start + COLUMNS)
        block = [_captions(captions[part], cell[1], min(COLUMNS, len(captions))).expand(num_frames, -1, -1, -1)]
        for label, row in rows.items():
            cells = [_label(label, cell[0]).expand(num_frames, -1, -1, -1)]
            cells += [_cell(clip, num_frames, cell) for clip in row[part]]
            cells += [_cell(None, num_frames, cell)] * (min(COLUMNS, len(captions)) - len(row[part]))
            block.append(torch.cat(cells, dim=-1))
        blocks.append(torch.cat(block, dim=-2))
    write_gif(torch.cat(blocks, dim=-2), path, fps)


def _cell(clip: Tensor | None, num_frames: int, size: Sequence[int]) -> Tensor:
    """(num_frames, 3, height + GAP, width + GAP); a shorter clip starts again."""
    height, width = size
    cell = torch.full((num_frames, 3, height + GAP, width + GAP), 255, dtype=torch.uint8)
    if clip is not None:
        cell[..., :height, :width] = enlarge_frames(clip[torch.arange(num_frames) % len(clip)], CELL_SIDE)
    return cell


def _captions(captions: Sequence[str], width: int, columns: int) -> Tensor:
    line = Image.new("RGB", (LABEL_WIDTH + columns * (width + GAP), CAPTION_HEIGHT), "white")
    for column, caption in enumerate(captions):
        _write(line, caption, LABEL_WIDTH + column * (width + GAP), 2, width)
    return _tensor(line)


def _label(label: str, height: int) -> Tensor:
    box = Image.new("RGB", (LABEL_WIDTH, height + GAP), "white")
    _write(box, label, 4, height // 2 - 8, LABEL_WIDTH - 4)
    return _tensor(box)


def _write(image: Image.Image, text: str, x: int, y: int, width: int) -> None:
    while len(text) > 1 and caption_length(text, FONT_SIZE) > width:
        text = text[:-2] + "…" if text.endswith("…") else text[:-1] + "…"
    draw_caption(image, (x, y), text, FONT_SIZE)


def _tensor(image: Image.Image) -> Tensor:
    """(1, 3, H, W) uint8."""
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return rearrange(pixels, "(h w c) -> 1 c h w", h=image.height, w=image.width)
