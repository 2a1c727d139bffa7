"""Clips of two models, and votes on them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch

from mobius_train.data.folder import METADATA
from mobius_train.evaluate.preference.key import QUESTIONS, Key
from mobius_train.evaluate.preference.page import Written, write_page
from mobius_train.evaluate.preference.pairs import pair_clips
from mobius_train.files import publish_lines
from mobius_train.media.clip_files import file_names, write_clips

# Names that must occur nowhere in a page. They are long, so that base64 cannot contain them by chance.
FIRST, SECOND = "mobius-ring-of-sd21", "modelscope-baseline"


def prompts(count: int) -> list[str]:
    return [f"a dog number {number}" for number in range(count)]


def save_clips(
    folder: Path,
    of: list[str],
    *,
    side: int = 24,
    frames: int = 2,
    grey: int = 0,
    suffix: str = "gif",
    listed: bool = False,
) -> Path:
    """Clips of the prompts. The grey at the top left identifies the folder, and its increase the frame.

    listed: with a metadata.jsonl, which has the exact prompts.
    """
    clips = [torch.full((frames, 3, side, side), grey, dtype=torch.uint8) for _ in of]
    for number, clip in enumerate(clips):
        clip[:, :, : side // 2] += torch.arange(frames, dtype=torch.uint8).view(-1, 1, 1, 1) * 40 + number
    write_clips(clips, of, folder, [suffix])
    (folder / METADATA[0]).unlink(missing_ok=True)
    if listed:
        names = [f"{name}.{suffix}" for name in file_names(of)]
        rows = [{"file_name": name, "text": prompt} for name, prompt in zip(names, of, strict=True)]
        publish_lines(folder / METADATA[0], rows)
    return folder


def two_models(folder: Path, of: list[str], listed: bool = False) -> tuple[Path, Path]:
    """Dark clips of the first model, bright ones of the second."""
    return (
        save_clips(folder / FIRST, of, grey=30, listed=listed),
        save_clips(folder / SECOND, of, grey=150, listed=listed),
    )


def make_page(folder: Path, count: int, seed: int = 0) -> Written:
    """Write page.html and key.json for `count` pairs."""
    first, second = two_models(folder, prompts(count))
    page, key = folder / "page.html", folder / "key.json"
    return write_page(pair_clips(first, second), FIRST, SECOND, page=page, key=key, seed=seed)


def winner(number: int, question: str) -> str:
    """Planted preferences: "first", "second" or "none", differently for each question."""
    cycle = {
        "text_alignment": ("first", "first", "second"),
        "frame_quality": ("none", "first", "second", "none"),
        "motion_quality": ("first",),
    }[question]
    return cycle[number % len(cycle)]


def answer(number: int, question: str, left: str) -> str:
    """The side of the planted winner in the pair at a place of the page, or "none"."""
    model = winner(number, question)
    return model if model == "none" else "left" if model == left else "right"


def save_votes(
    path: Path, key: Key, voter: str, pairs: int | None = None, choose: Callable[[int, str, str], str] = answer
) -> Path:
    """A ballot on the first pairs, with the fields that the page exports."""
    votes = [
        {"pair": pair.pair, "answers": {question: choose(number, question, pair.left) for question in QUESTIONS}}
        for number, pair in enumerate(key.sides.pairs[:pairs])
    ]
    path.write_text(json.dumps({"page": key.page, "voter": voter, "votes": votes}), encoding="utf-8")
    return path
