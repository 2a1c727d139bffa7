"""Writing of several clips: one file per clip and format, named after the prompt.

metadata.jsonl lists one file per clip with its exact prompt, so that `mobius_train.data` reads the folder as clips.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from mobius_train.errors import MobiusError
from mobius_train.files import publish_lines
from mobius_train.media.contact_sheet import contact_sheet
from mobius_train.media.formats import FORMATS, check_fps
from mobius_train.media.gif import write_gif
from mobius_train.media.pixels import to_images
from mobius_train.media.video import write_mp4

MOST_LETTERS = 40  # of a prompt, in a file name
SHEET_NAME = "contact_sheet.png"
METADATA_NAME = "metadata.jsonl"


def file_names(prompts: Sequence[str]) -> list[str]:
    """A unique file name without suffix for every prompt: its number and its words."""
    slugs = (re.sub(r"[\W_]+", "-", prompt.lower()).strip("-")[:MOST_LETTERS].strip("-") for prompt in prompts)
    digits = max(2, len(str(len(prompts) - 1)))
    return [f"{number:0{digits}}-{slug}".rstrip("-") for number, slug in enumerate(slugs)]


def prompt_in_name(name: str) -> str | None:
    """The words of the prompt in a name of `file_names`; None if the name has none, or may have been cut."""
    words = re.sub(r"^\d+(-|$)", "", name)
    # A name that was cut behind a word has one letter less.
    return words.replace("-", " ") if 0 < len(words) < MOST_LETTERS - 1 else None


def write_clips(
    clips: Sequence[Tensor],
    prompts: Sequence[str],
    folder: Path,
    formats: Sequence[str] = FORMATS,
    fps: float = 8.0,
) -> list[Path]:
    """Write a file for every clip and format, their prompts, and a contact sheet for "png"; return the paths.

    metadata.jsonl lists the MP4 of a clip if there is one: a GIF has 256 colours, and merges equal frames.

    Args:
        clips: (F, 3, H, W) uint8 each. A still (F = 1) becomes a PNG instead of GIF and MP4.
        folder: created if missing; existing files with the same names are replaced.

    Raises:
        MobiusError: a format is unknown, or players do not support the fps.
    """
    unknown = sorted(set(formats) - set(FORMATS))
    if unknown:
        raise MobiusError(f"unknown format {', '.join(unknown)}: supported are {', '.join(FORMATS)}")
    check_fps(fps)
    folder.mkdir(parents=True, exist_ok=True)
    names = file_names(prompts)
    written: list[Path] = []
    metadata: list[dict[str, str]] = []
    for frames, name, prompt in zip(clips, names, prompts, strict=True):
        if len(frames) == 1:
            written.append(folder / f"{name}.png")
            to_images(frames)[0].save(written[-1])
            metadata.append({"file_name": written[-1].name, "text": prompt})
            continue
        if "gif" in formats:
            written.append(folder / f"{name}.gif")
            write_gif(frames, written[-1], fps)
        if "mp4" in formats:
            written.append(folder / f"{name}.mp4")
            write_mp4(frames, written[-1], fps)
        if {"gif", "mp4"} & set(formats):
            metadata.append({"file_name": written[-1].name, "text": prompt})
    if metadata:
        written.append(folder / METADATA_NAME)
        publish_lines(written[-1], metadata)
    if "png" in formats:
        written.append(folder / SHEET_NAME)
        # The file's number identifies a prompt whose characters the font lacks.
        captions = [f"{name.split('-')[0]} {prompt}" for name, prompt in zip(names, prompts, strict=True)]
        contact_sheet(clips, captions, written[-1])
    return written
