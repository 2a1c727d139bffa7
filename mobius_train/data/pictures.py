"""Frames of GIF, WebP, PNG and JPEG as browsers show them: upright, in sRGB, on white."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator

import numpy as np
from PIL import Image, ImageCms

from mobius_train.data.animation_blocks import CLEAR, RESTORE, Patch, gif_patches, png_patches
from mobius_train.data.colour import colour_notes, needs_conversion, to_srgb
from mobius_train.data.headers import Header
from mobius_train.data.limits import Undecodable

GAMMA = 2.2  # about that of sRGB
# Steps between the grey values of Pillow's raw modes.
SCALES = {"L;2": 85, "L;4": 17}


def picture_notes(header: Header) -> list[str]:
    """What is odd about a picture, and how it is shown."""
    notes = []
    if header.outside:
        notes.append("canvas changes")
    if header.still_first:
        notes.append("hidden picture: the one before the animation is left out")
    if header.num_frames > 1 and not any(header.durations):
        notes.append("zero duration")
    if header.gamma is not None and abs(header.gamma - GAMMA) > 0.1:
        notes.append("PNG gamma other than 2.2: not applied")
    return notes + colour_notes(header.transfer, header.primaries)


def picture_frames(data: bytes, numbers: Iterable[int], header: Header) -> Iterator[Image.Image]:
    """Yield the given frames of a picture, in ascending order, as RGB.

    Args:
        header: of these data; reading it has bounded the memory that Pillow allocates.

    Raises:
        Undecodable: a frame is larger than its header.
        DAMAGED: the data are damaged.
    """
    profile = None
    if header.kind == "gif":
        frames = _drawn(gif_patches(data), numbers, header)
    else:
        with Image.open(io.BytesIO(data), formats=("WEBP", "PNG", "JPEG")) as image:
            profile = image.info.get("icc_profile")
        animated = header.kind == "png" and (header.still_first or header.num_frames > 1)
        frames = _drawn(png_patches(data), numbers, header) if animated else _by_pillow(data, numbers, header)
    for frame in frames:
        picture = on_white(_in_srgb(frame, profile)) if frame.mode == "CMYK" else _in_srgb(on_white(frame), profile)
        if needs_conversion(header.transfer, header.primaries):
            codes = np.asarray(picture).astype(np.uint16) * 257
            picture = Image.fromarray(to_srgb(codes, header.transfer, header.primaries))
        yield header.turn.apply(picture)


def _by_pillow(data: bytes, numbers: Iterable[int], header: Header) -> Iterator[Image.Image]:
    if header.kind == "webp" and data[12:16] == b"VP8X":
        # Say that there is alpha: Pillow would drop it where frames leave the canvas uncovered.
        data = data[:20] + bytes([data[20] | 0x10]) + data[21:]
    with Image.open(io.BytesIO(data), formats=("WEBP", "PNG", "JPEG")) as image:
        for number in numbers:
            image.seek(number)
            _scale_transparency(image)
            image.load()
            _check_size(image, header.width, header.height)
            yield image


def _drawn(patches: Iterable[Patch], numbers: Iterable[int], header: Header) -> Iterator[Image.Image]:
    """The canvas after each of the frames `numbers`. It is transparent where nothing has been drawn."""
    canvas = Image.new("RGBA", (header.width, header.height))
    wanted = iter(numbers)
    next_number = next(wanted, None)
    for number, patch in enumerate(patches):
        if next_number is None:
            return
        if patch.left + patch.width > header.width or patch.top + patch.height > header.height:
            raise Undecodable("damaged", f"frame {number} extends beyond {header.width}x{header.height}")
        before = canvas.copy() if patch.disposal == RESTORE else None
        with Image.open(io.BytesIO(patch.file), formats=("GIF", "PNG")) as image:
            _check_size(image, patch.width, patch.height)
            _scale_transparency(image)
            drawn = _eight_bits(image).convert("RGBA")
        if patch.over:
            canvas.alpha_composite(drawn, (patch.left, patch.top))
        else:
            canvas.paste(drawn, (patch.left, patch.top))
        while next_number == number:
            yield canvas
            next_number = next(wanted, None)
        if patch.disposal == CLEAR:
            canvas.paste((0, 0, 0, 0), (patch.left, patch.top, patch.left + patch.width, patch.top + patch.height))
        elif before is not None:
            canvas = before


def _scale_transparency(image: Image.Image) -> None:
    """Bring the transparent colour of a PNG that is not loaded yet to the range of its pixels, as Pillow leaves it."""
    clear, tiles = image.info.get("transparency"), getattr(image, "tile", ())
    if image.format != "PNG" or clear is None or not tiles:
        return
    form = tiles[0][3]  # such as L;2, or a tuple that begins with it
    form = form if isinstance(form, str) else form[0]
    if isinstance(clear, int) and form in SCALES:
        image.info["transparency"] = clear * SCALES[form]
    elif isinstance(clear, tuple) and form.startswith("RGB;16"):
        image.info["transparency"] = tuple(value >> 8 for value in clear)


def _check_size(image: Image.Image, width: int, height: int) -> None:
    if image.size != (width, height):
        raise Undecodable("damaged", f"a frame of {image.width}x{image.height} is announced as {width}x{height}")


def _in_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """Apply the colour profile of a file, if it is valid and fits the pixels."""
    if not profile:
        return image
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        known = "sRGB" in ImageCms.getProfileDescription(source)
        if known or (image.mode, source.profile.xcolor_space.strip()) not in (("RGB", "RGB"), ("CMYK", "CMYK")):
            return image
        return ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB") or image
    except (OSError, ImageCms.PyCMSError):
        return image


def _eight_bits(image: Image.Image) -> Image.Image:
    """The upper bytes of a 16-bit grey picture, the only kind that Pillow does not reduce itself."""
    if not image.mode.startswith("I"):
        return image
    values = np.asarray(image).astype(np.int64)
    grey = Image.fromarray((values >> 8).clip(0, 255).astype(np.uint8))
    clear = image.info.get("transparency")
    if isinstance(clear, int):
        grey.putalpha(Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
    return grey


def on_white(image: Image.Image) -> Image.Image:
    """Convert to 8-bit RGB on white; 16-bit greys keep their upper byte."""
    image = _eight_bits(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        white.alpha_composite(image)
        image = white
    # A copy, since Pillow reuses one image for all frames of an animation.
    return image.copy() if image.mode == "RGB" else image.convert("RGB")
