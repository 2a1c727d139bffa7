"""The page for voters: one HTML file without a server, in which nothing names a model, and its key."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mobius_train.data.buckets import Shape
from mobius_train.data.decode import decode_clip, shape_of
from mobius_train.errors import MobiusError
from mobius_train.evaluate.preference.binomial import half_width
from mobius_train.evaluate.preference.key import NO_DIFFERENCE, QUESTIONS, Key, PairKey, Sides
from mobius_train.evaluate.preference.pairs import Pair
from mobius_train.files import finished_files
from mobius_train.media.pixels import to_images

TEMPLATE = Path(__file__).with_name("page.html")
DATA_MARK = "<!-- data -->"  # where the template takes the settings and the pairs
QUALITY = 90  # of WebP, 0 to 100


@dataclass(frozen=True)
class Written:
    """The key of a written page, the shape of every clip on it, and the number of files that had another size."""

    key: Key
    shape: Shape
    resized: int


def write_page(
    pairs: Sequence[Pair], first: str, second: str, *, page: Path, key: Path, seed: int, fps: float = 8.0
) -> Written:
    """Write a page and its key.

    Every clip is cropped and resized to the smallest size among all clips, and encoded anew. The order of the pairs is
    random; each model is on the left in half of them.

    Args:
        first, second: names of the models, for the key alone.
        page, key: files that do not exist yet.
        fps: frames per second of all clips.

    Raises:
        MobiusError: page and key are one file, a file exists or cannot be written, a clip is damaged or a still, or the
            numbers of frames differ.
    """
    if not 0 < fps <= 60:
        raise MobiusError(f"fps={fps:g} must be above 0 and at most 60, the rate of most screens")
    if page.resolve() == key.resolve():
        raise MobiusError(f"{page} is the page and the key: give two files, since voters must not see the key")
    for path in (page, key):
        if path.exists():
            raise MobiusError(
                f"{path} exists: choose another name. The votes on a page can be counted by its key alone"
            )
    shapes = {path: _shape(path) for pair in pairs for path in (pair.first, pair.second)}
    shape = _common_shape(shapes)

    generator = random.Random(seed)
    order = generator.sample(pairs, len(pairs))
    first_is_left = generator.sample([number % 2 == 0 for number in range(len(order))], len(order))
    keys, shown = [], []
    for number, (pair, straight) in enumerate(zip(order, first_is_left, strict=True)):
        left, right = (_encode(path, shape) for path in (pair.first, pair.second)[:: 1 if straight else -1])
        _pad(left, right)
        name = hashlib.sha256(b"".join([str(number).encode(), *left, *right])).hexdigest()[:16]
        keys.append(PairKey(pair=name, prompt=pair.prompt, left="first" if straight else "second"))
        shown.append({"pair": name, "prompt": pair.prompt, "left": _base64(left), "right": _base64(right)})

    sides = Sides(first=first, second=second, seed=seed, pairs=tuple(keys))
    contents = Key(page=sides.page_id(), sides=sides)
    settings = {
        "page": contents.page,
        "pairs": len(pairs),
        "questions": QUESTIONS,
        "no_difference": NO_DIFFERENCE,
        "fps": fps,
        "width": shape.width,
        "height": shape.height,
        "half_width": half_width(len(pairs)),
    }
    data = [_script("settings", settings), *(_script(f"pair-{number}", pair) for number, pair in enumerate(shown))]
    html = TEMPLATE.read_text(encoding="utf-8").replace(DATA_MARK, "\n".join(data))
    try:
        with finished_files([page, key]) as (page_file, key_file):
            page_file.write_text(html, encoding="utf-8")
            key_file.write_text(contents.model_dump_json(indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise MobiusError(f"cannot write {error.filename or page}: {error.strerror or error}") from error
    return Written(contents, shape, sum(other != shape for other in shapes.values()))


def _shape(path: Path) -> Shape:
    shape = shape_of(path.read_bytes(), path.suffix.lower(), str(path))
    if shape.num_frames < 2:
        raise MobiusError(f"{path} is a still, but the page has a question about motion: sample clips")
    return shape


def _common_shape(shapes: dict[Path, Shape]) -> Shape:
    """The smallest size of all clips: an enlarged clip would look blurred beside the others."""
    shortest, longest = (choose(shapes, key=lambda path: shapes[path].num_frames) for choose in (min, max))
    if shapes[shortest].num_frames != shapes[longest].num_frames:
        raise MobiusError(
            f"{shortest} has {shapes[shortest].num_frames} frames, but {longest} has {shapes[longest].num_frames}. This"
            " would give the models away: sample both with the same --num-frames, to MP4, since a GIF merges equal"
            " frames"
        )
    return min(shapes.values(), key=lambda shape: shape.width * shape.height)


def _encode(path: Path, shape: Shape) -> list[bytes]:
    """One WebP picture for each frame, so that the page can show both clips in step."""
    frames = decode_clip(
        path.read_bytes(),
        path.suffix.lower(),
        str(path),
        num_frames=shape.num_frames,
        resolution=(shape.width, shape.height),
    )
    pictures = []
    for image in to_images(frames):
        buffer = io.BytesIO()
        image.save(buffer, "WEBP", quality=QUALITY)
        pictures.append(buffer.getvalue())
    return pictures


def _pad(left: list[bytes], right: list[bytes]) -> None:
    """Fill both clips of a pair to equal sizes in bytes; decoders ignore what follows a picture."""
    for number, pictures in enumerate(zip(left, right, strict=True)):
        size = max(map(len, pictures))
        left[number], right[number] = (picture.ljust(size, b"\0") for picture in pictures)


def _base64(pictures: list[bytes]) -> list[str]:
    return [base64.b64encode(picture).decode() for picture in pictures]


def _script(name: str, values: dict[str, Any]) -> str:
    """A block of JSON in the page. `<` is escaped, so that no prompt can end the block."""
    text = json.dumps(values).replace("<", "\\u003c")
    return f'<script type="application/json" id="{name}">{text}</script>'
