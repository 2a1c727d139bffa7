"""Clips as files that a person can look at: GIF, MP4, and a contact sheet of several clips.

Clips are uint8 (F, 3, H, W). Small frames are enlarged by a whole factor, pixel by pixel, to be seen.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from mobius_train.errors import MobiusError

FORMATS = ("gif", "mp4", "png")
CLIP_SIDE = 192  # pixels: GIF and MP4 frames are enlarged to this at least
SHEET_SIDE = 112  # the contact sheet's frames
SHEET_COLUMNS = 8
SHEET_NAME = "contact_sheet.png"


def enlarge(frames: Tensor, side: int) -> Tensor:
    """(..., H, W) by the smallest whole factor that makes the shorter side `side` pixels or more."""
    factor = max(1, -(-side // min(frames.shape[-2:])))
    return frames.repeat_interleave(factor, -1).repeat_interleave(factor, -2)


def to_images(frames: Tensor) -> list[Image.Image]:
    """uint8 (F, 3, H, W) to RGB pictures."""
    if frames.ndim != 4 or frames.shape[1] != 3 or frames.dtype != torch.uint8:
        raise ValueError(f"a clip is uint8 (F, 3, H, W), got {tuple(frames.shape)} {frames.dtype}")
    return [Image.fromarray(frame) for frame in frames.permute(0, 2, 3, 1).contiguous().cpu().numpy()]


def write_gif(frames: Tensor, path: Path, fps: float = 8.0) -> None:
    """A GIF that loops for ever, with one palette of 256 colours from all of the clip's frames.

    Frames (F, 3, H, W) uint8. A frame equal to the one before it is stored as a longer duration; the format
    counts in hundredths of a second.
    """
    first, *rest = _indexed(frames)
    first.save(path, save_all=True, append_images=rest, duration=round(1000 / fps), loop=0, disposal=1)


def _indexed(frames: Tensor) -> list[Image.Image]:
    """Enlarged palette pictures that share one palette, every pixel at its nearest colour.

    Pillow's own look-up is approximate (5 dB worse on shaded clips, and it greys a white background), and
    dithering would crawl from frame to frame.
    """
    # A quarter of a million pixels show all of a clip's colours; more only take time.
    step = max(1, math.isqrt(frames[:, 0].numel() // 2**18))
    strip = torch.cat(list(frames[..., ::step, ::step]), dim=1).unsqueeze(0)
    palette = to_images(strip)[0].quantize(256, method=Image.Quantize.MEDIANCUT, kmeans=1).getpalette() or []
    entries = torch.tensor(palette).float().view(-1, 3)

    red, green, blue = frames.cpu().long().unbind(1)
    codes, pixels = torch.unique(red << 16 | green << 8 | blue, return_inverse=True)
    colours = torch.stack([codes >> 16, codes >> 8 & 255, codes & 255], dim=1).float()
    nearest = torch.cat([torch.cdist(part, entries).argmin(1) for part in colours.split(65536)])
    indices = enlarge(nearest.to(torch.uint8)[pixels], CLIP_SIDE)

    size = (indices.shape[2], indices.shape[1])
    pictures = [Image.frombytes("P", size, frame.contiguous().numpy().tobytes()) for frame in indices]
    for picture in pictures:
        picture.putpalette(palette)
    return pictures


def write_mp4(frames: Tensor, path: Path, fps: float = 8.0) -> None:
    """H.264 (MPEG-4 Part 2 where PyAV lacks libx264), yuv420p, which every player reads.

    Frames (F, 3, H, W) uint8; odd sizes repeat their last row or column, for yuv420p wants even ones.
    """
    frames = enlarge(frames, CLIP_SIDE)
    height, width = (size + size % 2 for size in frames.shape[-2:])
    rows = torch.arange(height).clamp(max=frames.shape[-2] - 1)
    columns = torch.arange(width).clamp(max=frames.shape[-1] - 1)
    h264 = "libx264" in av.codecs_available
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264" if h264 else "mpeg4", rate=Fraction(fps).limit_denominator(1000))
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.options = {"crf": "16"} if h264 else {"qscale": "2"}
        for image in to_images(frames[..., rows, :][..., columns]):
            container.mux(stream.encode(av.VideoFrame.from_image(image)))
        container.mux(stream.encode(None))


def contact_sheet(clips: Sequence[Tensor], captions: Sequence[str], path: Path) -> None:
    """One PNG: every clip is a strip of its frames under its caption.

    Clips (F, 3, H, W) uint8, of any sizes. Of a longer clip SHEET_COLUMNS frames are shown, evenly chosen;
    shorter strips share a line. Characters that Pillow's own font lacks (Chinese among them) show as boxes.
    """
    strips = [_strip(frames, caption) for frames, caption in zip(clips, captions, strict=True)]
    if not strips:
        raise ValueError("a contact sheet of no clips")
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
    """The frames side by side, the caption above them."""
    shown = torch.linspace(0, len(frames) - 1, min(len(frames), SHEET_COLUMNS)).round().long()
    images = to_images(enlarge(frames[shown], SHEET_SIDE))
    gap = 2
    width = len(images) * (images[0].width + gap) - gap
    font = ImageFont.load_default(size=14)
    text = _wrapped(caption, font, width)
    text_height = 18 * len(text) + 4
    strip = Image.new("RGB", (width, text_height + images[0].height), "white")
    draw = ImageDraw.Draw(strip)
    for number, line in enumerate(text):
        draw.text((0, 18 * number), line, fill="black", font=font)
    for number, image in enumerate(images):
        strip.paste(image, (number * (image.width + gap), text_height))
    return strip


def _wrapped(caption: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int, most: int = 3) -> list[str]:
    """Lines that fit the width, `most` at most; long words, and scripts without spaces, break anywhere."""
    lines = [""]
    for word in re.findall(r"\S+", caption):
        candidate = f"{lines[-1]} {word}".strip()
        if font.getlength(candidate) <= width:
            lines[-1] = candidate
            continue
        lines.append("")
        for character in word:
            if lines[-1] and font.getlength(lines[-1] + character) > width:
                lines.append("")
            lines[-1] += character
    lines = [line for line in lines if line]
    if len(lines) <= most:
        return lines
    last = lines[most - 1]
    while last and font.getlength(last + "...") > width:
        last = last[:-1]
    return [*lines[: most - 1], last + "..."]


def file_names(prompts: Sequence[str]) -> list[str]:
    """A file name without ending for every prompt: its number, which makes it unique, and its words."""
    slugs = (re.sub(r"[\W_]+", "-", prompt.lower()).strip("-")[:40].strip("-") for prompt in prompts)
    digits = max(2, len(str(len(prompts) - 1)))
    return [f"{number:0{digits}}-{slug}".rstrip("-") for number, slug in enumerate(slugs)]


def write_clips(
    clips: Sequence[Tensor],
    prompts: Sequence[str],
    folder: Path,
    formats: Sequence[str] = FORMATS,
    fps: float = 8.0,
) -> list[Path]:
    """Write a file for every clip and format, and a contact sheet of all for "png"; returns the paths.

    Args:
        clips: (F, 3, H, W) uint8 each. Stills (F = 1) become one PNG each in place of GIF and MP4.
        folder: is made if need be; files of the same names are replaced.

    Raises:
        MobiusError: an unknown format, or an fps that players do not follow.
    """
    unknown = sorted(set(formats) - set(FORMATS))
    if unknown:
        raise MobiusError(f"unknown format {', '.join(unknown)}: known are {', '.join(FORMATS)}")
    if not 0 < fps <= 50:
        raise MobiusError(f"fps={fps:g} must lie above 0, and not above 50, where GIF players stop to follow")
    folder.mkdir(parents=True, exist_ok=True)
    names = file_names(prompts)
    written: list[Path] = []
    for frames, name in zip(clips, names, strict=True):
        if len(frames) == 1:
            written.append(folder / f"{name}.png")
            to_images(frames)[0].save(written[-1])
            continue
        if "gif" in formats:
            written.append(folder / f"{name}.gif")
            write_gif(frames, written[-1], fps)
        if "mp4" in formats:
            written.append(folder / f"{name}.mp4")
            write_mp4(frames, written[-1], fps)
    if "png" in formats:
        written.append(folder / SHEET_NAME)
        # The file's number leads the caption, so that a prompt whose script the font lacks is found too.
        captions = [f"{name.split('-')[0]} {prompt}" for name, prompt in zip(names, prompts, strict=True)]
        contact_sheet(clips, captions, written[-1])
    return written
