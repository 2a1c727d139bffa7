"""Captions in pictures: in Pillow's own font, and characters that it lacks in another.

The embedded font has Chinese, Japanese and Korean, but as many of its kind no Latin letters, so each character has its
own font. Other scripts are drawn in fonts of this machine.
"""

from __future__ import annotations

import logging
import re
from functools import cache
from itertools import groupby
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from mobius_train.job.environment import data_folders
from mobius_train.shared_files import EMBEDDED, REPOSITORY

logger = logging.getLogger(__name__)

EMBEDDED_FONT = REPOSITORY / EMBEDDED / "fonts" / "DroidSansFallback.ttf"
SUFFIXES = (".ttf", ".otf", ".ttc", ".otc")
# Names of fonts that are tried last.
STYLED = re.compile(r"bold|black|thin|light|italic|oblique|mono", re.IGNORECASE)
MISSING = "\U0010ffff"  # a character of no font

# Characters that no font has, and that this process has named.
_named: set[str] = set()


def draw_caption(image: Image.Image, place: tuple[int, int], text: str, size: int) -> None:
    """Draw a line of text in black.

    A warning names characters that no font of this machine has; they appear as boxes.

    Args:
        place: its left and upper end, in pixels.
        size: of the font, in pixels.
    """
    drawing, x = ImageDraw.Draw(image), float(place[0])
    baseline = place[1] + _own(size).getmetrics()[0]
    for font, part in _parts(text, size):
        drawing.text((x, baseline), part, fill="black", font=font, anchor="ls")
        x += font.getlength(part)
    if unnamed := {one for one in text if _font_of(one, size) is None} - _named:
        _named.update(unnamed)
        logger.warning(
            "no font of this machine has the characters %s of a caption: they are drawn as boxes. Install a font that"
            " has them, such as Debian's fonts-noto-core",
            "".join(sorted(unnamed)),
        )


def caption_length(text: str, size: int) -> float:
    """The width of a drawn line, in pixels."""
    return sum(font.getlength(part) for font, part in _parts(text, size))


def font_folders() -> list[Path]:
    """The folders in which Linux and macOS keep fonts; they need not exist."""
    home = Path.home()
    linux = [home / ".fonts", *(Path(folder, "fonts") for folder in data_folders())]
    return [*linux, home / "Library" / "Fonts", Path("/Library/Fonts"), Path("/System/Library/Fonts")]


def _parts(text: str, size: int) -> list[tuple[ImageFont.FreeTypeFont, str]]:
    """The text in parts of one font."""
    line = re.sub(r"\s", " ", text)
    own = _own(size)
    return [(font, "".join(part)) for font, part in groupby(line, key=lambda one: _font_of(one, size) or own)]


@cache
def _own(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont)
    return font


@cache
def _font_of(character: str, size: int) -> ImageFont.FreeTypeFont | None:
    """The font of a character; None if no font has it."""
    if not character.isprintable() or _has(_own(size), character):
        return _own(size)
    for path in _font_files():
        try:
            font = _face(path, size)
            if _has(font, character):
                return font
        except (OSError, ValueError):  # damaged, or a bitmap font of other sizes
            continue
    return None


@cache
def _font_files() -> list[Path]:
    """The embedded font, then all of this machine, regular ones first."""
    files = [path for folder in font_folders() for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES]
    return [EMBEDDED_FONT, *sorted(files, key=lambda path: (bool(STYLED.search(path.name)), path))]


@cache
def _face(path: Path, size: int) -> ImageFont.FreeTypeFont:
    """The font of a file, the first if there are several."""
    return ImageFont.truetype(path, size)


def _has(font: ImageFont.FreeTypeFont, character: str) -> bool:
    """The font draws the character otherwise than what it does not have."""
    return _drawn(font, character) != _drawn(font, MISSING)


def _drawn(font: ImageFont.FreeTypeFont, character: str) -> tuple[tuple[int, int], bytes]:
    mask = font.getmask(character)
    return mask.size, bytes(mask)
