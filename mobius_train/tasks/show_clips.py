"""The samples of a validation beside the training clips of their captions and the model before training.

Legend: F frames, H, W pixels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from statistics import mean

from torch import Tensor

from mobius_train.data.clips import ClipDataset
from mobius_train.evenly import evenly
from mobius_train.media.clip_files import SHEET_NAME, file_names, write_clips
from mobius_train.media.comparison import write_comparison
from mobius_train.media.contact_sheet import contact_sheet
from mobius_train.metrics.motion import motion, motion_correlation
from mobius_train.tasks.task import Shown

# Training clips whose motion is compared with that of the samples if some prompts are no captions.
DATA_CLIPS = 64


def show_clips(
    prompts: Sequence[str], samples: Sequence[Tensor], before: Sequence[Tensor] | None, train: ClipDataset, folder: Path
) -> Shown:
    """Write the samples, a comparison as GIF and as contact sheet, and compute motion figures.

    The figures end in `/samples`, `/before` and `/data`; see `mobius_train.metrics.motion`. `motion_correlation` is
    the mean over the prompts that are captions of training clips; `motion_correlation/clips` is their number. The
    data are these clips if every prompt has one, otherwise DATA_CLIPS clips spread evenly over the training data.

    Args:
        samples: a clip for each prompt, (F, 3, H, W) uint8.
        before: the clips of the model before training, from the same noise; None if there are none.
    """
    places = _places(train, frozenset(prompts))
    data = [_first_like(train, places.get(prompt, []), samples[0]) for prompt in prompts]
    rows: dict[str, Sequence[Tensor | None]] = {"data": data, "before": before or [], "after": samples}
    rows = {label: row for label, row in rows.items() if any(clip is not None for clip in row)}
    paths = write_clips(samples, prompts, folder, formats=("gif", "mp4"))
    paths += [folder / SHEET_NAME, folder / "comparison.gif"]
    _sheet(rows, prompts, paths[-2])
    write_comparison(rows, prompts, paths[-1])

    found = [clip for clip in data if clip is not None]
    clips = {"samples": samples, "data": found if len(found) == len(prompts) else list(_spread(train))}
    if before is not None:
        clips["before"] = before
    figures = {f"{name}/{source}": value for source, shown in clips.items() for name, value in motion(shown).items()}
    if found:
        figures["motion_correlation/clips"] = len(found)
        for source in ("samples", "before"):
            pairs = zip(clips.get(source, []), data, strict=False)
            values = [motion_correlation(clip, real) for clip, real in pairs if real is not None]
            if values:
                figures[f"motion_correlation/{source}"] = mean(values)
    return Shown(paths, figures)


# All validations of a run look for the same captions, in up to millions of clips.
@lru_cache(maxsize=1)
def _places(train: ClipDataset, captions: frozenset[str]) -> dict[str, list[int]]:
    """The clips that have each of the captions, in ascending order."""
    places: dict[str, list[int]] = {}
    for index, entry in enumerate(train.entries):
        for caption in captions.intersection(own.text for own in entry.captions):
            places.setdefault(caption, []).append(index)
    return places


def _first_like(train: ClipDataset, places: Sequence[int], like: Tensor) -> Tensor | None:
    """The first of these training clips that has the shape of `like`."""
    for index in places:
        frames = train[index].frames
        if frames.shape == like.shape:
            return frames
    return None


def _spread(train: ClipDataset) -> Iterator[Tensor]:
    """The frames of clips spread evenly over the training data, without single-frame clips."""
    moving: Sequence[int] = range(len(train))
    if train.shapes is not None:
        moving = [index for index, shape in enumerate(train.shapes) if shape.num_frames > 1]
    for index in evenly(moving, DATA_CLIPS):
        yield train[index].frames


def _sheet(rows: dict[str, Sequence[Tensor | None]], prompts: Sequence[str], path: Path) -> None:
    strips, captions = [], []
    # The file's number identifies a prompt whose characters the font lacks.
    for number, (name, prompt) in enumerate(zip(file_names(prompts), prompts, strict=True)):
        for label, row in rows.items():
            clip = row[number]
            if clip is not None:
                strips.append(clip)
                captions.append(f"{name.split('-')[0]} {prompt} ({label})" if len(rows) > 1 else f"{name} {prompt}")
    contact_sheet(strips, captions, path)
