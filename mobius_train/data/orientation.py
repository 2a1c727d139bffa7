"""Turns and mirrorings that a file asks for: EXIF orientation, and the display matrix of a video."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

from PIL import Image

from mobius_train.data.limits import Undecodable

ORIENTATION = 0x0112  # EXIF tag


class Turn(NamedTuple):
    """What is done to a stored frame, in this order: exchange rows and columns, mirror left-right, flip top-bottom."""

    transpose: bool = False
    mirror: bool = False
    flip: bool = False

    def size(self, width: int, height: int) -> tuple[int, int]:
        """The shown size of a stored frame."""
        return (height, width) if self.transpose else (width, height)

    def apply(self, image: Image.Image) -> Image.Image:
        """The frame as it is shown."""
        for wanted, step in zip(self, _STEPS, strict=True):
            if wanted:
                image = image.transpose(step)
        return image


_STEPS = (Image.Transpose.TRANSPOSE, Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.FLIP_TOP_BOTTOM)
UPRIGHT = Turn()
# https://www.cipa.jp/std/documents/e/DC-X008-Translation-2019-E.pdf, 4.6.4 A, Orientation
OF_EXIF = {
    1: UPRIGHT,
    2: Turn(mirror=True),
    3: Turn(mirror=True, flip=True),
    4: Turn(flip=True),
    5: Turn(transpose=True),
    6: Turn(transpose=True, mirror=True),
    7: Turn(transpose=True, mirror=True, flip=True),
    8: Turn(transpose=True, flip=True),
}


def turn_of_exif(exif: bytes) -> Turn:
    """The turn of an EXIF block. Damaged EXIF counts as none, as in viewers."""
    tags = Image.Exif()
    try:
        tags.load(exif)
        return OF_EXIF.get(tags.get(ORIENTATION, 1), UPRIGHT)
    except (SyntaxError, ValueError, TypeError, KeyError, IndexError, OSError, struct.error):
        return UPRIGHT


def turn_of_matrix(matrix: Sequence[int]) -> Turn:
    """The turn of a display matrix (a b u c d v x y w), which maps (p, q) to (a·p + c·q, b·p + d·q).

    https://ffmpeg.org/doxygen/trunk/group__lavu__video__display.html

    Raises:
        Undecodable: the angle is no multiple of 90 degrees.
    """
    a, b, c, d = matrix[0], matrix[1], matrix[3], matrix[4]
    straight, crossed = min(abs(a), abs(d)), min(abs(b), abs(c))
    if not any((a, b, c, d)):  # broken writers leave it zero
        return UPRIGHT
    rest, main = sorted((straight, crossed))
    if main == 0 or rest > main / 100:
        raise Undecodable("odd angle", f"the display matrix is {a} {b} {c} {d}")
    return Turn(False, a < 0, d < 0) if straight > crossed else Turn(True, c < 0, b < 0)
